"""kernels.linear against float64. For float32 on a CPU it calls oneDNN instead of MKL."""

import pytest
import torch
import torch.nn.functional as F

from kernels.linear import _linear, linear, matmul

DTYPES = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float64: 1e-14}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values.to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 33, 40), (1, 1, 40), (40,), (0, 40)])
def test_linear_and_its_gradients(dtype, biased, shape):
    arguments = [draw(*shape, dtype=dtype, seed=1), draw(24, 40, dtype=dtype, seed=2)]
    arguments += [draw(24, dtype=dtype, seed=3)] * biased
    exact = [argument.detach().double().requires_grad_() for argument in arguments]
    out, truth = linear(*arguments), F.linear(*exact)
    assert out.dtype == dtype
    d_out = draw(*out.shape, dtype=dtype, seed=4).detach()
    gradients = torch.autograd.grad(out, arguments, d_out)
    true_gradients = torch.autograd.grad(truth, exact, d_out.double())
    for ours, theirs in zip((out, *gradients), (truth, *true_gradients)):
        scale = theirs.abs().max().item() if theirs.numel() else 1
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=DTYPES[dtype] * scale)


def test_weights_of_another_dtype_get_gradients_in_theirs():
    x, weight, bias = draw(5, 8, dtype=torch.bfloat16), draw(3, 8), draw(3)
    out = linear(x, weight, bias)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_transposed_weights_and_expanded_gradients():
    x, weight = draw(9, 16), draw(16, 12).detach().T
    torch.testing.assert_close(matmul(x, weight), x @ weight.T)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(9, 16))


def test_only_wanted_gradients_are_computed():
    x, weight = draw(4, 6).detach(), draw(5, 6)
    linear(x, weight).sum().backward()
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 6))


@pytest.mark.parametrize("biased", [True, False])
def test_op(biased):
    torch.library.opcheck(_linear, (draw(2, 5, 8), draw(3, 8), draw(3) if biased else None))


def test_compiled():
    x, weight, bias = draw(4, 6), draw(5, 6), draw(5)
    compiled = torch.compile(linear, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), linear(x, weight, bias))
