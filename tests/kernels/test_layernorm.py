"""The Triton kernels of kernels/layernorm.py against the reference in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import add_dual_layer_norm, add_layer_norm, backend, layernorm
from model import SIZES

pytestmark = pytest.mark.usefixtures("triton_kernels")

NAMES = ("x", "attn", "mlp", "weight1", "bias1", "weight2", "bias2", "branch_bias")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """In the slow interpreter: few programs, so that in backward each has several rows and the last one fewer."""
    if backend.INTERPRETED:
        monkeypatch.setattr(layernorm, "WARPS", 32)


def draw(rows, hidden, dtype, device, parameters=None, without=()):
    """Inputs of add_dual_layer_norm by name; parameters is the dtype of the vectors."""
    random = torch.Generator().manual_seed(rows + hidden)
    values = {}
    for name in NAMES:
        shape, to = ((rows, hidden), dtype) if name in NAMES[:3] else ((hidden,), parameters or dtype)
        value = torch.randn(shape, generator=random) + (name in ("x", "weight1", "weight2"))
        values[name] = None if name in without else value.to(device, to)
    return values


def results(values, upstream, dtype=None):
    """The outputs and the gradients of all values, by name. With dtype: by the reference, in that dtype."""
    leaves = {n: None if v is None else v.to(dtype or v.dtype, copy=True).requires_grad_() for n, v in values.items()}
    backend.choose("torch" if dtype else "triton")
    first = (leaves["x"], leaves["attn"], leaves["mlp"], leaves["weight1"], leaves["bias1"])
    if leaves["weight2"] is None:
        outputs = dict(zip(("x'", "u"), add_layer_norm(*first, branch_bias=leaves["branch_bias"])))
    else:
        second = (leaves["weight2"], leaves["bias2"])
        outputs = dict(zip(("x'", "u", "v"), add_dual_layer_norm(*first, *second, branch_bias=leaves["branch_bias"])))
    wanted = {name: gradient.to(dtype or gradient.dtype) for name, gradient in upstream.items() if name in outputs}
    torch.autograd.backward([outputs[name] for name in wanted], list(wanted.values()))
    gradients = {f"d_{name}": leaf.grad for name, leaf in leaves.items() if leaf is not None}
    return {name: value.detach() for name, value in outputs.items()} | gradients


def upstreams(x, names=("x'", "u", "v")):
    random = torch.Generator().manual_seed(1)
    return {name: torch.randn(x.shape, generator=random).to(x) for name in names}


def error(value, exact):
    if exact is None:  # no gradient: the op may return zeros
        return float(value is not None and value.any())
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_accurate(values, upstream):
    """float32: exact up to rounding; half precision: as accurate as the reference in that dtype."""
    dtype, ours, exact = values["x"].dtype, results(values, upstream), results(values, upstream, torch.float64)
    theirs = results(values, upstream, dtype)
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        bound = 5e-7 if dtype == torch.float32 else 1.1 * error(theirs[name], exact[name]) + torch.finfo(dtype).eps / 50
        assert error(value, exact[name]) <= bound, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("rows", "hidden", "without"),
    [
        (45, 128, ()),
        (11, 768, ("mlp",)),
        (7, 1000, ("branch_bias",)),
        (7, 2048, ("attn", "weight2", "bias2")),
        (3, 2560, ("weight2", "bias2")),
        (3, 5120, ()),
        (5, 8192, ("attn", "mlp")),
        (40, 32, ("attn", "mlp", "branch_bias")),
        (1, 60, ("weight2", "bias2")),
    ],
)
def test_is_the_definition(rows, hidden, without, dtype, device):
    values = draw(rows, hidden, dtype, device, without=without)
    assert_accurate(values, upstreams(values["x"]))


@pytest.mark.parametrize("used", [["x'"], ["u"], ["v"], ["x'", "u"], ["u", "v"]])
def test_outputs_that_are_not_used(used, device, monkeypatch):
    """Nothing reads x' after the last norm: no zeros are allocated for its gradient."""
    values, backward = draw(6, 96, torch.float32, device), layernorm._add_layer_norms_backward

    def watched(residual, d_residual, *others):
        assert (d_residual is None) == ("x'" not in used)
        return backward(residual, d_residual, *others)

    monkeypatch.setattr(layernorm, "_add_layer_norms_backward", watched)
    assert_accurate(values, upstreams(values["x"], used))


def test_float32_parameters_of_float16_activations(device):
    """Gradients of float32 parameters are summed and returned in float32: only x' is rounded to float16."""
    values = draw(70, 64, torch.float16, device, parameters=torch.float32)
    upstream = upstreams(values["x"], ["u", "v"])
    ours, exact = results(values, upstream), results(values, upstream, torch.float64)
    for name in NAMES[3:]:
        assert ours[f"d_{name}"].dtype == torch.float32
    assert error(ours["d_bias1"], exact["d_bias1"]) < 5e-7
    assert error(ours["d_bias2"], exact["d_bias2"]) < 5e-7
    assert_accurate(values, upstream)


