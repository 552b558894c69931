"""Bias and GELU between the two projections of the MLP.

    gelu(h) = h * P(h)

where P(h) = P(Z <= h) for a standard normal Z, exactly ("none") or approximately ("tanh"):

    P(h) = (1 + erf(h / sqrt(2))) / 2                                 P'(h) = exp(-h^2 / 2) / sqrt(2 pi)       ("none")
    P(h) = (1 + tanh(z)) / 2,  z = sqrt(2 / pi) (h + 0.044715 h^3)    P'(h) = P(h) (1 - P(h)) 2z'             ("tanh")

Pythia was *trained* with the tanh form: every configuration sets `bias-gelu-fusion`, and GPT-NeoX implements it with
tanh. The published config.json says "gelu", which Hugging Face computes with erf. The two differ by at most 4.7e-4.

Backward, with da the gradient of gelu(h + bias),

    dh = da * (P(h + bias) + (h + bias) * P'(h + bias)),    d_bias = sum of dh over all rows

needs only h and bias, so the output can be dropped and computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import tl, triton, triton_runs

# ---- reference -------------------------------------------------------------------------------------------------------


def bias_gelu_reference(h: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(h + bias.to(h.dtype), approximate=approximate)


# ---- kernels ---------------------------------------------------------------------------------------------------------
# A program takes COLUMNS columns of some consecutive rows, one row after the other. A thread keeps its columns, so the
# bias is read once, and the sum for its gradient needs no exchange between threads.


@triton.jit
def _normal(h, TANH: tl.constexpr):
    """P(h) and P'(h)."""
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)). With a = exp(-|2z|) nothing overflows, and the tails lose no digits.
        # Beyond |h| = 16, a is 0 and P is 0 or 1. The clamp keeps h^2 finite.
        h = tl.clamp(h, -16.0, 16.0)
        a = tl.exp2(-tl.abs(h * (2.302208198 + 0.1029432397 * h * h)))  # log2(e) * 2 * sqrt(2 / pi) * (1, 0.044715)
        p = 1 / (1 + a)
        return tl.where(h < 0, a * p, p), a * p * p * (1.5957691216 + 0.2140644488 * h * h)  # 2z'
    else:
        probability = 0.5 + 0.5 * tl.math.erf(0.7071067811865476 * h)
        return probability, 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)  # log2(e) / 2


@triton.jit
def gelu_forward_kernel(
    h_ptr, bias_ptr, out_ptr, rows, rows_per_program, FFN: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr
):
    """out = gelu(h + bias).

    h_ptr     [rows, FFN]
    bias_ptr  [FFN]
    out_ptr   [rows, FFN], output
    """
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < FFN
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program  # int64: h may have more than 2^31 elements
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows)):
        offsets = row * FFN + columns
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias
        probability, _ = _normal(h, TANH)
        tl.store(out_ptr + offsets, (h * probability).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gelu_backward_kernel(
    da_ptr, h_ptr, bias_ptr, dh_ptr, d_bias_ptr, rows, rows_per_program,
    FFN: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr,
):  # fmt: skip
    """dh, and for every program the sum of dh over its rows, in their order.

    da_ptr      [rows, FFN], gradient of the output
    h_ptr       [rows, FFN]
    bias_ptr    [FFN]
    dh_ptr      [rows, FFN], output
    d_bias_ptr  [programs, FFN] float32, output: partial sums of the gradient of the bias
    """
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = columns < FFN
    bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    d_bias = tl.zeros([COLUMNS], tl.float32)
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows)):
        offsets = row * FFN + columns
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias
        da = tl.load(da_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        probability, density = _normal(h, TANH)
        dh = da * (probability + h * density)
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        d_bias += dh
    tl.store(d_bias_ptr + program * FFN + columns, d_bias, mask=mask)


# ---- op --------------------------------------------------------------------------------------------------------------

ROWS = 64  # of a program: enough programs to fill a GPU, and few partial sums


def _launch(h: Tensor, approximate: str) -> tuple[tuple[int, int], dict]:
    """The grid and the constants of a launch. A thread takes eight columns, 16 bytes of bfloat16."""
    ffn = h.shape[-1]
    columns = min(triton.next_power_of_2(ffn), 1024)
    grid = triton.cdiv(h.numel() // ffn, ROWS), triton.cdiv(ffn, columns)
    return grid, {"FFN": ffn, "COLUMNS": columns, "TANH": approximate == "tanh", "num_warps": max(columns // 256, 1)}


@torch.library.custom_op("tripod::bias_gelu", mutates_args=())
def _bias_gelu(h: Tensor, bias: Tensor, approximate: str) -> Tensor:
    out = torch.empty_like(h)
    grid, launch = _launch(h, approximate)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        gelu_forward_kernel[grid](h, bias, out, h.numel() // len(bias), ROWS, **launch)
    return out


@torch.library.custom_op("tripod::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(da: Tensor, h: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of h and bias."""
    grid, launch = _launch(h, approximate)
    da = da.contiguous()  # autograd may pass an expanded gradient, with strides of 0
    dh, d_bias = torch.empty_like(h), h.new_empty(grid[0], len(bias), dtype=torch.float32)
    with torch.cuda.device_of(h):
        gelu_backward_kernel[grid](da, h, bias, dh, d_bias, h.numel() // len(bias), ROWS, **launch)
    return dh, d_bias.sum(0).to(bias.dtype)


def _bias_gelu_setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    h, bias, ctx.approximate = inputs
    ctx.save_for_backward(h, bias)


def _bias_gelu_gradients(ctx, da: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_bias_gelu_backward(da, *ctx.saved_tensors, ctx.approximate), None


_bias_gelu.register_fake(lambda h, bias, approximate: torch.empty_like(h))
_bias_gelu_backward.register_fake(lambda da, h, bias, approximate: (torch.empty_like(h), torch.empty_like(bias)))
_bias_gelu.register_autograd(_bias_gelu_gradients, setup_context=_bias_gelu_setup_context)


def bias_gelu(h: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(h + bias) for h [.., ffn] and bias [ffn], in the shape and dtype of h; approximate is "tanh" or "none".

    The dtype of the bias may differ from that of h. Raises ValueError if an argument does not fit.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", not {approximate!r}')
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"bias must be [{h.shape[-1]}] like the last dimension of h, not {list(bias.shape)}")
    if not bias.dtype.is_floating_point:
        raise ValueError(f"bias must have a floating-point dtype, not {bias.dtype}")
    if bias.device != h.device:
        raise ValueError(f"bias must be on {h.device} like h, not on {bias.device}")
    if not h.is_contiguous() or not bias.is_contiguous():
        raise ValueError(f"h and bias must be contiguous, but their strides are {h.stride()} and {bias.stride()}")
    return _bias_gelu(h, bias, approximate) if triton_runs(h) else bias_gelu_reference(h, bias, approximate)
