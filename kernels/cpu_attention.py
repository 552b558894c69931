"""Attention of short sequences on a CPU, where torch's own kernel takes half as long again.

The mathematics is that of kernels/attention.py, but forward keeps the probabilities p = softmax(scores) for backward.
For this memory a sequence is short: at most SHORT_SEQ positions. With dp = d_out v^T, backward is

    ds = p (dp - rowsum(p dp))      dq = ds k      dk = ds^T q      dv = p^T d_out

Queries are taken in blocks. A block of queries meets only the keys up to the last position of the block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.rotary import rotate, rotate_qkv_backward

SHORT_SEQ = 512  # positions


def short_attention_runs(qkv: Tensor) -> bool:
    """True if this op is for qkv [batch, seq, heads, 3, head_dim]: short, on a CPU, and not float64."""
    return qkv.device.type == "cpu" and qkv.dtype != torch.float64 and qkv.shape[1] <= SHORT_SEQ


def short_attention(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal attention of rotated queries and keys, [batch, seq, heads, head_dim]."""
    return _short_attention(qkv, cos, sin, documents)[0]


@torch.library.custom_op("tripod::short_attention", mutates_args=())
def _short_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out [batch, seq, heads, head_dim], and what backward needs.

    These are rotated queries, rotated keys and values in one tensor [3, batch * heads, seq, head_dim], and the
    probabilities of all blocks, one block after the other. Scores are float32 in half precision too, because scores
    cast to half precision before the softmax give wrong probabilities.
    """
    batch, seq, heads, _, head_dim = qkv.shape
    parts = qkv.permute(3, 0, 2, 1, 4)  # [3, batch, heads, seq, head_dim]
    q, k = rotate(parts[:2].float(), cos, sin).view(2, batch * heads, seq, head_dim)
    q *= head_dim**-0.5
    rotated = qkv.new_empty(3, *q.shape)
    for x, part in zip(rotated, (q, k, parts[2].reshape(q.shape))):
        x.copy_(part)
    v, future = rotated[2], q.new_full((_block(qkv.dtype),) * 2, -torch.inf).triu(1)
    out, probabilities = torch.empty_like(v), qkv.new_empty(batch * heads * _pairs(seq, qkv.dtype))
    for rows, p in _blocks(probabilities, batch * heads, seq):
        scores = p if p.dtype == torch.float32 else torch.empty_like(p, dtype=torch.float32)
        torch.bmm(q[:, rows], k[:, : rows.stop].mT, out=scores)  # [batch * heads, block, keys]
        scores[:, :, rows] += future[: p.shape[1], : p.shape[1]]
        if documents is not None:
            other = torch.arange(rows.stop) < documents[0, :, None, rows, None]  # [batch, 1, block, keys]
            scores.view(batch, heads, *p.shape[1:]).masked_fill_(other, -torch.inf)
        torch.softmax(scores, dim=-1, out=scores)
        p.copy_(scores)
        out[:, rows] = p @ v[:, : rows.stop]
    return out.view(batch, heads, seq, head_dim).transpose(1, 2).contiguous(), rotated, probabilities


def _block(dtype: torch.dtype) -> int:
    """Queries in a block: few, so that few scores above the diagonal are computed, but enough for a fast matmul."""
    return 64 if dtype == torch.float32 else 128


def _blocks(probabilities: Tensor, rows: int, seq: int) -> Iterator[tuple[slice, Tensor]]:
    """For every block the slice of its queries, and its probabilities [rows, block, keys]; rows = batch * heads."""
    offset, block = 0, _block(probabilities.dtype)
    for start in range(0, seq, block):
        stop = min(start + block, seq)
        shape = rows, stop - start, stop
        yield slice(start, stop), probabilities[offset : offset + math.prod(shape)].view(shape)
        offset += math.prod(shape)


def _pairs(seq: int, dtype: torch.dtype) -> int:
    """Number of (query, key) pairs in all blocks of one head of one sequence."""
    block = _block(dtype)
    return sum((min(start + block, seq) - start) * min(start + block, seq) for start in range(0, seq, block))


@_short_attention.register_fake
def _(qkv, cos, sin, documents=None):
    batch, seq, heads, _, head_dim = qkv.shape
    rotated, probabilities = (3, batch * heads, seq, head_dim), batch * heads * _pairs(seq, qkv.dtype)
    return qkv.new_empty(batch, seq, heads, head_dim), qkv.new_empty(rotated), qkv.new_empty(probabilities)


@torch.library.custom_op("tripod::short_attention_backward", mutates_args=())
def _short_attention_backward(
    d_out: Tensor, rotated: Tensor, probabilities: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Gradient of qkv [batch, seq, heads, 3, head_dim]."""
    (q, k, v), (batch, seq, heads, head_dim) = rotated, d_out.shape
    d_out = d_out.transpose(1, 2).reshape(v.shape)
    dq, dk, dv = gradients = torch.zeros_like(rotated, dtype=torch.float32)
    for rows, p in _blocks(probabilities, batch * heads, seq):
        keys, d_rows = slice(rows.stop), d_out[:, rows]
        ds = torch._softmax_backward_data(d_rows @ v[:, keys].mT, p, -1, p.dtype)
        dq[:, rows] = ds @ k[:, keys]
        dk[:, keys] += ds.mT @ q[:, rows]
        dv[:, keys] += p.mT @ d_rows
    dq *= head_dim**-0.5
    return rotate_qkv_backward(*gradients.view(3, batch, heads, seq, head_dim), cos, sin).to(d_out.dtype)


@_short_attention_backward.register_fake
def _(d_out, rotated, probabilities, cos, sin):
    batch, seq, heads, head_dim = d_out.shape
    return d_out.new_empty(batch, seq, heads, 3, head_dim)


_short_attention.register_autograd(
    lambda ctx, d_out, *_: (_short_attention_backward(d_out, *ctx.saved_tensors), None, None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:], *inputs[1:3]),
)
