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
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.backend import TensorDescriptor, tl, triton, triton_runs
from kernels.cpu_attention import short_attention, short_attention_runs
from kernels.rotary import RotateQKV, rotate_qk

# ---- reference -------------------------------------------------------------------------------------------------------


def rotary_attention_reference(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    q, k, v = RotateQKV.apply(qkv, cos, sin)  # [batch, heads, seq, head_dim] each
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


# ---- kernels ---------------------------------------------------------------------------------------------------------
#
# A tile is a block of positions of one head, [BLOCK, head_dim], held as a tuple of one or two column chunks. Two chunks
# have two reasons. Tensor cores take powers of two, and padding the 80 columns of Pythia 2.8b to 128 would cost 1.6
# times the work, so its tiles are (64, 16). Rotating a gradient needs its registers twice, and 256 columns leave no
# room for that, so these tiles are (128, 128), and only the first chunk is rotated.
#
# Kernels read and write tiles through descriptors of tensors [batch, seq, columns], in which the head and q, k or v are
# a column offset. So v is read from the fused tensor, and the gradient is written to it, without a copy. Past the end
# of a sequence a descriptor reads zeros and writes nothing. From compute capability 9.0 on, the host makes descriptors,
# and one instruction (TMA) moves a tile. Before 9.0, the kernel makes them from pointers and constant strides, and they
# become masked loads (cp.async) and stores. So X_ptr and X_tail_ptr are descriptors, or before 9.0 pointers, of the
# first and the second column chunk of tensor X. X_tail_ptr is None if there is one chunk.
#
# Every program owns the tile that it writes: no atomics, one order of summation, the same bits in every run.

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
def _store_rotated_back(chunks, batch, row, column, tile, cos_ptr, sin_ptr, seq, HALF: tl.constexpr):
    """Store the tile rotated by the opposite angles. The columns that rotate are in its first chunk."""
    if len(chunks) == 2:
        _store((chunks[1],), batch, row, column, (tile[1],))  # first, so that its registers are free for the rotation
    x = tile[0]
    positions, columns = row + tl.arange(0, x.shape[0]), tl.arange(0, x.shape[1])
    partners = tl.where(columns < HALF, columns + HALF, tl.where(columns < 2 * HALF, columns - HALF, columns))
    y = tl.gather(x, tl.broadcast_to(partners[None, :], x.shape), 1)
    offsets = positions[:, None] * HALF + (columns % HALF)[None, :]
    mask = (positions < seq)[:, None] & (columns < 2 * HALF)[None, :]
    c = tl.load(cos_ptr + offsets, mask, other=1.0)
    s = tl.load(sin_ptr + offsets, mask, other=0.0)
    x = x * c + tl.where(columns < HALF, 1.0, -1.0)[None, :] * s * y
    _store((chunks[0],), batch, row, column, (x,))


@triton.jit
def attention_forward_kernel(
    q_ptr, q_tail_ptr, k_ptr, k_tail_ptr, v_ptr, v_tail_ptr, out_ptr, out_tail_ptr, lse_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The output of one block of queries, by the online softmax of Milakov & Gimelshein 2018 (arXiv:1805.02867).

    q_ptr, k_ptr  [batch, seq, HEADS, 2, HEAD_DIM], rotated queries and keys
    v_ptr         [batch, seq, HEADS, 3, HEAD_DIM], qkv
    out_ptr       [batch, seq, HEADS, HEAD_DIM], output
    lse_ptr       [batch, HEADS, seq] float32, output: log-sum-exp of the scores in base 2, log2(e) times the natural

    The sum and the output of a row are relative to its largest score so far, and shrink when a larger one appears.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5  # exp2 is one instruction, exp is two

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q  # late queries see the most keys, so they start first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k_ptr, k_tail_ptr, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v_ptr, v_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    out = _chunks(out_ptr, out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    queries = start + tl.arange(0, BLOCK_Q)

    q_tile = _load(q, batch, start, 2 * column)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # of the scaled scores
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    acc = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    for diagonal in tl.static_range(2):  # first the keys that all queries see, without a mask, then the others
        for key in tl.range(start * diagonal, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            scores = _dot_transposed(q_tile, _load(k, batch, key, 2 * column + HEAD_DIM))  # [BLOCK_Q, BLOCK_K]
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
    tl.store(lse_ptr + row.to(tl.int64) * seq + queries, row_max + tl.log2(row_sum), queries < seq)


@triton.jit
def attention_dq_kernel(
    q_ptr, q_tail_ptr, k_ptr, k_tail_ptr, v_ptr, v_tail_ptr, out_ptr, out_tail_ptr, d_out_ptr, d_out_tail_ptr,
    d_qkv_ptr, d_qkv_tail_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, and their delta for attention_dkv_kernel, which runs next.

    q_ptr, k_ptr        [batch, seq, HEADS, 2, HEAD_DIM], rotated queries and keys
    v_ptr               [batch, seq, HEADS, 3, HEAD_DIM], qkv
    out_ptr, d_out_ptr  [batch, seq, HEADS, HEAD_DIM], the output of forward and its gradient
    d_qkv_ptr           [batch, seq, HEADS, 3, HEAD_DIM], output: the queries' part of the gradient
    lse_ptr             [batch, HEADS, seq] float32, from forward
    delta_ptr           [batch, HEADS, seq] float32, output
    cos_ptr, sin_ptr    [seq, HALF] float32
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_Q)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k_ptr, k_tail_ptr, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v_ptr, v_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
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

    q_tile = _load(q, batch, start, 2 * column)
    lse = tl.load(lse_ptr + offsets, queries < seq, other=0.0)
    dq = [tl.zeros(x.shape, tl.float32) for x in q_tile]
    for diagonal in tl.static_range(2):
        for key in tl.range(start * diagonal, tl.minimum(start + BLOCK_Q * diagonal, seq), BLOCK_K):
            k_tile = _load(k, batch, key, 2 * column + HEAD_DIM)
            p = tl.exp2(_dot_transposed(q_tile, k_tile) * SCALE - lse[:, None])  # [BLOCK_Q, BLOCK_K]
            if diagonal:
                p = tl.where(queries[:, None] >= (key + tl.arange(0, BLOCK_K))[None, :], p, 0.0)
            dp = _dot_transposed(d_out_tile, _load(v, batch, key, 3 * column + 2 * HEAD_DIM))
            dq = _accumulate(dq, p * (dp - delta[:, None]), k_tile)
    dq = [x * HEAD_DIM**-0.5 for x in dq]
    _store_rotated_back(d_qkv, batch, start, 3 * column, dq, cos_ptr, sin_ptr, seq, HALF)


@triton.jit
def attention_dkv_kernel(
    q_ptr, q_tail_ptr, k_ptr, k_tail_ptr, v_ptr, v_tail_ptr, d_out_ptr, d_out_tail_ptr,
    d_qkv_ptr, d_qkv_tail_ptr, lse_ptr, delta_ptr, cos_ptr, sin_ptr, seq,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of keys (if DK), and of their values (if DV).

    q_ptr, k_ptr        [batch, seq, HEADS, 2, HEAD_DIM], rotated queries and keys
    v_ptr               [batch, seq, HEADS, 3, HEAD_DIM], qkv
    d_out_ptr           [batch, seq, HEADS, HEAD_DIM], gradient of the output
    d_qkv_ptr           [batch, seq, HEADS, 3, HEAD_DIM], output: the keys' and the values' part of the gradient
    lse_ptr, delta_ptr  [batch, HEADS, seq] float32, from forward and from attention_dq_kernel
    cos_ptr, sin_ptr    [seq, HALF] float32

    Scores are computed as [keys, queries], so p^T and ds^T are left operands of a dot without a transposition. To
    transpose the result of a dot in registers is slow, and wrong on Hopper before Triton 3.7.1.
    """
    WIDTH: tl.constexpr = HEADS * HEAD_DIM
    SCALE: tl.constexpr = LOG2_E * HEAD_DIM**-0.5

    blocks = tl.cdiv(seq, BLOCK_K)
    start = tl.program_id(0) % blocks * BLOCK_K  # the most queries see the early keys, so they start first
    row = tl.program_id(0) // blocks
    batch, column = row // HEADS, row % HEADS * HEAD_DIM
    q = _chunks(q_ptr, q_tail_ptr, batch, seq, BLOCK_Q, 2 * WIDTH, HEAD_DIM)
    k = _chunks(k_ptr, k_tail_ptr, batch, seq, BLOCK_K, 2 * WIDTH, HEAD_DIM)
    v = _chunks(v_ptr, v_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    d_out = _chunks(d_out_ptr, d_out_tail_ptr, batch, seq, BLOCK_Q, WIDTH, HEAD_DIM)
    d_qkv = _chunks(d_qkv_ptr, d_qkv_tail_ptr, batch, seq, BLOCK_K, 3 * WIDTH, HEAD_DIM)
    keys = start + tl.arange(0, BLOCK_K)

    k_tile = _load(k, batch, start, 2 * column + HEAD_DIM)
    if DK:
        v_tile = _load(v, batch, start, 3 * column + 2 * HEAD_DIM)
    dk = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    dv = [tl.zeros(x.shape, tl.float32) for x in k_tile]
    for past in tl.static_range(2):  # first the queries of these positions, with a mask, then those behind them
        last = seq if past else tl.minimum(start + BLOCK_K, seq)
        for query in tl.range(start + BLOCK_K * past, last, BLOCK_Q):
            queries = query + tl.arange(0, BLOCK_Q)
            offsets = row.to(tl.int64) * seq + queries
            q_tile = _load(q, batch, query, 2 * column)
            lse = tl.load(lse_ptr + offsets, queries < seq, other=0.0)
            p = tl.exp2(_dot_transposed(k_tile, q_tile) * SCALE - lse[None, :])  # [BLOCK_K, BLOCK_Q]
            if not past:
                p = tl.where(queries[None, :] >= keys[:, None], p, 0.0)
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
        dk = [x * HEAD_DIM**-0.5 for x in dk]
        _store_rotated_back(d_qkv, batch, start, 3 * column + HEAD_DIM, dk, cos_ptr, sin_ptr, seq, HALF)


# ---- op --------------------------------------------------------------------------------------------------------------

CHUNKS = {16: (16,), 32: (32,), 64: (64,), 80: (64, 16), 128: (128,), 256: (128, 128)}  # columns, by head_dim


def _tiles(arch: int, **tensors: tuple[Tensor, int]) -> dict[str, "Tensor | TensorDescriptor | None"]:
    """Kernel arguments X_ptr and X_tail_ptr for every X=(tensor [batch, seq, .., head_dim], rows of a tile)."""
    arguments = {}
    for name, (x, rows) in tensors.items():
        widths, columns = CHUNKS[x.shape[-1]], x.flatten(2)
        chunks = [columns, columns[:, :, widths[0] :]][: len(widths)]
        if arch >= 90:
            chunks = [TensorDescriptor.from_tensor(chunk, [1, rows, width]) for chunk, width in zip(chunks, widths)]
        arguments[f"{name}_ptr"], arguments[f"{name}_tail_ptr"] = (*chunks, None)[:2]
    return arguments


def _launch(qkv: Tensor, tile: tiles.Tile) -> dict[str, int]:
    heads, head_dim = qkv.shape[2], qkv.shape[4]
    shape = {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
    return {**shape, "num_warps": tile.num_warps, "num_stages": tile.num_stages}


def _aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes, as TMA requires. autograd may pass a gradient with strides of 0."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _outputs(qkv: Tensor, *_) -> tuple[Tensor, Tensor]:
    batch, seq, heads, _, head_dim = qkv.shape
    return qkv.new_empty(batch, seq, heads, head_dim), qkv.new_empty(batch, heads, seq, dtype=torch.float32)


@torch.library.custom_op("tripod::rotary_attention", mutates_args=())
def _attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """out [batch, seq, heads, head_dim], and lse [batch, heads, seq] in base 2."""
    out, lse = _outputs(qkv)
    batch, seq, heads, _, head_dim = qkv.shape
    arch = tiles.architecture(qkv.device)
    tile = tiles.attention(arch, head_dim, qkv.dtype).forward
    q_rows, k_rows, qkv = tile.block_q, tile.block_k, _aligned(qkv)
    with torch.cuda.device_of(qkv):  # Triton launches on the current device
        rotated = rotate_qk(qkv, cos, sin)
        attention_forward_kernel[(triton.cdiv(seq, q_rows) * batch * heads,)](
            **_tiles(arch, q=(rotated, q_rows), k=(rotated, k_rows), v=(qkv, k_rows), out=(out, q_rows)),
            lse_ptr=lse, seq=seq, **_launch(qkv, tile),
        )  # fmt: skip
    return out, lse


@torch.library.custom_op("tripod::rotary_attention_backward", mutates_args=())
def _attention_backward(qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor, lse: Tensor, d_out: Tensor) -> Tensor:
    """The gradient of qkv, in its layout."""
    batch, seq, heads, _, head_dim = qkv.shape
    arch = tiles.architecture(qkv.device)
    dq, dk, dv = tiles.attention(arch, head_dim, qkv.dtype)[1:]
    qkv, out, d_out = _aligned(qkv), _aligned(out), _aligned(d_out)
    d_qkv, delta = torch.empty_like(qkv), torch.empty_like(lse)
    others = {"lse_ptr": lse, "delta_ptr": delta, "cos_ptr": cos, "sin_ptr": sin, "seq": seq, "HALF": cos.shape[1]}
    with torch.cuda.device_of(qkv):
        rotated = rotate_qk(qkv, cos, sin)
        q_rows, k_rows = dq.block_q, dq.block_k
        inputs = {"q": (rotated, q_rows), "k": (rotated, k_rows), "v": (qkv, k_rows), "d_out": (d_out, q_rows)}
        attention_dq_kernel[(triton.cdiv(seq, q_rows) * batch * heads,)](
            **_tiles(arch, **inputs, out=(out, q_rows), d_qkv=(d_qkv, q_rows)), **others, **_launch(qkv, dq)
        )
        for tile, want_dk, want_dv in [(dk, True, dv is None)] + ([] if dv is None else [(dv, False, True)]):
            q_rows, k_rows = tile.block_q, tile.block_k
            inputs = {"q": (rotated, q_rows), "k": (rotated, k_rows), "v": (qkv, k_rows), "d_out": (d_out, q_rows)}
            attention_dkv_kernel[(triton.cdiv(seq, k_rows) * batch * heads,)](
                **_tiles(arch, **inputs, d_qkv=(d_qkv, k_rows)), **others, DK=want_dk, DV=want_dv, **_launch(qkv, tile)
            )
    return d_qkv


def _attention_setup_context(ctx, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _attention_gradients(ctx, d_out: Tensor, _) -> tuple[Tensor | None, ...]:
    return _attention_backward(*ctx.saved_tensors, d_out), None, None


_attention.register_fake(_outputs)
_attention_backward.register_fake(lambda qkv, *_: torch.empty_like(qkv))
_attention.register_autograd(_attention_gradients, setup_context=_attention_setup_context)


def _check_for_kernels(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check what the kernels require beyond the reference."""
    head_dim, rotary_dim = qkv.shape[4], 2 * cos.shape[1]
    if head_dim not in CHUNKS:
        raise ValueError(f"the kernels support head_dim {', '.join(map(str, CHUNKS))}, not {head_dim}")
    if not 0 < rotary_dim <= CHUNKS[head_dim][0]:
        most = CHUNKS[head_dim][0]
        raise ValueError(f"the kernels rotate 2 to {most} of the {head_dim} columns of a head, not {rotary_dim}")
    if qkv.dtype == torch.bfloat16 and not qkv.is_cuda:
        raise ValueError("Triton's interpreter cannot multiply bfloat16: use float16 or float32, or a GPU")
    if qkv.numel() == 0 or not qkv.is_contiguous():
        raise ValueError(f"qkv must be contiguous and not empty: {list(qkv.shape)}, strides {list(qkv.stride())}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != torch.float32 or not table.is_contiguous():
            raise ValueError(f"{name} must be contiguous float32, not {table.dtype}, strides {list(table.stride())}")


def rotary_attention(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Causal attention of rotated queries and keys: [batch, seq, heads, head_dim] in the dtype of qkv.

    qkv [batch, seq, heads, 3, head_dim] is the output of the fused projection; cos and sin are [seq, rotary_dim / 2].
    Raises ValueError if an argument does not fit. The kernels also require contiguous tensors and a head_dim of CHUNKS.
    """
    if qkv.dim() != 5 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [batch, seq, heads, 3, head_dim], not {list(qkv.shape)}")
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[0] != qkv.shape[1] or 2 * cos.shape[1] > qkv.shape[4]:
        wanted = f"[seq, rotary_dim / 2] with seq = {qkv.shape[1]} and rotary_dim <= {qkv.shape[4]}"
        raise ValueError(f"cos and sin must be {wanted}, not {list(cos.shape)} and {list(sin.shape)}")
    if qkv.device != cos.device or qkv.device != sin.device:
        raise ValueError(f"qkv, cos and sin must be on one device, not {qkv.device}, {cos.device} and {sin.device}")
    if triton_runs(qkv):
        _check_for_kernels(qkv, cos, sin)
        return _attention(qkv, cos, sin)[0]
    return (short_attention if short_attention_runs(qkv) else rotary_attention_reference)(qkv, cos, sin)
