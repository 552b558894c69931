"""The network under torch's own engine for many devices, FSDP2: the kernels are nodes that it can shard around."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# In a process of its own, because a process group is for the life of one. TRITON_INTERPRET is set for it, not for us.
SHARDED = """
import sys
from dataclasses import replace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from kernels import backend
from model import SIZES, Pythia
from parallel import set_recompute

kernels, recompute, file = sys.argv[1:]
backend.choose(kernels)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
dist.init_process_group("nccl" if device.type == "cuda" else "gloo", init_method=f"file://{file}", rank=0, world_size=1)
config = replace(SIZES["14m"], layers=2, hidden=64, vocab=384, seq_len=40)
tokens = torch.randint(384, (2, 41), generator=torch.Generator().manual_seed(0)).to(device)
losses, gradients = [], []
for sharded in (False, True):
    model = Pythia(config).to(device)
    model.compute_dtype = torch.float16
    set_recompute(model, recompute)
    if sharded:
        # inputs as they are: else cos and sin would be rounded to float16 on their way into a block
        policy = MixedPrecisionPolicy(torch.float16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    losses.append(loss.item())
    gradients.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
dist.destroy_process_group()
assert abs(losses[0] - losses[1]) < 1e-3, losses
for (name, _), a, b in zip(model.named_parameters(), *gradients):
    # sharded, parameters are rounded to float16 before they are used, and their gradients are
    assert (a - b).abs().max() <= 0.02 * a.abs().max(), name
"""


@pytest.mark.parametrize(("kernels", "recompute"), [("triton", "cheap"), ("torch", "none")])
def test_fully_sharded(kernels, recompute, tmp_path, monkeypatch):
    if kernels == "triton" and not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    line = [sys.executable, "-c", SHARDED, kernels, recompute, tmp_path / "rendezvous"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
