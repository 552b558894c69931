"""Causal attention of rotated queries and keys, computed directly from the fused QKV projection.

One head of one sequence has queries, keys and values q, k, v [seq, head_dim]. With q' and k' rotated as in rotary.py,

    scores[p, s]  = q'[p] . k'[s] / sqrt(head_dim)    for s <= p, else -inf
    weights[p]    = softmax(scores[p])
    out[p]        = sum over s of weights[p, s] v[s]

Forward saves lse[p], the log-sum-exp of scores[p]. Backward computes the weights again from it:

    weights[p, s] = exp(scores[p, s] - lse[p])
    d_v[s]        = sum over p of weights[p, s] d_out[p]
    delta[p]      = sum over s of weights[p, s] (d_out[p] . v[s]) = d_out[p] . out[p]
    d_scores[p, s] = weights[p, s] (d_out[p] . v[s] - delta[p])
    d_q'[p]       = sum over s of d_scores[p, s] k'[s] / sqrt(head_dim)
    d_k'[s]       = sum over p of d_scores[p, s] q'[p] / sqrt(head_dim)

d_q and d_k are d_q' and d_k' rotated back. As in FlashAttention (arXiv:2205.14135), no kernel writes scores to memory.

With `documents`, a position sees only its own document: the scores of all s before the start of the document of p are
-inf too. Positions still count from the start of the row. A score depends only on p - s, so to count them from the
start of the document would change nothing but rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.backend import TensorDescriptor, tl, triton, triton_runs
from kernels.cpu_attention import short_attention, short_attention_runs
from kernels.linear import linear, matmul
from kernels.rotary import RotateQKV, rotate_in_place

# ---- reference -------------------------------------------------------------------------------------------------------


def rotary_attention_reference(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None) -> Tensor:
    q, k, v = RotateQKV.apply(qkv, cos, sin)  # [batch, heads, seq, head_dim] each
    if documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    starts, positions = documents[0], torch.arange(qkv.shape[1], device=qkv.device)
    mask = ((positions >= starts[:, :, None]) & (positions <= positions[:, None]))[:, None]  # [batch, 1, query, key]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def document_bounds(tokens: Tensor, end_of_text: int) -> Tensor:
    """Where the document of every token of tokens [batch, seq] starts and ends in its row: int32 [2, batch, seq].

    A document ends with the token end_of_text; the end is the position after it. A row starts in the middle of one.
    """
    seq, is_last = tokens.shape[1], tokens == end_of_text
    positions = torch.arange(seq, dtype=torch.int32, device=tokens.device)
    starts = (positions * F.pad(is_last[:, :-1], (1, 0))).cummax(1).values
    ends = (positions + 1).expand_as(tokens).masked_fill(~is_last, seq).flip(1).cummin(1).values.flip(1)
    return torch.stack((starts, ends))


# ---- kernels ---------------------------------------------------------------------------------------------------------
#
# A tile is a block of positions of one head, [BLOCK, head_dim], held as a tuple of one or two column chunks. Tensor
# cores take powers of two, and padding the 80 columns of Pythia 2.8b to 128 would cost 1.6 times the work, so its tiles
# are (64, 16).
#
# Queries and keys are rotated before these kernels run, so d_q and d_k are the gradients of rotated ones. Kernels read
# and write tiles through descriptors of tensors [batch, seq, columns], in which the head and q, k or v are a column
# offset. So q, k and v are read from the fused tensor, and the gradient is written to one, without a copy. Past the end
# of a sequence a descriptor reads zeros and writes nothing. From compute capability 9.0 on, the host makes descriptors,
# and one instruction (TMA) moves a tile. Before 9.0, the kernel makes them from pointers and constant strides, and they
# become masked loads (cp.async) and stores. So X_ptr and X_tail_ptr are descriptors, or before 9.0 pointers, of the
# first and the second column chunk of tensor X. X_tail_ptr is None if there is one chunk.
#
# Every program owns the tile that it writes: no atomics, one order of summation, the same bits in every run.
#
# starts_ptr and ends_ptr are None without documents; then the compiler sees nothing of what they are for. With them,
# loops leave out the tiles in which no query sees a key: they begin at the document of the first query, or end with
# that of the last key.

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _chunks(ptr, tail_ptr, batch, seq, ROWS: tl.constexpr, WIDTH: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Descriptors of the column chunks of tiles with ROWS rows of a tensor [batch, seq, WIDTH]."""
    if isinstance(ptr, tl.tensor_descriptor):
        chunks = (ptr,) if tail_ptr is None else (ptr, tail_ptr)
    else:
        MAIN: tl.constexpr = HEAD_DIM if tail_ptr is None else triton.next_power_of_2(HEAD_DIM) // 2
        origin = batch.to(tl.int64) * seq * WIDTH
        chunks = (tl.make_tensor_descriptor(ptr + origin, [seq, WIDTH], [WIDTH, 1], [ROWS, MAIN]),)
        if tail_ptr is not None:
            chunks += (tl.make_tensor_descriptor(tail_ptr + origin, [seq, WIDTH], [WIDTH, 1], [ROWS, HEAD_DIM - MAIN]),)
    return chunks


