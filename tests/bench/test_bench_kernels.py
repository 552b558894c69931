"""`pytest bench`: the floors of the ops, the peers, which compute the same as our kernels, and the table."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.kernels.measure import check_agreement, incoming_gradients, outputs_of, reason, with_gradients
from bench.kernels.peers import OPS, Floor, setting
from bench.kernels.report import GOALS, metrics, table
from bench.timing import Moment
from model import SIZES

ROOT = Path(__file__).parents[2]
CONFIG = replace(SIZES["14m"], hidden=48, heads=3, vocab=100, seq_len=24, rotary_fraction=0.5)
BATCH = 2

NOT_TESTED = ("liger", "flash-attn", "cudnn", "compile", "flex", "rotary+")  # need a package or a GPU, or are slow


def run(op: str, arm: str = "tripod"):
    """Returns inputs, outputs, the gradients of the outputs, and the gradients of the inputs."""
    torch.manual_seed(0)
    inputs = OPS[op].inputs(CONFIG, BATCH, torch.empty(0))
    outputs = outputs_of(*OPS[op].arms[arm](*inputs))
    d_outputs = incoming_gradients(outputs)
    gradients = with_gradients(outputs, inputs, d_outputs)[len(outputs) :]
    return inputs, outputs, d_outputs, gradients


def size(*tensors: torch.Tensor) -> int:
    """Bytes of tensors. Floors do not count vectors."""
    return sum(t.numel() * t.itemsize for t in tensors if t.dim() > 1)


def floor(op: str, passes: str) -> Floor:
    return OPS[op].floor(CONFIG, BATCH, passes, 4)


def test_floor_of_attention():
    (qkv, *_), (out,), (d_out,), (d_qkv,) = run("rotary_attention")
    assert floor("rotary_attention", "forward").bytes == size(qkv, out)
    assert floor("rotary_attention", "backward").bytes == size(qkv, out, d_out, d_qkv)

    q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [batch, heads, seq, head_dim]
    with FlopCounterMode(display=False) as scores_only:
        scores = q @ k.mT
    with FlopCounterMode(display=False) as forward:
        out = (q @ k.mT) @ v
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # Half of the square is counted. Backward also computes the scores again, because forward does not keep them.
    assert floor("rotary_attention", "forward").flops == forward.get_total_flops() / 2
    again = scores_only.get_total_flops()
    assert floor("rotary_attention", "backward").flops == (backward.get_total_flops() + again) / 2
    assert scores.shape[-2:] == (CONFIG.seq_len, CONFIG.seq_len)


def test_floor_of_layer_norm():
    (x, attn, mlp, *_), outputs, d_outputs, (dx, d_attn, d_mlp, *_) = run("add_dual_layer_norm")
    assert torch.equal(dx, d_attn)  # so only one of the three must be written
    assert torch.equal(dx, d_mlp)
    assert floor("add_dual_layer_norm", "forward") == (0, size(x, attn, mlp, *outputs))
    assert floor("add_dual_layer_norm", "backward") == (0, size(outputs[0], *d_outputs, dx))


def test_floor_of_gelu():
    (h, _), outputs, d_outputs, (dh, _) = run("bias_gelu")
    assert floor("bias_gelu", "forward") == (0, size(h, *outputs))
    assert floor("bias_gelu", "backward") == (0, size(h, *d_outputs, dh))


def test_floor_of_cross_entropy():
    (hidden, weight, targets), _, _, gradients = run("linear_cross_entropy")
    assert floor("linear_cross_entropy", "both").bytes == size(hidden, weight, *gradients)
    with FlopCounterMode(display=False) as counter:
        torch.nn.functional.cross_entropy(hidden @ weight.T, targets).backward()
    assert floor("linear_cross_entropy", "both").flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("op", "arm"),
    [(name, arm) for name, op in OPS.items() for arm in op.arms if not arm.startswith(("tripod", *NOT_TESTED))],
)
def test_a_peer_computes_the_same(op, arm):
    if arm == "torch chunked" and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("this torch has no chunked F.linear_cross_entropy")
    _, outputs, _, gradients = run(op)
    ours = *outputs, *gradients
    try:
        _, outputs, _, gradients = run(op, arm)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    theirs = *outputs, *gradients
    check_agreement(theirs, ours, 1e-5)
    for i in range(len(ours)):
        wrong = [t * 1.001 if i == j else t for j, t in enumerate(theirs)]
        with pytest.raises(AssertionError, match=f"output or gradient {i} differs from ours by 0.001"):
            check_agreement(tuple(wrong), ours, 1e-5)


def test_agreement_checks_all_outputs_and_shapes():
    x = torch.ones(3, 2)
    check_agreement((x,), (x,), 0.0)
    for found, message in (((x, x), "2 outputs"), ((x.T,), "is torch.Size"), ((x * torch.nan,), "by nan")):
        with pytest.raises(AssertionError, match=message):
            check_agreement(found, (x,), 0.1)


def test_a_moment_is_the_time_of_the_device(monkeypatch):
    class Event:
        """The device reaches every event a quarter of a second after the one before it."""

        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 250.0
            self.stamp, self.reached = Event.now, False

        def synchronize(self):
            self.reached = True

        def elapsed_time(self, later):
            assert later.reached, "read before the device reached it"
            return later.stamp - self.stamp

    monkeypatch.setattr(torch.cuda, "Event", Event)
    began = Moment()
    assert Moment() - began == 0.25


def test_reason_is_the_innermost_exception():
    outer, inner = RuntimeError("compilation failed"), NotImplementedError("no backward\non this device")
    outer.__cause__ = inner
    assert reason(outer) == "NotImplementedError: no backward"
    assert reason(ImportError()) == "ImportError: "


CEILINGS = {"bytes_per_s": 2e12, "flops_per_s": 5e14}


def case(op: str, passes: str, arm: str, milliseconds: float, floor: Floor, peak_bytes: int | None = None) -> dict:
    key = {"op": op, "passes": passes, "size": "160m", "arm": arm}
    return key | metrics(milliseconds / 1e3, floor, CEILINGS, peak_bytes)


def test_metrics():
    moved = case("bias_gelu", "forward", "tripod", 2.0, Floor(0, 2e9))
    assert (moved["bound"], moved["bytes_per_s"], moved["ceiling"]) == ("bytes", 1e12, 0.5)
    computed = case("rotary_attention", "forward", "tripod", 4.0, Floor(1e12, 2e9))
    assert (computed["bound"], computed["flops_per_s"], computed["ceiling"]) == ("flops", 2.5e14, 0.5)


def lines_of(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_table():
    loss, floor = "linear_cross_entropy", Floor(4e12, 1e9)
    text = table(
        [
            case(loss, "both", "tripod", 10.0, floor, 590_000_000),
            case(loss, "both", "eager", 20.0, floor, 11_500_000_000),
            case(loss, "both", "torch chunked", 10.9, floor, 10**9),
            {"op": loss, "passes": "both", "size": "160m", "arm": "liger", "missing": "No module"},
        ]
    )
    lines = lines_of(text)
    assert lines[0] == "measured ceilings: copy 2,000 GB/s, matmul 500 TFLOP/s"
    assert "linear_cross_entropy both 160m tripod 10.000 <= 600 MB yes 400 TFLOP/s 80% 590" in lines
    assert "linear_cross_entropy both 160m eager 20.000 2.00 >= 1.8 yes 200 TFLOP/s 40% 11,500" in lines
    assert "linear_cross_entropy both 160m torch chunked 10.900 1.09 >= 1.1 NO 367 TFLOP/s 73% 1,000" in lines
    assert "linear_cross_entropy both 160m liger: not measured, No module" in text
    assert "linear_cross_entropy both 160m liger: >= 1.3, not measured" in text
    assert f"goals not measured: {len(GOALS) - 3} of {len(GOALS)}" in text
    assert "linear_cross_entropy both 160m eager: >= 1.8, not measured" not in text


def test_without_tripod_a_peer_has_no_ratio():
    text = table([case("linear_cross_entropy", "both", "eager", 20.0, Floor(4e12, 1e9))])
    assert "linear_cross_entropy both 160m eager 20.000 200 TFLOP/s 40%" in lines_of(text)
    assert f"goals not measured: {len(GOALS)} of {len(GOALS)}" in text


@pytest.mark.parametrize("goal", GOALS, ids=" ".join)
def test_every_goal_is_measured(goal):
    op, passes, model, arm = goal
    assert passes in OPS[op].passes
    assert model in OPS[op].sizes
    assert arm in OPS[op].arms
    assert (arm == "tripod") == (GOALS[goal][0] != "ratio")


def test_attention_is_measured_at_every_head_dim():
    assert [SIZES[model].head_dim for model in OPS["rotary_attention"].sizes] == [64, 128, 80]
    assert all(SIZES[model].seq_len == 2048 for op in OPS.values() for model in op.sizes)


def test_on_a_cpu_the_note_says_that_no_kernels_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    here = setting()
    assert here.device.type == "cpu"
    assert "no CUDA device" in here.note
    assert all(list(here.configs(op)) == ["14m"] for op in OPS.values())


@pytest.mark.slow
def test_command(tmp_path):
    if importlib.util.find_spec("pytest_benchmark") is None:
        pytest.skip("pytest-benchmark is not installed")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", "-k", "bias_gelu or alone", "-q"]
    command += ["--benchmark-json", str(tmp_path / "kernels.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "measured ceilings: copy" in result.stdout
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["machine_info"]["tripod"]["versions"]["torch"] == torch.__version__
    ours = [b for b in report["benchmarks"] if b["extra_info"]["arm"] == "tripod"]
    assert [b["extra_info"]["op"] for b in ours] == ["bias_gelu"] * len(ours) != []
    for benchmark in report["benchmarks"]:
        assert benchmark["extra_info"]["seconds"] == benchmark["stats"]["median"] > 0
    assert all(case["missing"] for case in report["missing"])
