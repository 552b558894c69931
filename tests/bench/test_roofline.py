"""bench.roofline: its ops are those of a step, their floors are right, and its command measures and reports."""

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bench import ceilings, roofline
from bench.kernel_measure import outputs_of
from bench.kernel_peers import Floor
from bench.roofline import (
    COLOURS,
    Form,
    Measured,
    Op,
    bars,
    build_step,
    loss_products,
    network_ops,
    parse,
    row,
    update_ops,
)
from model import SIZES, Pythia
from model import pythia as network
from runtime.errors import UserError

CONFIG = replace(SIZES["14m"], layers=3, hidden=32, heads=2, vocab=51_000, seq_len=24)


@pytest.fixture(params=["fp32", "bf16"])
def form(request) -> Form:
    return Form(CONFIG, 2, roofline.DTYPES[request.param], torch.device("cpu"))


def test_ops_are_called_as_in_the_step(form, monkeypatch):
    """As often, on the same shapes and dtypes, and for the same gradients."""
    calls = Counter()

    def recorded(name: str, function):
        def wrapper(*arguments):
            facts = [(tuple(a.shape), a.dtype, a.requires_grad) for a in arguments if isinstance(a, Tensor)]
            calls[name, *facts] += 1
            return function(*arguments)

        return wrapper

    names = "linear", "rotary_attention", "bias_gelu", "add_dual_layer_norm", "add_layer_norm", "linear_cross_entropy"
    for name in names:
        wrapper = recorded(name, getattr(network, name))
        monkeypatch.setattr(network, name, wrapper)
        monkeypatch.setattr(roofline, name, wrapper)
    monkeypatch.setattr(torch.nn.functional, "embedding", recorded("embedding", torch.nn.functional.embedding))
    build_step(form).forward_backward(torch.randint(CONFIG.vocab, (1, 2, CONFIG.seq_len + 1)))
    in_the_step = calls.copy()
    assert sum(in_the_step.values()) == 3 * (4 + 1 + 1 + 1) + 3

    ops, found = {op.name: op for op in network_ops(form)}, Counter()
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


def test_flops_add_up(form):
    """To the published formula, but that it counts vectors as if they were in products, and that the backward pass of
    attention is credited with forming the scores again."""
    with torch.device("meta"):
        vectors = sum(p.numel() for p in Pythia(CONFIG).parameters() if p.dim() == 1)
    again = CONFIG.layers * CONFIG.hidden * CONFIG.seq_len  # half of 2 hidden seq_len a token
    expected = form.tokens * (CONFIG.flops_per_token(causal=True) - 6 * vectors + again)
    assert sum(op.calls * op.floor.flops for op in network_ops(form)) == expected
    assert (
        sum(op.calls * op.floor.flops for op in loss_products(form)) == 6 * form.tokens * CONFIG.vocab * CONFIG.hidden
    )


def test_bytes_of_forward_are_its_tensors(form):
    for op in network_ops(form):
        if op.name.startswith(("qkv", "attn", "mlp", "first", "last", "add", "bias")) and "d_weight" not in op.name:
            call, setup = op.build()
            if "backward" in op.name:
                continue
            inputs = setup()
            tensors = {t.data_ptr(): t.nbytes for t in (*inputs, *outputs_of(call, inputs)) if t.dim() > 1}
            # The sum that the last norm is of is written too, for backward to read.
            kept = form.tokens * CONFIG.hidden * form.dtype.itemsize if op.name == "last norm forward" else 0
            assert op.floor.bytes == sum(tensors.values()) + kept, op.name


def test_bytes_of_the_update(form):
    step = build_step(form)
    step.forward_backward(torch.randint(CONFIG.vocab, (1, 2, CONFIG.seq_len + 1)))
    numbers, matrices = sum(p.numel() for p in step.model.parameters()), CONFIG.layers * 12 * CONFIG.hidden**2
    expected = {"norm of gradients": 4 * numbers, "clipping and AdamW": 28 * numbers}
    half = form.dtype == torch.bfloat16
    casts = {"weights rounded": 6 * matrices, "gradients added up": 6 * matrices} if half else {}
    assert {op.name: op.floor.bytes for op in update_ops(form, step)} == expected | casts

    step.graph = "there"  # gradients are added to old ones, and zeroed
    ops = {op.name: op for op in update_ops(form, step)}
    casts |= {"gradients added up": 12 * numbers - 2 * matrices * half, "gradients zeroed": 4 * numbers}
    assert {name: op.floor.bytes for name, op in ops.items()} == expected | casts
    before = step.gradients.squared_norm()
    for name in ("gradients added up", "gradients zeroed"):
        call, setup = ops[name].build()
        call(*setup())
        assert (step.gradients.squared_norm() == 0) == (name == "gradients zeroed")
        assert step.gradients.squared_norm() != before

    (embedding,) = [op.floor for op in network_ops(form) if op.name == "embedding backward"]
    read = 2 * 24 * 32 * form.dtype.itemsize
    assert embedding == (0, read + 4 * 51_000 * 32)


