"""Bias and GELU between the two projections of the MLP.

    gelu(h) = h * P(h)

where P(h) = P(Z <= h) for a standard normal Z, exactly or nearly:

    P(h) = (1 + erf(h / sqrt(2))) / 2                                 P'(h) = exp(-h^2 / 2) / sqrt(2 pi)       ("none")
    P(h) = (1 + tanh(z)) / 2,  z = sqrt(2 / pi) (h + 0.044715 h^3)    P'(h) = P(h) (1 - P(h)) 2z'             ("tanh")

Pythia was *trained* with the tanh form (every configuration sets `bias-gelu-fusion`, whose code is tanh) while the
published config.json says "gelu", which Hugging Face evaluates by erf. The two differ by at most 4.7e-4 in a point.

Backward, with da the gradient of gelu(h + bias),

    dh = da * (P(h + bias) + (h + bias) * P'(h + bias)),    dbias = sum of dh over all rows

needs h and bias only: gelu(h + bias) itself may be dropped and computed again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import tl, triton, triton_runs

# ---------------------------------------------------------------------------------------------- the definition


def define(h: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(h + bias.to(h.dtype), approximate=approximate)


# ---------------------------------------------------------------------------------------------- the kernels
# A program takes a few columns of some consecutive rows, one after the other. A thread so keeps its columns: the bias
# is read once, and the sum of its gradient needs no exchange with other threads.


@triton.jit
def _normal(h, TANH: tl.constexpr):
    """P(h) and P'(h)."""
    if TANH:
        # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z)). With a = exp(-|2z|), nothing overflows, and nothing cancels in the
        # tails. Beyond 16, a is 0 and P is 0 or 1; only h^2 would still grow.
        h = tl.clamp(h, -16.0, 16.0)
        a = tl.exp2(-tl.abs(h * (2.302208198 + 0.1029432397 * h * h)))  # log2(e) * 2 * sqrt(2 / pi) * (1, 0.044715)
        p = 1 / (1 + a)
        return tl.where(h < 0, a * p, p), a * p * p * (1.5957691216 + 0.2140644488 * h * h)  # 2z'
    else:
        probability = 0.5 + 0.5 * tl.math.erf(0.7071067811865476 * h)
        return probability, 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)  # log2(e) / 2


@triton.jit
def _forward(h, bias, out, rows, rows_per_program, FFN: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr):
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < FFN
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * rows_per_program  # int64: a row may start past 2^31 numbers
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows)):
        at = row * FFN + columns
        row_h = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        probability, _ = _normal(row_h, TANH)
        tl.store(out + at, (row_h * probability).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    da, h, bias, dh, d_bias, rows, rows_per_program, FFN: tl.constexpr, COLUMNS: tl.constexpr, TANH: tl.constexpr
):
    """d_bias [programs, ffn] gets the sum over the rows of each program, in their order."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < FFN
    b = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    program = tl.program_id(0).to(tl.int64)
    first = program * rows_per_program
    total = tl.zeros([COLUMNS], tl.float32)
    for row in tl.range(first, tl.minimum(first + rows_per_program, rows)):
        at = row * FFN + columns
        row_h = tl.load(h + at, mask=inside, other=0.0).to(tl.float32) + b
        row_da = tl.load(da + at, mask=inside, other=0.0).to(tl.float32)
        probability, density = _normal(row_h, TANH)
        row_dh = row_da * (probability + row_h * density)
        tl.store(dh + at, row_dh.to(dh.dtype.element_ty), mask=inside)
        total += row_dh
    tl.store(d_bias + program * FFN + columns, total, mask=inside)


# ---------------------------------------------------------------------------------------------- the op

ROWS = 64  # of a program: enough of them to fill a GPU, and few partial sums


def _launch(h: Tensor, approximate: str) -> tuple[tuple[int, int], dict]:
    """The grid, and the rest: eight columns, or 16 bytes of bfloat16, a thread."""
    ffn = h.shape[-1]
    columns = min(triton.next_power_of_2(ffn), 1024)
    grid = triton.cdiv(h.numel() // ffn, ROWS), triton.cdiv(ffn, columns)
    return grid, {"FFN": ffn, "COLUMNS": columns, "TANH": approximate == "tanh", "num_warps": max(columns // 256, 1)}


@torch.library.custom_op("tripod::bias_gelu", mutates_args=())
def _bias_gelu(h: Tensor, bias: Tensor, approximate: str) -> Tensor:
    out = torch.empty_like(h)
    grid, launch = _launch(h, approximate)
    with torch.cuda.device_of(h):  # Triton launches on the current device
        _forward[grid](h, bias, out, h.numel() // len(bias), ROWS, **launch)
    return out


@_bias_gelu.register_fake
def _(h, bias, approximate):
    return torch.empty_like(h)


@torch.library.custom_op("tripod::bias_gelu_backward", mutates_args=())
def _bias_gelu_backward(da: Tensor, h: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, Tensor]:
    """The gradients of h and bias."""
    grid, launch = _launch(h, approximate)
    dh, d_bias = torch.empty_like(h), h.new_empty(grid[0], len(bias), dtype=torch.float32)
    with torch.cuda.device_of(h):
        # A gradient may come expanded, with strides of 0.
        _backward[grid](da.contiguous(), h, bias, dh, d_bias, h.numel() // len(bias), ROWS, **launch)
    return dh, d_bias.sum(0).to(bias.dtype)


@_bias_gelu_backward.register_fake
def _(da, h, bias, approximate):
    return torch.empty_like(h), torch.empty_like(bias)


def _setup_context(ctx, inputs: tuple, output: Tensor) -> None:
    h, bias, ctx.approximate = inputs
    ctx.save_for_backward(h, bias)


def _gradients(ctx, da: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_bias_gelu_backward(da, *ctx.saved_tensors, ctx.approximate), None


_bias_gelu.register_autograd(_gradients, setup_context=_setup_context)


def bias_gelu(h: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(h + bias) for h [.., ffn] and bias [ffn]; approximate is "tanh" or "none". Same shape and dtype as h.

    The bias may be of another dtype than h. Raises ValueError when something does not fit.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f'approximate must be "tanh" or "none", not {approximate!r}')
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"bias must be [{h.shape[-1]}] like the last dimension of h, not {list(bias.shape)}")
    if not bias.dtype.is_floating_point:
        raise ValueError(f"bias must be of a floating-point dtype, not {bias.dtype}")
    if bias.device != h.device:
        raise ValueError(f"bias must be on {h.device} like h, not on {bias.device}")
    if not h.is_contiguous() or not bias.is_contiguous():
        raise ValueError(f"h and bias must be contiguous: their strides are {h.stride()} and {bias.stride()}")
    return _bias_gelu(h, bias, approximate) if triton_runs(h) else define(h, bias, approximate)
