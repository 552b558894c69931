"""Partial rotary embedding (RoFormer, arXiv:2104.09864) of queries and keys.

The first rotary_dim of the head_dim columns of a query or a key x [seq, head_dim] are rotated by an angle that grows
with the position p. In the half-split pairing of GPT-NeoX, with half = rotary_dim / 2, column i < half is paired with
column i + half:

    angle[p, i]     = p * base^(-i / half)
    x'[p, i]        = x[p, i]        cos(angle[p, i]) - x[p, i + half] sin(angle[p, i])
    x'[p, i + half] = x[p, i + half] cos(angle[p, i]) + x[p, i]        sin(angle[p, i])

The score of a rotated query and a rotated key then depends only on the distance of their positions. A rotation is
orthogonal, so its backward is the rotation by the opposite angle: the same formulas with -sin.
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton

# ---- reference -------------------------------------------------------------------------------------------------------


def rotary_tables(
    seq_len: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [seq_len, rotary_dim / 2] each, computed in float64.

    GPT-NeoX v1.0 computes the angles in half precision, so its cosines are wrong by up to 0.8 (fixed there in September
    2023, #1041). This fault is not reproduced.
    """
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequencies)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A rotated copy of x [.., seq, head_dim]; cos and sin are [seq, rotary_dim / 2].

    Half-precision x is multiplied in the float32 of the tables, and each result is cast once.
    """
    out, half = torch.empty_like(x, memory_format=torch.contiguous_format), cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


class RotateQKV(torch.autograd.Function):
    """qkv [batch, seq, heads, 3, head_dim] -> rotated q, rotated k, and v, [batch, heads, seq, head_dim] each.

    The backward is written by hand because autograd would write the gradient of qkv in about twelve passes.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        return rotate_qkv_backward(dq, dk, dv, *ctx.saved_tensors), None, None


def rotate_qkv_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of qkv [batch, seq, heads, 3, head_dim] from those of rotated q, rotated k, and v."""
    batch, heads, seq, head_dim = dq.shape
    d_qkv = dq.new_empty(batch, seq, heads, 3, head_dim)
    for gradient, part in zip(d_qkv.permute(3, 0, 2, 1, 4), (rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv)):
        gradient.copy_(part)
    return d_qkv


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def rotate_kernel(
    qkv_ptr, cos_ptr, sin_ptr, direction, rows, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate queries and keys in place. A program takes BLOCK rows; a row is one query or key of one head.

    qkv_ptr           [batch, seq, HEADS, 3, HEAD_DIM], overwritten; rows = batch * seq * HEADS * 2
    cos_ptr, sin_ptr  [seq, HALF] float32
    direction         1.0, or -1.0 to rotate by the opposite angles
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = row // (2 * HEADS) % seq
    first_ptr = qkv_ptr + (row // 2 * 3 + row % 2).to(tl.int64)[:, None] * HEAD_DIM
    second_ptr = first_ptr + HALF

    pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = (row < rows)[:, None] & (pair < HALF)
    c = tl.load(cos_ptr + position[:, None] * HALF + pair, mask)
    s = tl.load(sin_ptr + position[:, None] * HALF + pair, mask) * direction
    first = tl.load(first_ptr + pair, mask).to(tl.float32)
    second = tl.load(second_ptr + pair, mask).to(tl.float32)
    tl.store(first_ptr + pair, (first * c - second * s).to(qkv_ptr.dtype.element_ty), mask)
    tl.store(second_ptr + pair, (second * c + first * s).to(qkv_ptr.dtype.element_ty), mask)


# ---- op --------------------------------------------------------------------------------------------------------------

ROTATE_PAIRS = 1024  # of a program: a thread loads up to eight numbers at a time, 16 bytes


def rotate_block(half: int) -> int:
    """Rows of a program."""
    return ROTATE_PAIRS // triton.next_power_of_2(half)


def rotate_in_place(qkv: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> None:
    """Launch the kernel on contiguous qkv [batch, seq, heads, 3, head_dim]. It is a part of the ops of attention.py."""
    batch, seq, heads, _, head_dim = qkv.shape
    rows, half = batch * seq * heads * 2, cos.shape[1]
    block = rotate_block(half)
    rotate_kernel[(triton.cdiv(rows, block),)](
        qkv, cos, sin, direction, rows, seq, HEADS=heads, HEAD_DIM=head_dim, HALF=half, BLOCK=block
    )
