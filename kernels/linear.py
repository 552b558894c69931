"""Matrix products with a weight, by the fastest library at hand.

torch leaves products to cuBLAS on a GPU and, in half precision, to oneDNN on a CPU. But products of float32 on a CPU go
to MKL, which is 10 to 15% slower than oneDNN on AMD processors (`bench/README.md`): a tenth of a small model's step.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# The op by which torch.compile reaches oneDNN; there is no public one that takes ordinary tensors of float32.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _by_onednn(x: Tensor) -> bool:
    return _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] > 0


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [.., in], weight [out, in] and bias [out]: [.., out]. Not differentiable."""
    if _by_onednn(x):
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# An op of our own around oneDNN's, because torch.compile takes for granted that the latter is its own doing.
@torch.library.custom_op("tripod::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = _linear(dy, weight.T, None) if ctx.needs_input_grad[0] else None
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # [tokens, in], [tokens, out]
    return dx, dy.T @ x, dy.sum(0) if ctx.needs_input_grad[2] else None


_linear.register_autograd(_backward, setup_context=_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x, [.., in] -> [.., out]; weight is [out, in] and bias [out]."""
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    return (_linear if _by_onednn(x) else F.linear)(x, weight, bias)
