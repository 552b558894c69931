"""The Triton kernels of kernels/gelu.py against the reference in float64."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from kernels import backend, bias_gelu, gelu
from model import SIZES

pytestmark = pytest.mark.usefixtures("triton_kernels")
forms = pytest.mark.parametrize("approximate", ["tanh", "none"])


@pytest.fixture(autouse=True)
def few_rows(monkeypatch):
    """In the slow interpreter: few rows a program, so that small tests have several programs and a shorter last one."""
    if backend.INTERPRETED:
        monkeypatch.setattr(gelu, "ROWS", 3)


def draw(rows, ffn, dtype, device, parameters=None):
    """h, bias and the gradient of the output."""
    random = torch.Generator().manual_seed(rows + ffn)
    h, bias, da = (torch.randn(shape, generator=random) for shape in ((rows, ffn), (ffn,), (rows, ffn)))
    return (2 * h).to(device, dtype), bias.to(device, parameters or dtype), da.to(device, dtype)


def results(h, bias, da, approximate, dtype=None):
    """The output and the gradients of h and bias. With dtype: by the reference, in that dtype."""
    h, bias = (value.to(dtype or value.dtype, copy=True).requires_grad_() for value in (h, bias))
    backend.choose("torch" if dtype else "triton")
    out = bias_gelu(h, bias, approximate)
    out.backward(da.to(out.dtype))
    return {"out": out.detach(), "dh": h.grad, "d_bias": bias.grad}


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def assert_accurate(h, bias, da, approximate):
    """float32: exact up to rounding; half precision: as accurate as the reference in that dtype."""
    ours, exact = results(h, bias, da, approximate), results(h, bias, da, approximate, torch.float64)
    theirs = results(h, bias, da, approximate, h.dtype)
    for name, value in ours.items():
        bound = 5e-7 if h.dtype == torch.float32 else 1.1 * error(theirs[name], exact[name]) + 1e-5
        assert error(value, exact[name]) <= bound, name


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "ffn"), [(1, 128), (7, 512), (4, 3072), (5, 1000), (2, 10240), (4, 77)])
def test_is_the_definition(rows, ffn, dtype, approximate, device):
    assert_accurate(*draw(rows, ffn, dtype, device), approximate)


@forms
def test_every_float16(approximate, device):
    """At every point the error is a rounding of the largest number involved: |h|, or 1 in the derivative."""
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    h = h[h.isfinite()].to(device)[None]  # [1, 63488]
    bias, da = torch.zeros_like(h[0]), torch.ones_like(h)
    ours, exact = results(h, bias, da, approximate), results(h, bias, da, approximate, torch.float64)
    assert ((ours["out"] - exact["out"]).abs() <= 2**-11 * exact["out"].abs() + 2e-7 * h.abs() + 2**-25).all()
    assert ((ours["dh"] - exact["dh"]).abs() <= 2**-11 * exact["dh"].abs() + 1e-6).all()


@forms
def test_tails_do_not_overflow(approximate, device):
    """h^3 overflows from 1e13 on, h^2 from 1e19 on; the result must not."""
    h = torch.tensor([[-3e38, -1e19, -1e13, -20.0, 20.0, 1e13, 1e19, 3e38]], device=device)
    ours = results(h, torch.zeros_like(h[0]), torch.ones_like(h), approximate)
    assert torch.equal(ours["out"], h.clamp(min=0))
    assert torch.equal(ours["dh"], (h > 0).float())


def test_the_tail_of_tanh_keeps_its_digits(device):
    """1 + tanh(z) cancels below -3: torch's float32 has no correct digit at -6. 1 / (1 + exp(-2z)) does not cancel."""
    h = torch.linspace(-8, -1, 500, device=device)[None]
    ours = results(h, torch.zeros_like(h[0]), torch.ones_like(h), "tanh")
    exact = h.double().requires_grad_()
    out = exact * torch.sigmoid((8 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3))
    out.sum().backward()
    assert ((ours["out"] - out).abs() <= 1e-5 * out.abs()).all()
    assert (
        (ours["dh"] - exact.grad).abs() <= 1e-5 * exact.grad.abs() + 1e-7 * (h > -2)
    ).all()  # the derivative is 0 at -0.75


@forms
def test_float32_bias_of_float16_activations(approximate, device):
    h, bias, da = draw(20, 64, torch.float16, device, parameters=torch.float32)
    ours, exact = (results(h, bias, da, approximate, dtype) for dtype in (None, torch.float64))
    assert ours["d_bias"].dtype == torch.float32
    assert error(ours["d_bias"], exact["d_bias"]) < 5e-7
    assert ours["dh"].dtype == torch.float16


def test_expanded_gradient(device):
    h, bias, _ = draw(5, 96, torch.float32, device)
    assert_accurate(h, bias, torch.full((), 0.5, device=device).expand(5, 96), "tanh")
    assert_accurate(h, bias, torch.randn(96, 5, device=device).T, "tanh")


