"""bench.roofline: its ops are the ops of a step, their floors are right, and the command measures and reports."""

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import roofline, timing
from bench.kernels.measure import outputs_of
from bench.kernels.peers import Floor
from bench.roofline import (
    Measured,
    Op,
    StepSpec,
    build_step,
    loss_matmuls,
    network_ops,
    parse,
    row,
    summarize,
    update_ops,
)
from bench.roofline_report import COLOURS, bars, table
from kernels import attention
from model import SIZES, Pythia
from model import pythia as network
from runtime.errors import UserError

CONFIG = replace(SIZES["14m"], layers=3, hidden=32, heads=2, vocab=51_000, seq_len=24)


@pytest.fixture(params=["fp32", "bf16"])
def spec(request) -> StepSpec:
    return StepSpec(CONFIG, 2, roofline.DTYPES[request.param], torch.device("cpu"))


def test_ops_are_called_as_in_the_step(spec, monkeypatch):
    """Same number of calls, shapes, dtypes and requires_grad."""
    calls = Counter()

    def recorded(name: str, function):
        def wrapper(*arguments):
            signature = [(tuple(a.shape), a.dtype, a.requires_grad) for a in arguments if isinstance(a, Tensor)]
            calls[name, *signature] += 1
            return function(*arguments)

        return wrapper

    names = "linear", "rotary_attention", "bias_gelu", "add_dual_layer_norm", "add_layer_norm", "linear_cross_entropy"
    for name in names:
        wrapper = recorded(name, getattr(roofline, name))
        for module in (network, attention, roofline):  # attention: linear_rotary_attention calls two of the ops
            monkeypatch.setattr(module, name, wrapper, raising=False)
    monkeypatch.setattr(torch.nn.functional, "embedding", recorded("embedding", torch.nn.functional.embedding))
    build_step(spec).forward_backward(torch.randint(CONFIG.vocab, (1, 2, CONFIG.seq_len + 1)))
    in_the_step = calls.copy()
    assert sum(in_the_step.values()) == 3 * (4 + 1 + 1 + 1) + 3

    ops, found = {op.name: op for op in network_ops(spec)}, Counter()
    for name, op in ops.items():
        if name.endswith("forward") or name == "linear_cross_entropy":
            call, setup = op.build()
            calls.clear()
            call(*setup())
            (signature,) = calls
            found[signature] += op.calls
            if f"{name.split()[0]} backward" in ops:
                assert ops[name.replace("forward", "backward")].calls == op.calls
    assert found == in_the_step


def test_flops_add_up(spec):
    """The floors add up to the published formula, with two differences.

    The formula counts vectors as if they were part of matmuls. It does not count that the backward pass of attention
    computes the scores again.
    """
    with torch.device("meta"):
        vectors = sum(p.numel() for p in Pythia(CONFIG).parameters() if p.dim() == 1)
    again = CONFIG.layers * CONFIG.hidden * CONFIG.seq_len  # half of 2 hidden seq_len a token
    expected = spec.tokens * (CONFIG.flops_per_token(causal=True) - 6 * vectors + again)
    assert sum(op.calls * op.floor.flops for op in network_ops(spec)) == expected
    loss_flops = sum(op.calls * op.floor.flops for op in loss_matmuls(spec))
    assert loss_flops == 6 * spec.tokens * CONFIG.vocab * CONFIG.hidden


def test_bytes_of_forward_are_those_of_its_tensors(spec):
    for op in network_ops(spec):
        if op.name.startswith(("qkv", "attn", "mlp", "first", "last", "add", "bias")) and "d_weight" not in op.name:
            call, setup = op.build()
            if "backward" in op.name:
                continue
            inputs = setup()
            tensors = {t.data_ptr(): t.nbytes for t in (*inputs, *outputs_of(call, inputs)) if t.dim() > 1}
            # The last norm also writes x + attn + mlp, for backward.
            kept = spec.tokens * CONFIG.hidden * spec.dtype.itemsize if op.name == "last norm forward" else 0
            assert op.floor.bytes == sum(tensors.values()) + kept, op.name


def test_bytes_of_the_update(spec):
    step = build_step(spec)
    step.forward_backward(torch.randint(CONFIG.vocab, (1, 2, CONFIG.seq_len + 1)))
    elements, matrices = sum(p.numel() for p in step.model.parameters()), CONFIG.layers * 12 * CONFIG.hidden**2
    expected = {"norm of gradients": 4 * elements, "clipping and AdamW": 28 * elements}
    half = spec.dtype == torch.bfloat16
    casts = {"cast of weights": 6 * matrices, "sum of gradients": 6 * matrices} if half else {}
    assert {op.name: op.floor.bytes for op in update_ops(spec, step)} == expected | casts

    step.graph = "there"  # now gradients are added to existing ones, and zeroed after the update
    ops = {op.name: op for op in update_ops(spec, step)}
    casts |= {"sum of gradients": 12 * elements - 2 * matrices * half, "zeroing of gradients": 4 * elements}
    assert {name: op.floor.bytes for name, op in ops.items()} == expected | casts
    before = step.gradients.squared_norm()
    for name in ("sum of gradients", "zeroing of gradients"):
        call, setup = ops[name].build()
        call(*setup())
        assert (step.gradients.squared_norm() == 0) == (name == "zeroing of gradients")
        assert step.gradients.squared_norm() != before

    (embedding,) = [op.floor for op in network_ops(spec) if op.name == "embedding backward"]
    read = 2 * 24 * 32 * spec.dtype.itemsize
    assert embedding == (0, read + 4 * 51_000 * 32)


