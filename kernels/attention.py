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
    """Rotate the first columns of x [..., seq, heads, head_dim] by the angles of cos, sin [seq, rotary_dim / 2].

    The arithmetic is done in the precision of the tables (float32 for half-precision x) and rounded once.
    """
    half = cos.shape[-1]
    cos, sin = cos[:, None], sin[:, None]  # [seq, 1, half]: the same for every head
    first, second, rest = x.split((half, half, x.shape[-1] - 2 * half), dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((rotated.to(x.dtype), rest), dim=-1)


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
    q, k, v = qkv.unbind(3)  # [batch, seq, heads, head_dim] each
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    # torch wants [batch, heads, seq, head_dim]; transposed views cost nothing.
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return out.transpose(1, 2)
