"""Rotary embedding and causal attention, straight from the fused QKV projection.

One head of one sequence has queries, keys and values q, k, v of shape [seq, head_dim]. The first `rotary_dim` of the
head_dim columns of q and k are rotated by an angle that grows with the position p (RoFormer, arXiv:2104.09864), in
the half-split pairing of GPT-NeoX: with h = rotary_dim / 2, column i < h is the partner of column i + h, and

    angle[p, i] = p * base^(-i / h)
    q'[p, i]     = q[p, i]     cos(angle[p, i]) - q[p, i + h] sin(angle[p, i])
    q'[p, i + h] = q[p, i + h] cos(angle[p, i]) + q[p, i]     sin(angle[p, i])

so that the score of a query and a key depends on the distance of their positions only. Then

    scores[p, s] = q'[p] . k'[s] / sqrt(head_dim)    for s <= p, else -inf
    out[p]       = sum over s of softmax(scores[p])[s] v[s]

A rotation is orthogonal: its backward is the rotation by the opposite angle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotary_tables(
    seq_len: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [seq_len, rotary_dim / 2] each.

    The angles are formed in float64. Half-precision angles, as in GPT-NeoX v1.0, are wrong by up to 0.8 in the cosine
    (fixed there in September 2023, #1041): that fault is not reproduced.
    """
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """A copy of x [.., seq, head_dim] with its first columns rotated by the angles of cos, sin [seq, rotary_dim / 2].

    The arithmetic is done in the precision of the tables (float32 for half-precision x) and rounded once.
    """
    out, half = torch.empty_like(x, memory_format=torch.contiguous_format), cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    out[..., :half] = first * cos - second * sin
    out[..., half : 2 * half] = second * cos + first * sin
    out[..., 2 * half :] = x[..., 2 * half :]
    return out


class _RotatedHeads(torch.autograd.Function):
    """qkv [batch, seq, heads, 3, head_dim] -> rotated queries and keys, and values, [batch, heads, seq, head_dim] each.

    By hand, because autograd would fill the gradient of qkv in a dozen passes.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)
        return rotate(q, cos, sin), rotate(k, cos, sin), v.contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        batch, heads, seq, head_dim = dq.shape
        d_qkv = dq.new_empty(batch, seq, heads, 3, head_dim)
        for gradient, part in zip(d_qkv.permute(3, 0, 2, 1, 4), (rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv)):
            gradient.copy_(part)
        return d_qkv, None, None


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of rotated queries and keys.

    qkv [batch, seq, heads, 3, head_dim] is the output of the fused projection, cos and sin are [seq, rotary_dim / 2].
    Returns [batch, seq, heads, head_dim] in the dtype of qkv. Raises ValueError when the shapes do not fit.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [batch, seq, heads, 3, head_dim], not {list(qkv.shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != qkv.shape[1] or 2 * cos.shape[1] > qkv.shape[4]:
        raise ValueError(
            f"cos and sin must be [seq, rotary_dim / 2] with seq = {qkv.shape[1]} and rotary_dim <= {qkv.shape[4]}, "
            f"not {list(cos.shape)} and {list(sin.shape)}"
        )
    out = F.scaled_dot_product_attention(*_RotatedHeads.apply(qkv, cos, sin), is_causal=True)
    return out.transpose(1, 2)