def test_matmuls_of_backward_are_those_of_autograd(spec):
    """d_input and d_weight compute what the backward pass of linear does."""
    ops = {op.name: op for op in network_ops(spec)}
    torch.manual_seed(0)
    call, setup = ops["mlp_in d_input"].build()
    d_out, weight = setup()
    x = spec.activation(CONFIG.hidden)
    roofline.linear(x, weight.T).backward(d_out)
    torch.testing.assert_close(call(*setup()), x.grad)
    call, setup = ops["qkv d_weight"].build()
    assert [tuple(g.shape) for g in call(*setup())] == [(96, 32), (96,)]


def test_row_and_summary():
    spec = StepSpec(CONFIG, 2, torch.float32, torch.device("cpu"))
    ceiling = Floor(flops=1e12, bytes=1e11)
    matmul = row(Op("matmul", 6, Floor(1e9, 1e6), None), [4e-3, 2e-3, 3e-3], ceiling)
    assert (matmul["seconds"], matmul["floor_seconds"], matmul["bound"]) == pytest.approx((18e-3, 6e-3, "flops"))
    copy = row(Op("copy", 1, Floor(0, 2e9), None), [25e-3], ceiling)
    assert (copy["seconds"], copy["floor_seconds"], copy["bound"]) == pytest.approx((25e-3, 20e-3, "bytes"))
    step = summarize(spec, [matmul, copy], Measured({}, [0.05, 0.07, 0.06], ceiling, None), peak=2e12)
    assert step["seconds"] == 0.06
    assert step["floor_seconds"] == pytest.approx(26e-3)
    flops = 48 * CONFIG.flops_per_token(causal=True)
    assert step["mfu"]["the large product"]["causal"] == pytest.approx(flops / 0.06 / 1e12)
    assert step["mfu_at_floors"]["the data sheet"]["causal"] == pytest.approx(flops / 26e-3 / 2e12)
    between = {"op": "between the ops", "calls": 1, "seconds": 0.017, "bound": None, "floor_seconds": 0.0}
    lines = [line.split("  ") for line in table([copy, matmul, between], step).splitlines()]
    assert [line[0].strip() for line in lines[1:]] == ["between the ops", "matmul", "copy", "the step"]
    assert [cell.strip() for cell in lines[2][1:] if cell] == ["6", "18.00", "30.0%", "6.00", "FLOPs", "33%", "12.00"]

    tiny = copy | {"seconds": 1e-4, "floor_seconds": 2e-4}  # faster than its floor: its inputs are in a cache
    *_, longest = drawn = bars([matmul, copy, between, tiny, tiny], step["seconds"])
    assert [bar.label for bar in drawn] == ["2 others", "between the ops", "matmul  × 6", "copy"]
    assert longest.pieces == pytest.approx({"flops": 0, "bytes": 0.02, "above": 0.005, "between": 0})
    assert longest.note == "25.00 ms, 80%"
    for bar in drawn:
        assert sum(bar.pieces.values()) == pytest.approx(bar.seconds)
    negative = between | {"seconds": -0.01}  # the ops took less time in the step than alone
    shortest, _ = bars([copy, negative], step["seconds"])
    assert shortest == ("between the ops", -0.01, "-10.00 ms", dict.fromkeys(COLOURS, 0))


def test_command(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)  # two threads that wait for each other are slow on a busy machine
    monkeypatch.setitem(timing.SHORTEST, "cpu", 0.0)
    monkeypatch.setitem(timing.ROUNDS, "cpu", 2)
    monkeypatch.setattr(timing, "ATTEMPTS", 1)
    monkeypatch.setattr(roofline, "TURNS", 1)
    for size in ("14m", "31m"):
        monkeypatch.setitem(SIZES, size, replace(SIZES[size], layers=2, vocab=1000))
    picture = importlib.util.find_spec("matplotlib") is not None
    arguments = ["--size", "14m,31m", "--batch", "1", "--seq-len", "64", "--json", str(tmp_path / "a.json")]
    roofline.run(parse(arguments + ["--plot", str(tmp_path / "a.png")] * picture), "the command")
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["size"], report["batch"], report["seq_len"]) == ("14m,31m", 1, 64)
    assert report["gpu"] == (torch.cuda.get_device_name() if torch.cuda.is_available() else None)
    assert report["machine"]["versions"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    for size in ("14m", "31m"):
        rows = [r for r in report["rows"] if r["size"] == size]
        assert all(r["seconds"] > 0 for r in rows if r["op"] != "between the ops")
        step = report["steps"][size]
        assert sum(r["seconds"] for r in rows) == pytest.approx(step["seconds"])
        assert sum(r["floor_seconds"] for r in rows) == pytest.approx(step["floor_seconds"])
        assert report["attention_flops_per_s"][size] > 0
        assert report["product_flops_per_s"][size] > 0
        assert report["copy_bytes_per_s"] >= step["copy_bytes_per_s"] > 0
        part = printed.split(f"Pythia {size}, 1 x 64 tokens")[1].split("Pythia")[0]
        assert all(f"\n{r['op']}  " in part for r in rows)
        assert re.search(rf"\nthe step +1 +{1e3 * step['seconds']:,.2f} +100.0% ", part)
        if picture:
            assert (tmp_path / f"a-{size}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "14m,13m"], "--size knows .*, not 13m"),
        (["--batch", "0"], "--batch must be positive, not 0"),
        (["--seq-len", "many"], "invalid int value"),
        (["--precision", "fp8"], "invalid choice"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: there is no directory nowhere"),
        (["--plot", "nowhere/a.png"], "there is no directory nowhere"),
        (["--plot", "a.txt"], "--plot a.txt: the name of a picture must end in .png"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        parse(["--plot", str(tmp_path / "a.png")])