def test_more_dimensions_and_no_rows(device):
    h, bias, _ = draw(12, 32, torch.float32, device)
    assert torch.equal(bias_gelu(h.view(2, 3, 2, 32), bias).view(12, 32), bias_gelu(h, bias))
    ours = results(h[:0], bias, h[:0], "tanh")
    assert ours["out"].shape == (0, 32)
    assert not ours["d_bias"].any()


@forms
def test_two_runs_have_the_same_bits(approximate, device):
    arguments = *draw(11, 300, torch.float16, device), approximate
    once, again = results(*arguments), results(*arguments)
    assert all(torch.equal(value, again[name]) for name, value in once.items())


@forms
def test_opcheck(approximate, device):
    h, bias, da = draw(4, 48, torch.float32, device)
    torch.library.opcheck(gelu._bias_gelu_backward, (da, h, bias, approximate))
    torch.library.opcheck(gelu._bias_gelu, (h.requires_grad_(), bias.requires_grad_(), approximate))


def loss_and_gradients(function, h, bias):
    leaves = [value.detach().clone().requires_grad_() for value in (h, bias)]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def network(h, bias):
    return bias_gelu(bias_gelu(h, bias).sin(), bias, "none").cos().sum()


def test_compiles_as_one_graph(device):
    h, bias, _ = draw(4, 48, torch.float32, device)
    torch._dynamo.reset()
    compiled = loss_and_gradients(torch.compile(network, fullgraph=True), h, bias)
    for ours, eager in zip(compiled, loss_and_gradients(network, h, bias)):
        torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("policy", "runs"), [(CheckpointPolicy.MUST_SAVE, 2), (CheckpointPolicy.MUST_RECOMPUTE, 4)])
def test_selective_checkpointing(policy, runs, device, monkeypatch):
    h, bias, _ = draw(4, 48, torch.float32, device)
    plain, counted, kernel = loss_and_gradients(network, h, bias), [], gelu.gelu_forward_kernel

    class Counted:
        def __getitem__(self, grid):
            counted.append(grid)
            return kernel[grid]

    def decide(_, op, *args, **kwargs):
        return policy if op == torch.ops.tripod.bias_gelu.default else CheckpointPolicy.PREFER_RECOMPUTE

    def function(*leaves):
        contexts = partial(create_selective_checkpoint_contexts, decide)
        return checkpoint(network, *leaves, use_reentrant=False, context_fn=contexts)

    monkeypatch.setattr(gelu, "gelu_forward_kernel", Counted())
    for ours, expected in zip(loss_and_gradients(function, h, bias), plain):
        assert torch.equal(ours, expected)
    assert len(counted) == runs


@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize(
    ("h", "bias", "approximate", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(4), "erf", "approximate must be"),
        (torch.zeros(2, 4), torch.zeros(3), "tanh", r"bias must be \[4\]"),
        (torch.zeros(2, 4), torch.zeros(4).int(), "tanh", "bias must have a floating-point"),
        (torch.zeros(2, 4), torch.zeros(4, device="meta"), "tanh", "bias must be on cpu"),
        (torch.zeros(4, 2).T, torch.zeros(4), "tanh", "must be contiguous"),
        (torch.zeros(2, 4), torch.zeros(1).expand(4), "tanh", "must be contiguous"),
    ],
)
def test_refuses_what_does_not_fit(h, bias, approximate, message, kernels):
    backend.choose(kernels)
    with pytest.raises(ValueError, match=message):
        bias_gelu(h, bias, approximate)


# ---------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("ffn", sorted({config.ffn for config in SIZES.values()}))
def test_every_size(ffn, dtype, scale, approximate):
    h, bias, da = draw(515, ffn, dtype, "cuda")
    assert_accurate(scale * h, bias, da, approximate)


@pytest.mark.gpu
@forms
def test_every_bfloat16(approximate):
    h = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    h = h[h.isfinite()].cuda()[None]
    bias, da = torch.zeros_like(h[0]), torch.ones_like(h)
    ours, exact = results(h, bias, da, approximate), results(h.double().clamp(-1e6, 1e6), bias, da, approximate)
    near = h.abs() < 1e6
    assert (ours["out"] - exact["out"])[near].abs().le((2**-8 * exact["out"].abs() + 2e-7 * h.abs())[near]).all()
    assert (ours["dh"] - exact["dh"]).abs().le(2**-8 * exact["dh"].abs() + 1e-6).all()


@pytest.mark.gpu
@forms
@pytest.mark.parametrize("ffn", sorted({config.ffn for config in SIZES.values()}))
def test_a_hundred_runs_have_the_same_bits(ffn, approximate):
    arguments = *draw(2048, ffn, torch.bfloat16, "cuda"), approximate
    once = results(*arguments)
    for _ in range(99):
        again = results(*arguments)
        assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.large
@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    ffn = 8192
    rows = 2**31 // ffn + 64
    h, bias, da = draw(64, ffn, torch.bfloat16, "cuda")
    ours = results(h.repeat(rows // 64, 1), bias, da.repeat(rows // 64, 1), "tanh")
    short = results(h, bias, da, "tanh")
    for name in ("out", "dh"):
        assert torch.equal(ours[name][-64:], short[name]), name