def test_norms_are_of_what_was_stored(device):
    """The norms are of x' as rounded to float16, because backward and the next layer read that."""
    values = draw(4, 256, torch.float16, device)
    values["x"] += 100
    ours = results(values, {"u": upstreams(values["x"])["u"]})
    x = ours["x'"].double()
    exact = F.layer_norm(x, x.shape[-1:], values["weight1"].double(), values["bias1"].double())
    assert (ours["u"].double() - exact).abs().max() < 2**-10 * exact.abs().max()


def test_constant_rows_and_large_offsets(device):
    """Variance 0, and a mean of a thousand deviations, where mean(x^2) - mean(x)^2 has no correct digit."""
    values = draw(4, 512, torch.float32, device, without=("attn", "mlp", "branch_bias"))
    values["x"][0], values["x"][1] = 0.0, 3.0
    values["x"][2:] += 1000.0
    _, u, _ = add_dual_layer_norm(*(values[name] for name in NAMES[:7]))
    assert torch.equal(u[:2], values["bias1"].expand(2, -1))
    exact = F.layer_norm(values["x"][2:].double(), (512,), values["weight1"].double(), values["bias1"].double())
    torch.testing.assert_close(u[2:].double(), exact, rtol=0, atol=1e-3)  # float32 rounds 1000 by 6e-5


def test_x_is_handed_on_when_nothing_is_added(device):
    values = draw(3, 32, torch.float32, device, without=("attn", "mlp", "branch_bias"))
    assert add_dual_layer_norm(*(values[name] for name in NAMES[:7]))[0] is values["x"]
    assert add_layer_norm(*(values[name] for name in NAMES[:5]))[0] is values["x"]


def test_the_shared_gradient_is_not_shared_by_its_owners(device):
    """x, attn and mlp have equal gradients; changing one in place must not change the others."""
    values = draw(4, 64, torch.float32, device)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    for _ in range(2):
        total, u, v = add_dual_layer_norm(*(leaves[name] for name in NAMES[:7]), branch_bias=leaves["branch_bias"])
        ((total + leaves["x"]) * u * v).sum().backward()
    expected = {name: torch.zeros_like(value).double() for name, value in values.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in values.items()}
    backend.choose("torch")
    total, u, v = add_dual_layer_norm(*(exact[name] for name in NAMES[:7]), branch_bias=exact["branch_bias"])
    ((total + exact["x"]) * u * v).sum().backward()
    expected = {name: 2 * value.grad for name, value in exact.items()}
    for name in NAMES:
        assert error(leaves[name].grad, expected[name]) < 1e-6, name
        leaves[name].grad.zero_()  # as an optimizer that reuses the memory
    assert error(total, exact["x"] + exact["attn"] + exact["mlp"] + exact["branch_bias"]) < 1e-6


def test_expanded_and_transposed_gradients(device):
    values = draw(6, 48, torch.float32, device)
    dense = upstreams(values["x"])
    row, column = dense["u"][:1].clone(), dense["v"].T.contiguous()
    strided = {"x'": torch.ones((), device=device).expand(6, 48), "u": row.expand(6, 48), "v": column.T}
    assert [gradient.is_contiguous() for gradient in strided.values()] == [False] * 3
    assert_accurate(values, strided)


def test_no_rows(device):
    values = draw(0, 64, torch.float32, device)
    ours = results(values, upstreams(values["x"]))
    assert ours["u"].shape == (0, 64)
    assert not any(ours[f"d_{name}"].any() for name in NAMES)


def test_two_runs_have_the_same_bits(device):
    values = draw(70, 80, torch.float16, device)
    upstream = upstreams(values["x"])
    once, again = results(values, upstream), results(values, upstream)
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize("without", [(), ("attn", "weight2", "bias2"), ("attn", "mlp", "branch_bias")])
def test_opcheck(without, device):
    values = draw(5, 32, torch.float32, device, without=without)
    leaves = {name: None if value is None else value.requires_grad_() for name, value in values.items()}
    order = ("x", "attn", "mlp", "branch_bias", "weight1", "bias1", "weight2", "bias2")
    torch.library.opcheck(layernorm._add_layer_norms, (*(leaves[name] for name in order), 1e-5))


@pytest.mark.parametrize("dual", [True, False])
def test_opcheck_backward(dual, device):
    x, d_total, du, dv = torch.randn(4, 5, 32, device=device)
    mean, rstd, weight = x.mean(1), 1 / x.std(1), torch.ones(32, device=device)
    arguments = (x, d_total, du, dv, weight, weight.clone()) if dual else (x, None, du, None, weight, None)
    torch.library.opcheck(layernorm._add_layer_norms_backward, (*arguments, mean, rstd))


def two_layers(x, attn, mlp, weight1, bias1, weight2, bias2, branch_bias):
    x, u, v = add_dual_layer_norm(x, attn, mlp, weight1, bias1, weight2, bias2, branch_bias=branch_bias)
    x, u = add_layer_norm(x, u.sin(), v.cos(), weight1, bias1, branch_bias=branch_bias)
    return (u * u.detach().cos()).sum()


