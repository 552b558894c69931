"""Matmul with a weight, by the fastest library on this machine.

torch calls cuBLAS on a GPU and, in half precision, oneDNN on a CPU. But for float32 on a CPU it calls MKL, which is 10
to 15% slower than oneDNN on AMD processors (`bench/README.md`). That is a tenth of the step of a small model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# torch.compile reaches oneDNN through this op. No public op passes ordinary float32 tensors to oneDNN.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def _onednn_runs(x: Tensor) -> bool:
    return _onednn is not None and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] > 0


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias for x [.., in], weight [out, in] and bias [out]: [.., out]. Not differentiable."""
    if _onednn_runs(x):
        return _onednn(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


# An op of our own, because torch.compile assumes that only torch.compile itself inserts calls of oneDNN's op.
@torch.library.custom_op("tripod::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return matmul(x, weight, bias)


@_linear.register_fake
def _(x, weight, bias):
    return x.new_empty(*x.shape[:-1], len(weight))


def _linear_setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _linear_gradients(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx = _linear(dy, weight.T, None) if ctx.needs_input_grad[0] else None
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])  # [tokens, in], [tokens, out]
    return dx, dy.T @ x, dy.sum(0) if ctx.needs_input_grad[2] else None


_linear.register_autograd(_linear_gradients, setup_context=_linear_setup_context)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in the dtype of x, [.., in] -> [.., out]; weight is [out, in] and bias [out]."""
    weight, bias = weight.to(x.dtype), bias if bias is None else bias.to(x.dtype)
    return (_linear if _onednn_runs(x) else F.linear)(x, weight, bias)