@triton.jit
def _load(chunks, batch, row, column):
    """The tile whose first element is [batch, row, column]."""
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
def _dot_transposed(a, b):
    """a b^T of two tiles, [rows of a, rows of b]."""
    total = tl.dot(a[0], b[0].T, input_precision="ieee")
    for i in tl.static_range(1, len(a)):
        total = tl.dot(a[i], b[i].T, total, input_precision="ieee")
    return total


@triton.jit
def _accumulate(tile, weights, x):
    """tile + weights x, where weights [rows of tile, rows of x] are cast to the dtype of x."""
    total = ()
    for i in tl.static_range(len(x)):
        total += (tl.dot(weights.to(x[i].dtype), x[i], tile[i], input_precision="ieee"),)
    return total


@triton.jit
def _document_starts(starts_ptr, batch, seq, start, queries, BLOCK_K: tl.constexpr):
    """The first tile of keys that the query `start` sees, and where the documents of `queries` start, [BLOCK_Q]."""
    starts_ptr += batch.to(tl.int64) * seq
    return tl.load(starts_ptr + start) // BLOCK_K * BLOCK_K, tl.load(starts_ptr + queries, queries < seq, other=0)


@triton.jit
def _document_ends(ends_ptr, batch, seq, start, keys, BLOCK_K: tl.constexpr):
    """The end of the document of the last of `keys`, which start at `start`, and of all of them, [BLOCK_K]."""
    ends_ptr += batch.to(tl.int64) * seq
    return tl.load(ends_ptr + tl.minimum(start + BLOCK_K, seq) - 1), tl.load(ends_ptr + keys, keys < seq, other=0)