def loss_and_gradients(function, values):
    leaves = [values[name].detach().clone().requires_grad_() for name in NAMES]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def test_compiles_as_one_graph(device):
    values = draw(6, 64, torch.float32, device)
    torch._dynamo.reset()
    compiled = loss_and_gradients(torch.compile(two_layers, fullgraph=True), values)
    for ours, eager in zip(compiled, loss_and_gradients(two_layers, values)):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("policy", "runs"), [(CheckpointPolicy.MUST_SAVE, 2), (CheckpointPolicy.MUST_RECOMPUTE, 4)])
def test_selective_checkpointing(policy, runs, device, monkeypatch):
    values, counted, outputs = draw(6, 64, torch.float32, device), [], layernorm._outputs
    plain = loss_and_gradients(two_layers, values)

    def decide(_, op, *args, **kwargs):
        return policy if op == torch.ops.tripod.add_layer_norms.default else CheckpointPolicy.PREFER_RECOMPUTE

    def function(*leaves):
        contexts = partial(create_selective_checkpoint_contexts, decide)
        return checkpoint(two_layers, *leaves, use_reentrant=False, context_fn=contexts)

    monkeypatch.setattr(layernorm, "_outputs", lambda *inputs: counted.append(1) or outputs(*inputs))
    for ours, expected in zip(loss_and_gradients(function, values), plain):
        assert torch.equal(ours, expected)
    assert len(counted) == runs


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp": torch.zeros(4)}, r"mlp must have the shape of x \[2, 4\]"),
        ({"attn": torch.zeros(2, 4).half()}, "attn must have .* dtype torch.float32"),
        ({"weight2": torch.ones(5)}, r"weight2 must be \[4\]"),
        ({"branch_bias": torch.zeros(1)}, r"branch_bias must be \[4\]"),
        ({"bias1": torch.zeros(4).double()}, "must all be of one floating-point dtype"),
        ({"weight1": torch.ones(4, device="meta")}, "weight1 must be on cpu"),
        ({"x": torch.zeros(4, 2).T}, "x must be contiguous"),
        ({"bias2": torch.zeros(1).expand(4)}, "bias2 must be contiguous"),
    ],
)
def test_refuses_what_does_not_fit(change, message, kernels):
    values = draw(2, 4, torch.float32, "cpu") | change
    backend.choose(kernels)
    with pytest.raises(ValueError, match=message):
        add_dual_layer_norm(*(values[name] for name in NAMES[:7]), branch_bias=values["branch_bias"])


def test_refuses_rows_that_do_not_fit_into_registers(device):
    values = draw(1, 8193, torch.float32, device)
    with pytest.raises(ValueError, match="at most 8192"):
        add_layer_norm(*(values[name] for name in NAMES[:5]))


# ---------------------------------------------------------------------------------------------- on a GPU


def adverse(kind, rows, hidden, dtype, device):
    values = draw(rows, hidden, dtype, device)
    if kind == "large":
        for name in NAMES[:3]:
            values[name] *= 1000  # and x' = 3000, within float16
    elif kind == "offset":
        values["x"] += 200
    elif kind == "outlier":
        values["x"][:, hidden // 3] += 5000
    elif kind == "constant":
        values["x"].fill_(2.0)
        values["attn"].zero_()
        values["mlp"].zero_()
        values["branch_bias"].zero_()
    return values


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "large", "offset", "outlier", "constant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("hidden", sorted({config.hidden for config in SIZES.values()}))
def test_every_size(hidden, dtype, kind):
    values = adverse(kind, 1111, hidden, dtype, "cuda")
    upstream = upstreams(values["x"])
    ours, exact = results(values, upstream), results(values, upstream, torch.float64)
    theirs = results(values, upstream, dtype)
    for name, value in ours.items():
        slack = 5e-7 if dtype == torch.float32 else torch.finfo(dtype).eps / 50
        bound = 1.1 * error(theirs[name], exact[name]) + slack
        assert error(value, exact[name]) <= bound, name


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", sorted({config.hidden for config in SIZES.values()}))
def test_a_hundred_runs_have_the_same_bits(hidden):
    values = draw(4096, hidden, torch.bfloat16, "cuda", parameters=torch.float32)
    upstream = upstreams(values["x"])
    once = results(values, upstream)
    for _ in range(99):
        again = results(values, upstream)
        assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.large
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    hidden = 2048
    rows = 2**31 // hidden + 19
    values = draw(8, hidden, torch.bfloat16, "cuda", without=("mlp",))
    long = {n: v.repeat(-(-rows // 8), 1)[:rows] if n in ("x", "attn") else v for n, v in values.items()}
    upstream = upstreams(values["x"])
    tail = slice(rows - 8 - rows % 8, rows - rows % 8)  # one full repetition, past 2^31 elements
    ours = results(long, {name: gradient.repeat(-(-rows // 8), 1)[:rows] for name, gradient in upstream.items()})
    short = results(values, upstream)
    for name in ("x'", "u", "v", "d_x", "d_attn"):
        assert torch.equal(ours[name][tail], short[name]), name
