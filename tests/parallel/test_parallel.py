"""Many ranks: the same rows, weights and losses as one, however weights are sharded, also when a run changes hands."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import train
from checkpoints import manifest
from model import SIZES, Pythia
from parallel.fsdp import RECOMPUTE, set_recompute
from runtime.errors import UserError
from runtime.ranks import init_dist

ROOT = Path(__file__).parents[1]

# train.py with a Pythia small enough, as a script for torchrun.
SMALL = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv.pop(1))
import train
from runtime.errors import run_command
from model import SIZES
SIZES["14m"] = replace(SIZES["14m"], layers=2, hidden=32, vocab=390)  # 390 rows do not divide by 4
run_command(train.main)
"""
STEPS = 8


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """ranks(world, *flags, out="a") -> (finished process, run directory): twelve rows of 32 tokens a step. A world of 0
    is one process without torchrun."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "small.py").write_text(SMALL)

    def start(world: int, *flags, out: str) -> tuple[subprocess.CompletedProcess, Path]:
        line = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world]
        line = line if world else [sys.executable]
        line += [folder / "small.py", ROOT, "--size", "14m", "--data", corpus, "--out", folder / out]
        line += ["--steps", STEPS, "--batch-size", 12, "--seq-len", 32, "--lr", 1e-2, "--precision", "fp32", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=300, env=environment)
        return done, folder / out

    return start


def trained(result: tuple[subprocess.CompletedProcess, Path]) -> Path:
    done, directory = result
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def one(ranks) -> Path:
    """The run of one rank. A micro-step has two rows: sums over rows have another order on every number of ranks."""
    return trained(ranks(1, "--micro-batch", 2, out="one"))


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(ours: Path, one_rank: Path) -> None:
    for a, b in zip(metrics(ours), metrics(one_rank), strict=True):
        assert a["batch_sha256"] == b["batch_sha256"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    files = [directory / "step0" / "model.safetensors" for directory in (ours, one_rank)]
    assert files[0].read_bytes() == files[1].read_bytes()


def state(directory: Path) -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint, put together from its parts with the safetensors library alone."""
    pieces: dict[str, list] = {}
    for part in (directory / "state").glob("*.safetensors"):
        with safe_open(part, framework="pt") as tensors:
            for name, rows in tensors.metadata().items():
                if name != "format":
                    first, last = map(int, rows.split(" of ")[0].split(":"))
                    pieces.setdefault(name, []).append((first, last, tensors.get_tensor(name)))
    for name, rows in pieces.items():
        ends = [0, *(last for _, last, _ in sorted(rows, key=lambda piece: piece[0]))]
        assert [first for first, _, _ in sorted(rows, key=lambda piece: piece[0])] == ends[:-1], name
    return {name: torch.cat([t for _, _, t in sorted(rows, key=lambda p: p[0])]) for name, rows in pieces.items()}


def assert_same_bits(a: Path, b: Path) -> None:
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 * 28  # weights and two moments
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def records(directory: Path) -> list[tuple]:
    return [(m["step"], m["loss"], m["grad_norm"], m["batch_sha256"]) for m in metrics(directory)]


@pytest.mark.parametrize(
    ("world", "shard"),
    [(2, "full"), *(pytest.param(*more, marks=pytest.mark.slow) for more in ((3, "full"), (4, "grad"), (2, "none")))],
)
def test_ranks_train_as_one_does(world, shard, ranks, one):
    done, several = ranks(world, "--shard", shard, "--micro-batch", 1, out=f"{world}-{shard}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved") == 5  # steps 0, 1, 2, 4, 8, and by one rank only
    assert_same_training(several, one)
    assert manifest.verify_checkpoint(several / f"step{STEPS}") == []
    assert len(list((several / f"step{STEPS}" / "state").glob("part-*"))) == world  # each wrote its own
    for record in metrics(several):
        assert len(record["data_seconds"]) == len(record["compute_seconds"]) == world
        assert all(seconds > 0 for seconds in record["data_seconds"] + record["compute_seconds"])


def test_one_rank_is_no_different_from_none(ranks, one):
    alone = trained(ranks(0, "--micro-batch", 2, out="alone"))
    assert records(alone) == records(one)
    assert_same_bits(alone / f"step{STEPS}", one / f"step{STEPS}")


def test_a_run_changes_hands(ranks, one):
    """Stopped and resumed on other ranks, sharded in other ways, a run goes on as if nothing had happened."""
    for world, shard, stop_at in ((2, "full", 3), (3, "grad", STEPS)):
        several = trained(ranks(world, "--shard", shard, "--stop-at", stop_at, out="several"))
    assert_same_training(several, one)