def test_products_of_backward_are_those_of_autograd(form):
    """d_input and d_weight compute what the backward pass of linear does."""
    ops = {op.name: op for op in network_ops(form)}
    torch.manual_seed(0)
    call, setup = ops["mlp_in d_input"].build()
    d_out, weight = setup()
    x = form.activation(CONFIG.hidden)
    roofline.linear(x, weight.T).backward(d_out)
    torch.testing.assert_close(call(*setup()), x.grad)
    call, setup = ops["qkv d_weight"].build()
    assert [tuple(g.shape) for g in call(*setup())] == [(96, 32), (96,)]


def test_row_and_summary():
    form = Form(CONFIG, 2, torch.float32, torch.device("cpu"))
    ceiling = Floor(flops=1e12, bytes=1e11)
    product = row(Op("product", 6, Floor(1e9, 1e6), None), [4e-3, 2e-3, 3e-3], ceiling)
    assert (product["seconds"], product["floor_seconds"], product["bound"]) == pytest.approx((18e-3, 6e-3, "flops"))
    copy = row(Op("copy", 1, Floor(0, 2e9), None), [25e-3], ceiling)
    assert (copy["seconds"], copy["floor_seconds"], copy["bound"]) == pytest.approx((25e-3, 20e-3, "bytes"))
    step = roofline.summarize(form, [product, copy], Measured({}, [0.05, 0.07, 0.06], ceiling, None), peak=2e12)
    assert step["seconds"] == 0.06
    assert step["floor_seconds"] == pytest.approx(26e-3)
    flops = 48 * CONFIG.flops_per_token(causal=True)
    assert step["mfu"]["the large product"]["causal"] == pytest.approx(flops / 0.06 / 1e12)
    assert step["mfu_at_floors"]["the data sheet"]["causal"] == pytest.approx(flops / 26e-3 / 2e12)
    between = {"op": "between the ops", "calls": 1, "seconds": 0.017, "bound": None, "floor_seconds": 0.0}
    lines = [line.split("  ") for line in roofline.table([copy, product, between], step).splitlines()]
    assert [line[0].strip() for line in lines[1:]] == ["between the ops", "product", "copy", "the step"]
    assert [cell.strip() for cell in lines[2][1:] if cell] == ["6", "18.00", "30.0%", "6.00", "FLOPs", "33%", "12.00"]

    tiny = copy | {"seconds": 1e-4, "floor_seconds": 2e-4}  # found in a cache
    *_, longest = drawn = bars([product, copy, between, tiny, tiny], step["seconds"])
    assert [bar.label for bar in drawn] == ["2 others", "between the ops", "product  × 6", "copy"]
    assert longest.pieces == pytest.approx({"flops": 0, "bytes": 0.02, "above": 0.005, "between": 0})
    assert longest.reached == "25.00 ms, 80%"
    for bar in drawn:
        assert sum(bar.pieces.values()) == pytest.approx(bar.seconds)
    less = between | {"seconds": -0.01}  # ops took less time in the step than alone
    assert bars([copy, less], step["seconds"])[0] == ("between the ops", -0.01, "-10.00 ms", dict.fromkeys(COLOURS, 0))


def test_command(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(1)  # two that wait for each other are slow where others want the CPU
    monkeypatch.setitem(ceilings.SHORTEST, "cpu", 0.0)
    monkeypatch.setitem(ceilings.ROUNDS, "cpu", 2)
    monkeypatch.setattr(ceilings, "ATTEMPTS", 1)
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
        table = printed.split(f"Pythia {size}, 1 x 64 tokens")[1].split("Pythia")[0]
        assert all(f"\n{r['op']}  " in table for r in rows)
        assert re.search(rf"\nthe step +1 +{1e3 * step['seconds']:,.2f} +100.0% ", table)
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