@triton.jit
def attention_forward_kernel(
    q_ptr, q_tail_ptr, kv_ptr, kv_tail_ptr, out_ptr, out_tail_ptr, lse_ptr, starts_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of one block of queries, by the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867).

    q_ptr, kv_ptr  [batch, seq, HEADS, 3, HEAD_DIM], qkv with rotated queries and keys, in tiles of queries and of keys
    out_ptr        [batch, seq, HEADS, HEAD_DIM], output
    lse_ptr        [batch, HEADS, seq] float32, output: log-sum-exp of the scores in base 2, log2(e) times the natural
    starts_ptr     [batch, seq] int32, where the document of a position starts, or None

    The sum and the output of a row are relative to its largest score so far, and shrink when a larger one appears.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5  # exp2 is one instruction, exp is two

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q  # late queries see the most keys, so they start first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 3 * WIDTH, HEAD_DIM)
    kv = _chunks(kv_ptr, kv_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    out = _chunks(out_ptr, out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    queries = start + tl.arange(0, BLOCK_Q)

    q_tile = _load(q, batch, start, 3 * column)
    first, lowest = 0, float("-inf")
    if starts_ptr is not None:
        first, starts = _document_starts(starts_ptr, batch, seq, start, queries, BLOCK_K)
        lowest = -3e38  # finite, because a query may see no key of the first tiles: -inf minus -inf is not a number
    row_max = tl.full([BLOCK_Q], lowest, tl.float32)  # of the scaled scores
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    for diagonal in tl.static_range(2):  # first the keys that all queries see, without a mask, then the others
        for key in tl.range(start if diagonal else first, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            scores = _dot_transposed(q_tile, _load(kv, batch, key, 3 * column + HEAD_DIM))  # [BLOCK_Q, BLOCK_K]
            if diagonal:
                scores = tl.where(queries[:, None] >= (key + tl.arange(0, BLOCK_K))[None, :], scores, float("-inf"))
            if starts_ptr is not None:
                scores = tl.where(starts[:, None] <= (key + tl.arange(0, BLOCK_K))[None, :], scores, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(scores, 1) * SCALE)
            p = tl.exp2(scores * SCALE - new_max[:, None])
            shrink = tl.exp2(row_max - new_max)
            row_max = new_max
            row_sum = row_sum * shrink + tl.sum(p, 1)
            acc = [a * shrink[:, None] for a in acc]
            acc = _accumulate(acc, p, _load(kv, batch, key, 3 * column + 2 * HEAD_DIM))
    _store(out, batch, start, column, [a / row_sum[:, None] for a in acc])
    tl.store(lse_ptr + row.to(tl.int64) * seq + queries, row_max + tl.log2(row_sum), queries < seq)


@triton.jit
def attention_dq_kernel(
    q_ptr, q_tail_ptr, kv_ptr, kv_tail_ptr, out_ptr, out_tail_ptr, d_out_ptr, d_out_tail_ptr,
    d_qkv_ptr, d_qkv_tail_ptr, lse_ptr, delta_ptr, starts_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and their delta for attention_dkv_kernel, which runs next.

    q_ptr, kv_ptr       [batch, seq, HEADS, 3, HEAD_DIM], qkv as in forward
    out_ptr, d_out_ptr  [batch, seq, HEADS, HEAD_DIM], the output of forward and its gradient
    d_qkv_ptr           [batch, seq, HEADS, 3, HEAD_DIM], output: the gradient of rotated queries
    lse_ptr             [batch, HEADS, seq] float32, from forward
    delta_ptr           [batch, HEADS, seq] float32, output
    starts_ptr          [batch, seq] int32 or None, as in forward
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 3 * WIDTH, HEAD_DIM)
    kv = _chunks(kv_ptr, kv_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    out = _chunks(out_ptr, out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_out = _chunks(d_out_ptr, d_out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_qkv = _chunks(d_qkv_ptr, d_qkv_tail_ptr, batch, seq, BLOCK_Q, 3 * WIDTH, HEAD_DIM)
    queries = start + tl.arange(0, BLOCK_Q)
    offsets = row.to(tl.int64) * seq + queries  # [BLOCK_Q], of lse and delta

    d_out_tile = _load(d_out, batch, start, column)
    out_tile = _load(out, batch, start, column)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    for i in tl.static_range(len(out_tile)):
        delta += tl.sum(out_tile[i].to(tl.float32) * d_out_tile[i].to(tl.float32), 1)
    tl.store(delta_ptr + offsets, delta, queries < seq)

    q_tile = _load(q, batch, start, 3 * column)
    lse = tl.load(lse_ptr + offsets, queries < seq, other=0.0)
    dq = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    first = 0
    if starts_ptr is not None:
        first, starts = _document_starts(starts_ptr, batch, seq, start, queries, BLOCK_K)
    for diagonal in tl.static_range(2):
        for key in tl.range(start if diagonal else first, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            k_tile = _load(kv, batch, key, 3 * column + HEAD_DIM)
            p = tl.exp2(_dot_transposed(q_tile, k_tile) * SCALE - lse[:, None])  # [BLOCK_Q, BLOCK_K]
            if diagonal:
                p = tl.where(queries[:, None] >= (key + tl.arange(0, BLOCK_K))[None, :], p, 0.0)
            if starts_ptr is not None:
                p = tl.where(starts[:, None] <= (key + tl.arange(0, BLOCK_K))[None, :], p, 0.0)
            dp = _dot_transposed(d_out_tile, _load(kv, batch, key, 3 * column + 2 * HEAD_DIM))
            dq = _accumulate(dq, p * (dp - delta[:, None]), k_tile)
    _store(d_qkv, batch, start, 3 * column, [x * HEAD_DIM**-0.5 for x in dq])


@triton.jit
def attention_dkv_kernel(
    q_ptr, q_tail_ptr, kv_ptr, kv_tail_ptr, d_out_ptr, d_out_tail_ptr,
    d_qkv_ptr, d_qkv_tail_ptr, lse_ptr, delta_ptr, ends_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of keys (if DK), and of their values (if DV).

    q_ptr, kv_ptr       [batch, seq, HEADS, 3, HEAD_DIM], qkv as in forward
    d_out_ptr           [batch, seq, HEADS, HEAD_DIM], gradient of the output
    d_qkv_ptr           [batch, seq, HEADS, 3, HEAD_DIM], output: the gradients of rotated keys and of values
    lse_ptr, delta_ptr  [batch, HEADS, seq] float32, from forward and from attention_dq_kernel
    ends_ptr            [batch, seq] int32, the position after the document of a position, or None

    Scores are computed as [keys, queries], so p^T and ds^T are left operands of a dot without a transposition. To
    transpose the result of a dot in registers is slow, and wrong on Hopper before Triton 3.7.1.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_K)
    start = tl.program_id(0) % blocks * BLOCK_K  # the most queries see the early keys, so they start first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 3 * WIDTH, HEAD_DIM)
    kv = _chunks(kv_ptr, kv_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    d_out = _chunks(d_out_ptr, d_out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_qkv = _chunks(d_qkv_ptr, d_qkv_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    keys = start + tl.arange(0, BLOCK_K)

    k_tile = _load(kv, batch, start, 3 * column + HEAD_DIM)
    if DK:
        v_tile = _load(kv, batch, start, 3 * column + 2 * HEAD_DIM)
    dk = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    dv = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    end = seq
    if ends_ptr is not None:
        end, ends = _document_ends(ends_ptr, batch, seq, start, keys, BLOCK_K)
    for past in tl.static_range(2):  # first the queries of these positions, with a mask, then those behind them
        for query in tl.range(start + BLOCK_K * past, end if past else tl.minimum(start + BLOCK_K, seq), BLOCK_Q):
            queries = query + tl.arange(0, BLOCK_Q)
            offsets = row.to(tl.int64) * seq + queries
            q_tile = _load(q, batch, query, 3 * column)
            lse = tl.load(lse_ptr + offsets, queries < seq, other=0.0)
            p = tl.exp2(_dot_transposed(k_tile, q_tile) * SCALE - lse[None, :])  # [BLOCK_K, BLOCK_Q]
            if not past:
                p = tl.where(queries[None, :] >= keys[:, None], p, 0.0)
            if ends_ptr is not None:
                p = tl.where(queries[None, :] < ends[:, None], p, 0.0)
            d_out_tile = _load(d_out, batch, query, column)
            if DV:
                dv = _accumulate(dv, p, d_out_tile)
            if DK:
                dp = _dot_transposed(v_tile, d_out_tile)
                delta = tl.load(delta_ptr + offsets, queries < seq, other=0.0)
                dk = _accumulate(dk, p * (dp - delta[None, :]), q_tile)
    if DV:
        _store(d_qkv, batch, start, 3 * column + 2 * HEAD_DIM, dv)
    if DK:
        _store(d_qkv, batch, start, 3 * column + HEAD_DIM, [x * HEAD_DIM**-0.5 for x in dk])


# ---- op --------------------------------------------------------------------------------------------------------------

CHUNKS = {16: (16,), 32: (32,), 64: (64,), 80: (64, 16), 128: (128,), 256: (256,)}  # columns, by head_dim


def _arguments(qkv: Tensor, tile: tiles.Tile, **tensors: tuple[Tensor, int]) -> dict:
    """Shape and tile of a launch, and kernel arguments X_ptr and X_tail_ptr for every X=(tensor, rows of its tiles).

    The tensors are [batch, seq, .., head_dim].
    """
    seq, heads, head_dim = qkv.shape[1], qkv.shape[2], qkv.shape[4]
    arguments = {"seq": seq, "HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    arguments |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    widths, by_descriptor = CHUNKS[head_dim], tiles.architecture(qkv.device) >= 90
    for name, (x, rows) in tensors.items():
        columns = x.flatten(2)
        chunks = [columns, columns[:, :, widths[0] :]][: len(widths)]
        if by_descriptor:
            chunks = [TensorDescriptor.from_tensor(chunk, [1, rows, width]) for chunk, width in zip(chunks, widths)]
        arguments[f"{name}_ptr"], arguments[f"{name}_tail_ptr"] = (*chunks, None)[:2]
    return arguments


def _programs(qkv: Tensor, rows: int) -> tuple[int]:
    batch, seq, heads, _, _ = qkv.shape
    return (triton.cdiv(seq, rows) * batch * heads,)


def launch_forward(qkv: Tensor, out: Tensor, lse: Tensor, tile: tiles.Tile, starts: Tensor | None = None) -> None:
    """Write out and lse. The shapes of all three launches are in the docstrings of their kernels."""
    q, k = tile.block_q, tile.block_k
    arguments = _arguments(qkv, tile, q=(qkv, q), kv=(qkv, k), out=(out, q))
    attention_forward_kernel[_programs(qkv, q)](**arguments, lse_ptr=lse, starts_ptr=starts)


def launch_dq(
    qkv: Tensor,
    out: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    d_qkv: Tensor,
    tile: tiles.Tile,
    starts: Tensor | None = None,
) -> None:
    """Write delta, and the queries' part of d_qkv."""
    q, k = tile.block_q, tile.block_k
    arguments = _arguments(qkv, tile, q=(qkv, q), kv=(qkv, k), out=(out, q), d_out=(d_out, q), d_qkv=(d_qkv, q))
    attention_dq_kernel[_programs(qkv, q)](**arguments, lse_ptr=lse, delta_ptr=delta, starts_ptr=starts)


def launch_dkv(
    qkv: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    d_qkv: Tensor,
    tile: tiles.Tile,
    dk: bool,
    dv: bool,
    ends: Tensor | None = None,
) -> None:
    """Write the keys' part of d_qkv (if dk) and the values' part (if dv)."""
    q, k = tile.block_q, tile.block_k
    arguments = _arguments(qkv, tile, q=(qkv, q), kv=(qkv, k), d_out=(d_out, q), d_qkv=(d_qkv, k))
    attention_dkv_kernel[_programs(qkv, k)](**arguments, lse_ptr=lse, delta_ptr=delta, ends_ptr=ends, DK=dk, DV=dv)


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes, as TMA requires. autograd may pass a gradient with strides of 0."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _empty(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """out [batch, seq, heads, head_dim] and lse [batch, heads, seq] float32."""
    batch, seq, heads, _, head_dim = qkv.shape
    return qkv.new_empty(batch, seq, heads, head_dim), qkv.new_empty(batch, heads, seq, dtype=torch.float32)


def _launches(qkv: Tensor) -> tiles.Attention:
    return tiles.attention(tiles.architecture(qkv.device), qkv.shape[4], qkv.dtype)


def _attend(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rotate qkv in place. Returns out [batch, seq, heads, head_dim], qkv, and lse [batch, heads, seq] in base 2."""
    out, lse = _empty(qkv)
    starts = None if documents is None else documents[0]
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        rotate_in_place(qkv, cos, sin)
        launch_forward(qkv, out, lse, _launches(qkv).forward, starts)
    return out, qkv, lse


def _attend_backward(
    cos: Tensor, sin: Tensor, documents: Tensor | None, out: Tensor, qkv: Tensor, lse: Tensor, d_out: Tensor
) -> Tensor:
    """The gradient of qkv as it was before _attend rotated it, in its layout."""
    qkv, out, d_out = _aligned(qkv), _aligned(out), _aligned(d_out)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    starts, ends = (None, None) if documents is None else documents
    _, dq, dk, dv = _launches(qkv)
    with torch.cuda.device_of(qkv):
        launch_dq(qkv, out, d_out, lse, delta, d_qkv, dq, starts)
        launch_dkv(qkv, d_out, lse, delta, d_qkv, dk, dk=True, dv=dv is None, ends=ends)
        if dv is not None:
            launch_dkv(qkv, d_out, lse, delta, d_qkv, dv, dk=False, dv=True, ends=ends)
        rotate_in_place(d_qkv, cos, sin, direction=-1.0)
    return d_qkv


# There are two ops: attention of a given qkv, and attention with the projection that computes qkv, for the network. A
# rotation in place touches a quarter of q and k only, but nobody else may hold the tensor that it changes. So rotation,
# attention and projection are one op. The first op has to copy qkv, the second rotates its own result.


@torch.library.custom_op("tripod::rotated_attention", mutates_args=())
def _rotated_attention(
    qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, a rotated copy of qkv, and lse."""
    return _attend(qkv.clone(memory_format=torch.contiguous_format), cos, sin, documents)


@torch.library.custom_op("tripod::linear_rotary_attention", mutates_args=())
def _linear_rotary_attention(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for qkv = x @ weight.T + bias."""
    return _attend(matmul(x, weight, bias).unflatten(-1, (heads, 3, -1)), cos, sin, documents)


@torch.library.custom_op("tripod::rotated_attention_backward", mutates_args=())
def _rotated_attention_backward(
    cos: Tensor, sin: Tensor, documents: Tensor | None, out: Tensor, qkv: Tensor, lse: Tensor, d_out: Tensor
) -> Tensor:
    return _attend_backward(cos, sin, documents, out, qkv, lse, d_out)


@torch.library.custom_op("tripod::linear_rotary_attention_backward", mutates_args=())
def _linear_rotary_attention_backward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents: Tensor | None,
    out: Tensor,
    qkv: Tensor,
    lse: Tensor,
    d_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias."""
    d_qkv = _attend_backward(cos, sin, documents, out, qkv, lse, d_out).flatten(2)  # [batch, seq, 3 * heads * head_dim]
    rows = d_qkv.flatten(0, 1)
    return matmul(d_qkv, weight.T), rows.T @ x.flatten(0, 1), rows.sum(0)


def _outputs(qkv: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = _empty(qkv)
    return out, torch.empty_like(qkv, memory_format=torch.contiguous_format), lse


def _save(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates a zero tensor of the size of qkv


_rotated_attention.register_fake(_outputs)
_rotated_attention_backward.register_fake(lambda cos, sin, documents, out, qkv, *_: torch.empty_like(qkv))
_rotated_attention.register_autograd(
    lambda ctx, d_out, *_: (_rotated_attention_backward(*ctx.saved_tensors, d_out), None, None, None),
    setup_context=lambda ctx, inputs, output: _save(ctx, inputs[1:], output),
)
_linear_rotary_attention.register_fake(
    lambda x, weight, bias, cos, sin, heads, documents=None: _outputs(x.new_empty(_qkv_shape(x, weight, heads)))
)
_linear_rotary_attention_backward.register_fake(
    lambda x, weight, *_: (torch.empty_like(x), torch.empty_like(weight), weight.new_empty(len(weight)))
)
_linear_rotary_attention.register_autograd(
    lambda ctx, d_out, *_: (*_linear_rotary_attention_backward(*ctx.saved_tensors, d_out), *[None] * 4),
    setup_context=lambda ctx, inputs, output: _save(ctx, (*inputs[:2], *inputs[3:5], inputs[6]), output),
)


def _qkv_shape(x: Tensor, weight: Tensor, heads: int) -> tuple[int, ...]:
    return *x.shape[:-1], heads, 3, len(weight) // (3 * heads)


def _check(shape: tuple[int, ...], x: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None) -> None:
    """Check qkv, of this shape and with the dtype and device of x, the tables and the bounds of the documents."""
    if len(shape) != 5 or shape[3] != 3:
        raise ValueError(f"qkv must be [batch, seq, heads, 3, head_dim], not {list(shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != shape[1] or 2 * cos.shape[1] > shape[4]:
        wanted = f"[seq, rotary_dim / 2] with seq = {shape[1]} and rotary_dim <= {shape[4]}"
        raise ValueError(f"cos and sin must be {wanted}, not {list(cos.shape)} and {list(sin.shape)}")
    if x.device != cos.device or x.device != sin.device:
        raise ValueError(f"qkv, cos and sin must be on one device, not {x.device}, {cos.device} and {sin.device}")
    if documents is not None:
        found = (documents.dtype, documents.device, list(documents.shape), documents.is_contiguous())
        if found != (torch.int32, x.device, [2, *shape[:2]], True):
            raise ValueError(f"documents must be contiguous int32 {[2, *shape[:2]]} on {x.device}: see document_bounds")
    if triton_runs(x, dots=True):
        _check_for_kernels(shape, x, cos, sin)


def _check_for_kernels(shape: tuple[int, ...], x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check what the kernels require beyond the reference."""
    if shape[4] not in CHUNKS:
        raise ValueError(f"the kernels support head_dim {', '.join(map(str, CHUNKS))}, not {shape[4]}")
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        raise ValueError("Triton's interpreter cannot multiply bfloat16: use float16 or float32, or a GPU")
    if 0 in shape or cos.numel() == 0:
        raise ValueError(f"qkv, cos and sin must not be empty: {list(shape)} and {list(cos.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, not {table.dtype}, strides {list(table.stride())}")


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor, documents: Tensor | None = None) -> Tensor:
    """Causal attention of rotated queries and keys: [batch, seq, heads, head_dim] in the dtype of qkv.

    qkv [batch, seq, heads, 3, head_dim] is the output of the fused projection; cos and sin are [seq, rotary_dim / 2].
    With documents, the result of document_bounds, attention does not cross the ends of documents.
    Raises ValueError if an argument does not fit. The kernels also require float32 tables and a head_dim of CHUNKS.
    """
    _check(qkv.shape, qkv, cos, sin, documents)
    if triton_runs(qkv, dots=True):
        return _rotated_attention(qkv, cos, sin, documents)[0]
    return (short_attention if short_attention_runs(qkv) else rotary_attention_reference)(qkv, cos, sin, documents)


def linear_rotary_attention(
    x: Tensor, weight: Tensor, bias: Tensor, cos: Tensor, sin: Tensor, heads: int, documents: Tensor | None = None
) -> Tensor:
    """rotary_attention of qkv = x @ weight.T + bias, which is rotated in place: [batch, seq, heads, head_dim].

    x is [batch, seq, in], weight [3 * heads * head_dim, in] and bias [3 * heads * head_dim], cast to the dtype of x.
    """
    if not triton_runs(x, dots=True):
        return rotary_attention(linear(x, weight, bias).unflatten(-1, (heads, 3, -1)), cos, sin, documents)
    _check(_qkv_shape(x, weight, heads), x, cos, sin, documents)
    return _linear_rotary_attention(x, weight.to(x.dtype), bias.to(x.dtype), cos, sin, heads, documents)[0]