@pytest.mark.slow
def test_a_hundred_steps_on_any_number_of_ranks(ranks):
    """What the README says of ranks."""
    line = ("--steps", 100, "--lr", 1e-3)
    alone = trained(ranks(1, *line, "--micro-batch", 2, out="hundred-1"))
    for world, shard in ((2, "full"), (3, "grad"), (4, "full"), (4, "none")):
        assert_same_training(trained(ranks(world, *line, "--shard", shard, out=f"hundred-{world}-{shard}")), alone)


@pytest.mark.slow
def test_bfloat16_is_sharded_too(ranks):
    one = trained(ranks(1, "--precision", "bf16", out="bf16"))
    two = trained(ranks(2, "--precision", "bf16", "--shard", "full", "--recompute", "cheap", out="bf16-sharded"))
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)  # LayerNorms see weights rounded to bfloat16


# To the bit

BITWISE = ("--bitwise", "--batch-size", 16, "--micro-batch", 2)


def test_bitwise_on_one_and_two_ranks(ranks):
    """Also on other ranks halfway. The gradient norm is above 1 at first: clipping is active."""
    one = trained(ranks(1, *BITWISE, out="bit-1"))
    assert metrics(one)[0]["grad_norm"] > 1
    trained(ranks(2, *BITWISE, "--stop-at", 5, "--shard", "full", out="bit-2"))
    two = trained(ranks(1, *BITWISE, out="bit-2"))
    assert records(two) == records(one)
    assert_same_bits(two / f"step{STEPS}", one / f"step{STEPS}")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_bitwise_for_fifty_steps(ranks, precision):
    line = (*BITWISE, "--steps", 50, "--precision", precision)
    runs = [trained(ranks(world, *line, out=f"fifty-{precision}-{world}")) for world in (1, 2, 4)]
    assert max(m["grad_norm"] for m in metrics(runs[0])) > 1
    for other in runs[1:]:
        assert records(other) == records(runs[0])
        assert_same_bits(other / "step50", runs[0] / "step50")


@pytest.mark.slow
def test_bitwise_resumed_after_every_step_on_other_ranks(ranks):
    line = (*BITWISE, "--steps", 20)
    whole = trained(ranks(1, *line, out="twenty"))
    for k in range(1, 21):
        handed = trained(ranks((2, 1, 4, 2)[k % 4], *line, "--stop-at", k, out="handed"))
    assert records(handed) == records(whole)
    assert_same_bits(handed / "step20", whole / "step20")


def test_bitwise_micro_batches_do_not_depend_on_ranks(monkeypatch):
    for batch, expected in ((1024, 8), (16, 2), (4, 1)):
        for world in ("1", "2", "4"):
            monkeypatch.setenv("WORLD_SIZE", world)
            assert train.parse(["--size", "14m", "--bitwise", "--batch-size", str(batch)]).micro_batch == expected


def test_bitwise_adds_in_pairs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match=r"--bitwise .* needs 1, 2, 4, 8 ... ranks, not 3"):
        init_dist(bitwise=True)
    with pytest.raises(UserError, match=r"--bitwise .*--shard auto, grad or full, not none"):
        train.parse(["--size", "14m", "--bitwise", "--shard", "none"])


def test_ranks_that_do_not_divide_the_batch(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(UserError, match="--batch-size 12 does not divide among 5 ranks; 10 or 15 would"):
        train.parse(["--size", "14m", "--batch-size", "12"])


# In a process of its own, because a process group is for the life of one. TRITON_INTERPRET is set for it, not for us.
SHARDED = """
import sys
from dataclasses import replace
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from kernels import backend
from model import SIZES, Pythia
from parallel.fsdp import set_recompute

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


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recompute_compiles(recompute):
    """That torch.compile sees through it, and compiles what is in the block."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = Pythia(replace(SIZES["14m"], layers=1, hidden=32, vocab=64, seq_len=16))
    tokens = torch.randint(64, (2, 17), generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), list(model.parameters()))
    set_recompute(model, recompute)
    for block in model.blocks:
        block.compile(fullgraph=True, backend=backend)
    gradients = torch.autograd.grad(model(tokens[:, :-1], tokens[:, 1:]), list(model.parameters()))
    assert "tripod" in "".join(graph.print_readable(print_output=False) for graph in graphs)
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


def test_recompute_can_be_chosen_again():
    model = Pythia(replace(SIZES["14m"], layers=1, hidden=32, vocab=64, seq_len=16))
    plain = model.blocks[0].forward
    for recompute in ("cheap", "full", "none"):
        set_recompute(model, recompute)
    assert model.blocks[0].forward == plain
