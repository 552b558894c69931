"""Many ranks get the rows, weights and losses of one rank, for every --shard, also if their number changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import ROOT, STEPS, assert_same_bits, assert_same_training, exact_records, launcher, metrics, trained

import train
from checkpoints import manifest
from runtime.errors import UserError


@pytest.fixture(scope="module")
def launch(corpus, tmp_path_factory):
    return launcher(corpus, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def one(launch) -> Path:
    """A run on one rank, with micro-batches of two rows: the other runs add up gradients in another order."""
    return trained(launch(1, "--micro-batch", 2, out="one"))


@pytest.mark.parametrize(
    ("world", "shard"),
    [(2, "full"), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((3, "full"), (4, "grad"), (2, "none")))],
)
def test_ranks_train_as_one_does(world, shard, launch, one):
    done, several = launch(world, "--shard", shard, "--micro-batch", 1, out=f"{world}-{shard}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 5  # steps 0, 1, 2, 4, 8; only rank 0 prints
    assert_same_training(several, one)
    assert manifest.verify_checkpoint(several / f"step{STEPS}") == []
    assert len(list((several / f"step{STEPS}" / "state").glob("part-*"))) == world  # each rank wrote one
    for record in metrics(several):
        assert len(record["data_seconds"]) == len(record["compute_seconds"]) == world
        assert all(seconds > 0 for seconds in record["data_seconds"] + record["compute_seconds"])


def test_one_rank_equals_a_process_without_torchrun(launch, one):
    alone = trained(launch(0, "--micro-batch", 2, out="alone"))
    assert exact_records(alone) == exact_records(one)
    assert_same_bits(alone / f"step{STEPS}", one / f"step{STEPS}")


def test_a_run_goes_on_with_other_ranks(launch, one):
    """A run that is resumed on another number of ranks and with another --shard equals a run on one rank."""
    for world, shard, stop_at in ((2, "full", 3), (3, "grad", STEPS)):
        several = trained(launch(world, "--shard", shard, "--stop-at", stop_at, out="several"))
    assert_same_training(several, one)


@pytest.mark.slow
def test_a_nudge_is_the_same_on_any_number_of_ranks(launch, one):
    flags = ("--branch", one / "step4", "--nudge", 50, "--stop-at", 5)
    alone, several = launch(1, *flags, out="nudged-1"), launch(3, *flags, "--shard", "full", out="nudged-3")
    assert_same_bits(trained(several) / "step4", trained(alone) / "step4")


@pytest.mark.slow
def test_a_hundred_steps_on_any_number_of_ranks(launch):
    """What the README promises for many ranks."""
    flags = ("--steps", 100, "--lr", 1e-3)
    alone = trained(launch(1, *flags, "--micro-batch", 2, out="hundred-1"))
    for world, shard in ((2, "full"), (3, "grad"), (4, "full"), (4, "none")):
        assert_same_training(trained(launch(world, *flags, "--shard", shard, out=f"hundred-{world}-{shard}")), alone)


@pytest.mark.slow
def test_bfloat16_on_two_ranks(launch):
    one = trained(launch(1, "--precision", "bf16", out="bf16"))
    two = trained(launch(2, "--precision", "bf16", "--shard", "full", "--recompute", "cheap", out="bf16-sharded"))
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # sharded LayerNorms get bfloat16 weights


def test_the_number_of_ranks_must_divide_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="--batch-size 12 does not divide among 5 ranks; 10 or 15 would"):
        train.parse(["--size", "14m", "--batch-size", "12"])


# A script of its own: a process has one process group, and TRITON_INTERPRET must be set before the imports.
SHARDED = """
import sys
from dataclasses import replace
import torch
import torch.distributed as torch_dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from kernels import backend
from model import SIZES, Pythia
from parallel.recompute import set_recompute

kernels, recompute, file = sys.argv[1:]
backend.choose(kernels)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
backend_name = "nccl" if device.type == "cuda" else "gloo"
torch_dist.init_process_group(backend_name, init_method=f"file://{file}", rank=0, world_size=1)
config = replace(SIZES["14m"], layers=2, hidden=64, vocab=384, seq_len=40)
tokens = torch.randint(384, (2, 41), generator=torch.Generator().manual_seed(0)).to(device)
losses, gradients = [], []
for sharded in (False, True):
    model = Pythia(config).to(device)
    model.compute_dtype = torch.float16
    set_recompute(model, recompute)
    if sharded:
        # cast_forward_inputs=False: cos and sin stay float32
        policy = MixedPrecisionPolicy(torch.float16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    losses.append(loss.item())
    gradients.append([p.grad.full_tensor() if sharded else p.grad for p in model.parameters()])
torch_dist.destroy_process_group()
assert abs(losses[0] - losses[1]) < 1e-3, losses
for (name, _), a, b in zip(model.named_parameters(), *gradients):
    # FSDP2 casts parameters and their gradients to float16
    assert (a - b).abs().max() <= 0.02 * a.abs().max(), name
"""


@pytest.mark.parametrize(
    ("kernels", "recompute"), [pytest.param("triton", "cheap", marks=pytest.mark.slow), ("torch", "none")]
)
def test_fsdp_on_one_rank_equals_the_plain_model(kernels, recompute, tmp_path, monkeypatch):
    if kernels == "triton" and not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    command = [sys.executable, "-c", SHARDED, kernels, recompute, tmp_path / "rendezvous"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
