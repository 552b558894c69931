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

Backward, with weights[p] = softmax(scores[p]) made again from the log-sum-exp of scores[p], which forward keeps,

    d_v[s]    = sum over p of weights[p, s] d_out[p]
    delta[p]  = sum over s of weights[p, s] (d_out[p] . v[s]) = d_out[p] . out[p]
    d_scores[p, s] = weights[p, s] (d_out[p] . v[s] - delta[p])
    d_q'[p]   = sum over s of d_scores[p, s] k'[s] / sqrt(head_dim)
    d_k'[s]   = sum over p of d_scores[p, s] q'[p] / sqrt(head_dim)
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.backend import TensorDescriptor, tl, triton, triton_runs


def rotary_tables(
    seq_len: int, rotary_dim: int, base: float, dtype: torch.dtype, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle, [seq_len, rotary_dim / 2] each.

    The angles are formed in float64. Half-precision angles, as in GPT-NeoX v1.0, are wrong by up to 0.8 in the cosine
    (fixed there in September 2023, #1041): that fault is not reproduced.
    """
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu") / rotary_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64, device="cpu"), frequencies)
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
        return _fused_gradient(dq, dk, dv, *ctx.saved_tensors), None, None


def _fused_gradient(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv [batch, seq, heads, 3, head_dim], from those of rotated queries and keys, and of values,
    [batch, heads, seq, head_dim] each."""
    batch, heads, seq, head_dim = dq.shape
    d_qkv = dq.new_empty(batch, seq, heads, 3, head_dim)
    for gradient, part in zip(d_qkv.permute(3, 0, 2, 1, 4), (rotate(dq, cos, -sin), rotate(dk, cos, -sin), dv)):
        gradient.copy_(part)
    return d_qkv


SHORT = 512  # positions: up to this length attention on a CPU may keep its probabilities


def _block(dtype: torch.dtype) -> int:
    """Queries at a time: few, so that little is computed above the diagonal, but enough for the library's products."""
    return 64 if dtype == torch.float32 else 128


@torch.library.custom_op("tripod::short_attention", mutates_args=())
def _short_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The attention of short rows on a CPU, where torch's own kernel takes half as long again.

    A block of queries meets the keys up to its own last one. Scores are formed in float32, also in half precision: they
    must not be rounded before the softmax. Returned are also what backward needs: rotated queries and keys, and values,
    [3, batch heads, seq, head_dim]; and the probabilities of all blocks, one after the other.
    """
    batch, seq, heads, _, head_dim = qkv.shape
    parts = qkv.permute(3, 0, 2, 1, 4)  # [3, batch, heads, seq, head_dim]
    q, k = rotate(parts[:2].float(), cos, sin).view(2, batch * heads, seq, head_dim)
    q *= head_dim**-0.5
    rotated = qkv.new_empty(3, *q.shape)
    for x, part in zip(rotated, (q, k, parts[2].reshape(q.shape))):
        x.copy_(part)
    v, later = rotated[2], q.new_full((_block(qkv.dtype),) * 2, -torch.inf).triu(1)
    out, probabilities = torch.empty_like(v), qkv.new_empty(batch * heads * _pairs(seq, qkv.dtype))
    for rows, p in _blocks(probabilities, batch * heads, seq):
        scores = p if p.dtype == torch.float32 else torch.empty_like(p, dtype=torch.float32)
        torch.bmm(q[:, rows], k[:, : rows.stop].mT, out=scores)  # [batch heads, block, keys]
        scores[:, :, rows] += later[: p.shape[1], : p.shape[1]]
        torch.softmax(scores, dim=-1, out=scores)
        p.copy_(scores)
        out[:, rows] = p @ v[:, : rows.stop]
    return out.view(batch, heads, seq, head_dim).transpose(1, 2).contiguous(), rotated, probabilities


def _blocks(probabilities: Tensor, rows: int, seq: int) -> Iterator[tuple[slice, Tensor]]:
    """The queries of every block, and its probabilities [rows, block, keys]."""
    offset, block = 0, _block(probabilities.dtype)
    for start in range(0, seq, block):
        stop = min(start + block, seq)
        shape = rows, stop - start, stop
        yield slice(start, stop), probabilities[offset : offset + math.prod(shape)].view(shape)
        offset += math.prod(shape)


def _pairs(seq: int, dtype: torch.dtype) -> int:
    """How many pairs of a query and a key all blocks of one row have."""
    block = _block(dtype)
    return sum((min(start + block, seq) - start) * min(start + block, seq) for start in range(0, seq, block))


@_short_attention.register_fake
def _(qkv, cos, sin):
    batch, seq, heads, _, head_dim = qkv.shape
    rotated, probabilities = (3, batch * heads, seq, head_dim), batch * heads * _pairs(seq, qkv.dtype)
    return qkv.new_empty(batch, seq, heads, head_dim), qkv.new_empty(rotated), qkv.new_empty(probabilities)


@torch.library.custom_op("tripod::short_attention_backward", mutates_args=())
def _short_attention_backward(
    d_out: Tensor, rotated: Tensor, probabilities: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """With dp = d_out v^T:  ds = p (dp - rowsum(p dp)), and so  dq = ds k, dk = ds^T q, dv = p^T d_out."""
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
    return _fused_gradient(*gradients.view(3, batch, heads, seq, head_dim), cos, sin).to(d_out.dtype)


@_short_attention_backward.register_fake
def _(d_out, rotated, probabilities, cos, sin):
    batch, seq, heads, head_dim = d_out.shape
    return d_out.new_empty(batch, seq, heads, 3, head_dim)


_short_attention.register_autograd(
    lambda ctx, d_out, *_: (_short_attention_backward(d_out, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*output[1:], *inputs[1:]),
)


# ---------------------------------------------------------------------------------------------- the kernels
#
# A tile is a block of positions of one head, [BLOCK, head_dim]. It is held as a tuple of column chunks, mostly of one.
# Tensor cores take powers of two, and to pad the 80 columns of Pythia 2.8b to 128 would cost 1.6 times the work: its
# tiles are (64, 16). And to rotate a gradient takes as many registers again, for which 256 columns leave no room: those
# are (128, 128), and only the first chunk is rotated.
#
# Tiles are read and written through descriptors of tensors [batch, seq, columns], in which head and q, k, v are column
# offsets: v comes from the fused tensor and the gradient goes there without a copy. Beyond the end of a sequence a
# descriptor reads zeros and writes nothing. From compute capability 9.0 on the host makes it, and one instruction (TMA)
# moves a tile. Before, the kernel makes it, from a pointer and strides that the compiler knows, and it becomes ordinary
# masked loads (cp.async) and stores.
#
# Every program owns the tile it writes: no atomics, one order of summation, the same bits in every run.

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chunks(x, tail, batch, seq, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The descriptors of tiles of ROWS rows of x [batch, seq, WIDTH], one for each column chunk.

    x and tail are descriptors, or pointers to the first columns of their chunks; no tail: one chunk.
    """
    if isinstance(x, tl.tensor_descriptor):
        chunks = (x,) if tail is None else (x, tail)
    else:
        MAIN: tl.constexpr = HEAD_DIM if tail is None else triton.next_power_of_2(HEAD_DIM) // 2
        origin = batch.to(tl.int64) * seq * WIDTH
        x = tl.make_tensor_descriptor(x + origin, [seq, WIDTH], [WIDTH, 1], [ROWS, MAIN])
        if tail is None:
            chunks = (x,)
        else:
            tail = tl.make_tensor_descriptor(tail + origin, [seq, WIDTH], [WIDTH, 1], [ROWS, HEAD_DIM - MAIN])
            chunks = (x, tail)
    return chunks


@triton.jit
def _load(chunks, batch, row, column):
    """The tile whose first number is at [batch, row, column]."""
    if len(chunks[0].block_shape) == 2:
        return [x.load([row, column]) for x in chunks]
    else:
        return [x.load([batch, row, column]).reshape(x.block_shape[1], x.block_shape[2]) for x in chunks]


@triton.jit
def _store(chunks, batch, row, column, tile):
    for i in tl.static_range(len(chunks)):
        x = tile[i].to(chunks[i].dtype)
        if len(chunks[i].block_shape) == 2:
            chunks[i].store([row, column], x)
        else:
            chunks[i].store([batch, row, column], x.reshape(chunks[i].block_shape))


@triton.jit
def _products(a, b):
    """a b^T: every row of the tile a with every row of the tile b. [rows of a, rows of b]"""
    total = tl.dot(a[0], b[0].T, input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], b[i].T, total, input_precision="ieee")
    return total


@triton.jit
def _accumulate(tile, weights, x):
    """tile + weights x, where weights [rows of tile, rows of x] are rounded to the dtype of x."""
    total = ()
    for i in tl.static_range(len(x)):
        total += (tl.dot(weights.to(x[i].dtype), x[i], tile[i], input_precision="ieee"),)
    return total


@triton.jit
def _rotate_kernel(
    qkv, cos, sin, rotated, rows, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotated queries and keys. A row is the query or the key of one head at one position."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    position = row // (2 * HEADS) % seq
    source = qkv + (row // 2 * 3 + row % 2).to(tl.int64)[:, None] * HEAD_DIM
    target = rotated + row.to(tl.int64)[:, None] * HEAD_DIM

    pair = tl.arange(0, triton.next_power_of_2(HALF))[None, :]
    mask = (row < rows)[:, None] & (pair < HALF)
    c = tl.load(cos + position[:, None] * HALF + pair, mask)
    s = tl.load(sin + position[:, None] * HALF + pair, mask)
    first = tl.load(source + pair, mask).to(tl.float32)
    second = tl.load(source + HALF + pair, mask).to(tl.float32)
    tl.store(target + pair, first * c - second * s, mask)
    tl.store(target + HALF + pair, second * c + first * s, mask)

    rest = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    mask = (row < rows)[:, None] & (rest >= 2 * HALF) & (rest < HEAD_DIM)
    tl.store(target + rest, tl.load(source + rest, mask), mask)


@triton.jit
def _store_rotated_back(chunks, batch, row, column, tile, cos, sin, seq, HALF: tl.constexpr):
    """Store the tile rotated by the opposite angles. The columns that rotate are in its first chunk."""
    if len(chunks) == 2:
        _store((chunks[1],), batch, row, column, (tile[1],))  # now, so that its registers are free for the rotation
    x = tile[0]
    positions, columns = row + tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    partners = tl.where(columns < HALF, columns + HALF, tl.where(columns < 2 * HALF, columns - HALF, columns))
    y = tl.gather(x, tl.broadcast_to(partners[None, :], x.shape), 1)
    angles = positions[:, None] * HALF + (columns % HALF)[None, :]
    mask = (positions < seq)[:, None] & (columns < 2 * HALF)[None, :]
    c = tl.load(cos + angles, mask, other=1.0)
    s = tl.load(sin + angles, mask, other=0.0)
    x = x * c + tl.where(columns < HALF, 1.0, -1.0)[None, :] * s * y
    _store((chunks[0],), batch, row, column, (x,))


@triton.jit
def _forward_kernel(
    q, q_tail, k, k_tail, v, v_tail, out, out_tail, lse, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of one block of queries, by the online softmax of Milakov & Gimelshein (arXiv:1805.02867).

    The sum and the output of a row are relative to its largest score so far, and shrink when a larger one turns up.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5  # exp2 is one instruction, exp is two

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q  # the late queries see most keys: they begin first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q, q_tail, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k, k_tail, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v, v_tail, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    out = _chunks(out, out_tail, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    queries = start + tl.arange(0, BLOCK_Q)

    q_tile = _load(q, batch, start, 2 * column)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # of the scaled scores
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    for diagonal in tl.static_range(2):  # first the keys that all queries see, without a mask, then those they may not
        for key in tl.range(start * diagonal, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            scores = _products(q_tile, _load(k, batch, key, 2 * column + HEAD_DIM))  # [BLOCK_Q, BLOCK_K]
            if diagonal:
                scores = tl.where(queries[:, None] >= (key + tl.arange(0, BLOCK_K))[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
            p = tl.exp2(scores * SCALE - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_max = new_max
            row_sum = row_sum * shrink + tl.sum(p, 1)
            acc = [a * shrink[:, None] for a in acc]
            acc = _accumulate(acc, p, _load(v, batch, key, 3 * column + 2 * HEAD_DIM))
    _store(out, batch, start, column, [a / row_sum[:, None] for a in acc])
    tl.store(lse + row.to(tl.int64) * seq + queries, row_max + tl.log2(row_sum), queries < seq)


@triton.jit
def _dq_kernel(
    q, q_tail, k, k_tail, v, v_tail, out, out_tail, d_out, d_out_tail, d_qkv, d_qkv_tail,
    lse, delta, cos, sin, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries. Leaves their delta for the kernel over keys, which runs next."""
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q, q_tail, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k, k_tail, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v, v_tail, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    out = _chunks(out, out_tail, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_out = _chunks(d_out, d_out_tail, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_qkv = _chunks(d_qkv, d_qkv_tail, batch, seq, BLOCK_Q, 3 * WIDTH, HEAD_DIM)
    queries = start + tl.arange(0, BLOCK_Q)
    statistics = row.to(tl.int64) * seq + queries  # [BLOCK_Q] places in lse and delta

    d_out_tile = _load(d_out, batch, start, column)
    out_tile = _load(out, batch, start, column)
    deltas = tl.zeros([BLOCK_Q], tl.float32)
    for i in tl.static_range(len(out_tile)):
        deltas += tl.sum(out_tile[i].to(tl.float32) * d_out_tile[i].to(tl.float32), 1)
    tl.store(delta + statistics, deltas, queries < seq)

    q_tile = _load(q, batch, start, 2 * column)
    lses = tl.load(lse + statistics, queries < seq, other=0.0)
    dq = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    for diagonal in tl.static_range(2):
        for key in tl.range(start * diagonal, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            k_tile = _load(k, batch, key, 2 * column + HEAD_DIM)
            p = tl.exp2(_products(q_tile, k_tile) * SCALE - lses[:, None])  # [BLOCK_Q, BLOCK_K]
            if diagonal:
                p = tl.where(queries[:, None] >= (key + tl.arange(0, BLOCK_K))[None, :], p, 0.0)
            dp = _products(d_out_tile, _load(v, batch, key, 3 * column + 2 * HEAD_DIM))
            dq = _accumulate(dq, p * (dp - deltas[:, None]), k_tile)
    dq = [x * HEAD_DIM**-0.5 for x in dq]
    _store_rotated_back(d_qkv, batch, start, 3 * column, dq, cos, sin, seq, HALF)


@triton.jit
def _dkv_kernel(
    q, q_tail, k, k_tail, v, v_tail, d_out, d_out_tail, d_qkv, d_qkv_tail, lse, delta, cos, sin, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of keys, or of their values, or both.

    The scores are formed as [keys, queries]: p^T and ds^T are then left factors as they are. To transpose a product in
    registers is slow, and wrong on Hopper before Triton 3.7.1.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_K)
    start = tl.program_id(0) % blocks * BLOCK_K  # the early keys are seen by most queries: they begin first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q, q_tail, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k, k_tail, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v, v_tail, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    d_out = _chunks(d_out, d_out_tail, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_qkv = _chunks(d_qkv, d_qkv_tail, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    keys = start + tl.arange(0, BLOCK_K)

    k_tile = _load(k, batch, start, 2 * column + HEAD_DIM)
    if DK:
        v_tile = _load(v, batch, start, 3 * column + 2 * HEAD_DIM)
    dk = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    dv = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    for past in tl.static_range(2):  # first the queries of these very positions, of which not all see all keys
        if past:
            first, last = start + BLOCK_K, seq
        else:
            first, last = start, tl.minimum(start + BLOCK_K, seq)
        for query in tl.range(first, last, BLOCK_Q):
            queries = query + tl.arange(0, BLOCK_Q)
            statistics = row.to(tl.int64) * seq + queries
            q_tile = _load(q, batch, query, 2 * column)
            lses = tl.load(lse + statistics, queries < seq, other=0.0)
            p = tl.exp2(_products(k_tile, q_tile) * SCALE - lses[None, :])  # [BLOCK_K, BLOCK_Q]
            if not past:
                p = tl.where(queries[None, :] >= keys[:, None], p, 0.0)
            d_out_tile = _load(d_out, batch, query, column)
            if DV:
                dv = _accumulate(dv, p, d_out_tile)
            if DK:
                dp = _products(v_tile, d_out_tile)
                deltas = tl.load(delta + statistics, queries < seq, other=0.0)
                dk = _accumulate(dk, p * (dp - deltas[None, :]), q_tile)
    if DV:
        _store(d_qkv, batch, start, 3 * column + 2 * HEAD_DIM, dv)
    if DK:
        dk = [x * HEAD_DIM**-0.5 for x in dk]
        _store_rotated_back(d_qkv, batch, start, 3 * column + HEAD_DIM, dk, cos, sin, seq, HALF)


# ---------------------------------------------------------------------------------------------- the op

CHUNKS = {16: (16,), 32: (32,), 64: (64,), 80: (64, 16), 128: (128,), 256: (128, 128)}  # columns, by head_dim
ROTATE_BLOCK = 32  # rows


def _tiles(x: Tensor, rows: int, arch: int) -> tuple["Tensor | TensorDescriptor | None", ...]:
    """x [batch, seq, .., head_dim] as the two arguments by which a kernel has tiles of so many rows; see _chunks."""
    widths = CHUNKS[x.shape[-1]]
    columns = x.flatten(2)
    chunks = (columns, columns[:, :, widths[0] :])[: len(widths)]
    if arch >= 90:
        chunks = [TensorDescriptor.from_tensor(chunk, [1, rows, width]) for chunk, width in zip(chunks, widths)]
    return chunks[0], chunks[1] if len(chunks) == 2 else None


def _launch(qkv: Tensor, tile: tiles.Tile) -> dict[str, int]:
    heads, head_dim = qkv.shape[2], qkv.shape[4]
    shape = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    return {**shape, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and from a multiple of 16 bytes on, as TMA wants it. A gradient may come with strides of 0."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys, rotated: [batch, seq, heads, 2, head_dim]."""
    batch, seq, heads, _, head_dim = qkv.shape
    rotated = qkv.new_empty(batch, seq, heads, 2, head_dim)
    rows = batch * seq * heads * 2
    _rotate_kernel[(triton.cdiv(rows, ROTATE_BLOCK),)](
        qkv, cos, sin, rotated, rows, seq, HEADS=heads, HEAD_DIM=head_dim, HALF=cos.shape[1], BLOCK=ROTATE_BLOCK
    )
    return rotated


def _outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _, head_dim = qkv.shape
    return qkv.new_empty(batch, seq, heads, head_dim), qkv.new_empty(batch, heads, seq, dtype=torch.float32)


@torch.library.custom_op("tripod::rotary_attention", mutates_args=())
def _attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """out [batch, seq, heads, head_dim], and lse [batch, heads, seq], to the base 2, of the scaled scores."""
    out, lse = _outputs(qkv)
    batch, seq, heads, _, head_dim = qkv.shape
    arch = tiles.architecture(qkv.device)
    tile = tiles.attention(arch, head_dim, qkv.dtype).forward
    qkv = _aligned(qkv)
    with torch.cuda.device_of(qkv):
        rotated = _rotated(qkv, cos, sin)
        _forward_kernel[(triton.cdiv(seq, tile.block_q) * batch * heads,)](
            *_tiles(rotated, tile.block_q, arch),  # q
            *_tiles(rotated, tile.block_k, arch),  # k
            *_tiles(qkv, tile.block_k, arch),  # v
            *_tiles(out, tile.block_q, arch),
            lse, seq, **_launch(qkv, tile),
        )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(qkv, cos, sin):
    return _outputs(qkv)


@torch.library.custom_op("tripod::rotary_attention_backward", mutates_args=())
def _attention_backward(qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of qkv, in its layout."""
    batch, seq, heads, _, head_dim = qkv.shape
    arch = tiles.architecture(qkv.device)
    dq, dk, dv = tiles.attention(arch, head_dim, qkv.dtype)[1:]
    key_launches = [(dk, True, dv is None)] + ([] if dv is None else [(dv, False, True)])
    qkv, out, d_out = _aligned(qkv), _aligned(out), _aligned(d_out)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    with torch.cuda.device_of(qkv):
        rotated = _rotated(qkv, cos, sin)
        _dq_kernel[(triton.cdiv(seq, dq.block_q) * batch * heads,)](
            *_tiles(rotated, dq.block_q, arch),  # q
            *_tiles(rotated, dq.block_k, arch),  # k
            *_tiles(qkv, dq.block_k, arch),  # v
            *_tiles(out, dq.block_q, arch),
            *_tiles(d_out, dq.block_q, arch),
            *_tiles(d_qkv, dq.block_q, arch),
            lse, delta, cos, sin, seq, HALF=cos.shape[1], **_launch(qkv, dq),
        )  # fmt: skip
        for tile, want_dk, want_dv in key_launches:
            _dkv_kernel[(triton.cdiv(seq, tile.block_k) * batch * heads,)](
                *_tiles(rotated, tile.block_q, arch),  # q
                *_tiles(rotated, tile.block_k, arch),  # k
                *_tiles(qkv, tile.block_k, arch),  # v
                *_tiles(d_out, tile.block_q, arch),
                *_tiles(d_qkv, tile.block_k, arch),
                lse, delta, cos, sin, seq, HALF=cos.shape[1], DK=want_dk, DV=want_dv, **_launch(qkv, tile),
            )  # fmt: skip
    return d_qkv


@_attention_backward.register_fake
def _(qkv, cos, sin, out, lse, d_out):
    return torch.empty_like(qkv)


def _setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, d_out: Tensor, _) -> tuple[Tensor | None, ...]:
    return _attention_backward(*ctx.saved_tensors, d_out), None, None


_attention.register_autograd(_gradients, setup_context=_setup_context)


def _check_for_kernels(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """What the kernels ask for beyond the definition."""
    head_dim, rotary_dim = qkv.shape[4], 2 * cos.shape[1]
    if head_dim not in CHUNKS:
        raise ValueError(f"the kernels know head_dim {', '.join(map(str, CHUNKS))}, not {head_dim}")
    if not 0 < rotary_dim <= CHUNKS[head_dim][0]:
        raise ValueError(
            f"the kernels rotate 2 to {CHUNKS[head_dim][0]} of the {head_dim} columns of a head, not {rotary_dim}"
        )
    if qkv.dtype == torch.bfloat16 and not qkv.is_cuda:
        raise ValueError("Triton's interpreter can not multiply bfloat16: take float16 or float32, or a GPU")
    if qkv.numel() == 0 or not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous and not empty: {list(qkv.shape)}, strides {list(qkv.stride())}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous float32, not {table.dtype} with strides {list(table.stride())}"
            )


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of rotated queries and keys.

    qkv [batch, seq, heads, 3, head_dim] is the output of the fused projection, cos and sin are [seq, rotary_dim / 2].
    Returns [batch, seq, heads, head_dim] in the dtype of qkv. Raises ValueError when the shapes do not fit; the kernels
    also want qkv contiguous, one of the head dims that a Pythia has, and float32 tables.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [batch, seq, heads, 3, head_dim], not {list(qkv.shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != qkv.shape[1] or 2 * cos.shape[1] > qkv.shape[4]:
        raise ValueError(
            f"cos and sin must be [seq, rotary_dim / 2] with seq = {qkv.shape[1]} and rotary_dim <= {qkv.shape[4]}, "
            f"not {list(cos.shape)} and {list(sin.shape)}"
        )
    if qkv.device != cos.device or qkv.device != sin.device:
        raise ValueError(f"qkv, cos and sin must be on one device, not {qkv.device}, {cos.device} and {sin.device}")
    if triton_runs(qkv):
        _check_for_kernels(qkv, cos, sin)
        return _attention(qkv, cos, sin)[0]
    if qkv.device.type == "cpu" and qkv.dtype != torch.float64 and qkv.shape[1] <= SHORT:
        return _short_attention(qkv, cos, sin)[0]
    out = F.scaled_dot_product_attention(*_RotatedHeads.apply(qkv, cos, sin), is_causal=True)
    return out.transpose(1, 2)
