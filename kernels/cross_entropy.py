"""Unembedding and cross-entropy without ever holding all logits.

For one token with final hidden state y [hidden], unembedding W [vocab, hidden] and next token t,

    logits  z = W y                       [vocab]
    loss    l = log(sum over j of exp(z_j)) - z_t
    gradient    dl/dz = softmax(z) - onehot(t),    dl/dy = W^T dl/dz,    dl/dW = dl/dz y^T

The logits of a micro-batch are by far the largest tensor of a small model: 8 x 2048 tokens x 50304 x 4 bytes = 3.3 GB,
several times over. But the gradient of a token needs only its own logits. So the tokens are taken in a few chunks, and
while the logits of a chunk are at hand they are overwritten by their softmax and then by their gradient, from which dy
and dW follow at once. Nothing is computed twice, and the extra memory is one chunk.

The gradient is kept *unscaled* (between -1 and 1) until backward multiplies dy and dW by the incoming gradient and
1 / tokens: scaled early, almost all of it would vanish in float16.
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton, triton_runs
from kernels.linear import product

CHUNK = 1024  # tokens; large enough for efficient products, 206 MB of float32 logits at a vocabulary of 50304
CAST = 32  # rows of half-precision logits that a CPU casts up at a time: 6 MB of float32, which stay in its cache


def _losses_in_place(
    logits: Tensor, targets: Tensor, losses: Tensor, d_losses: Tensor | None, with_gradients: bool
) -> None:
    """Write the losses [tokens] of logits [tokens, vocab]; with gradients, overwrite the logits by the gradient of the
    sum of losses, weighed by d_losses [tokens, 1].

    Half-precision logits are cast up before the softmax, as in GPT-NeoX v1.0.
    """
    cast = logits.dtype != losses.dtype
    step = CAST if cast and not logits.is_cuda else len(logits)
    wide = losses.new_empty(step if cast else 0, logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z, t = logits[rows], targets[rows]
        # The same memory for all: logits, then probabilities, then the gradient of the logits.
        p = wide[: len(z)].copy_(z) if cast else z
        torch.softmax(p, dim=1, out=p)
        losses[rows] = -p.gather(1, t)[:, 0].log()
        if with_gradients:
            p.scatter_add_(1, t, p.new_full(t.shape, -1.0))  # softmax - onehot
            if d_losses is not None:
                p.mul_(d_losses[rows])
            if cast:
                z.copy_(p)


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss of every token [tokens], and the gradients of their sum, weighed by d_losses [tokens]."""
    cast_weight, wide = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    d_hidden, d_weight = (torch.empty_like(hidden), torch.empty_like(weight)) if with_gradients else (None, None)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden)))
        y, t = hidden[rows], targets[rows, None]  # [chunk, hidden], [chunk, 1]
        logits = product(y, cast_weight)  # [chunk, vocab]
        _losses_in_place(logits, t, losses[rows], None if d_losses is None else d_losses[rows, None], with_gradients)
        if with_gradients:
            d_hidden[rows] = product(logits, cast_weight.T)
            if d_weight.dtype == y.dtype:
                torch.addmm(d_weight, logits.T, y, beta=0 if start == 0 else 1, out=d_weight)  # 0: overwrite
            elif start == 0:
                d_weight.copy_(logits.T @ y)
            else:
                d_weight += logits.T @ y  # accumulated in float32
        del logits  # before memory is taken for the next chunk
    unlikely = losses > 80  # p_t is too small for float32 to hold well, or at all: the loss is lse - z_t
    if unlikely.any():
        logits = (hidden[unlikely] @ cast_weight.T).to(wide)
        losses[unlikely] = logits.logsumexp(dim=1) - logits.gather(1, targets[unlikely, None])[:, 0]
    return losses, d_hidden, d_weight


TRITON_CHUNK = 4096  # tokens: the weight gradient is read and written once a chunk; 412 MB of bfloat16 logits
LANES = 1024  # threads on a row: two rows fill a multiprocessor, and the rows in flight stay in the L2 cache


@triton.jit
def _cross_entropy_kernel(
    logits,  # [tokens, VOCAB]; overwritten by their gradient
    targets,  # [tokens] int64
    losses,  # [tokens] float32
    d_losses,  # [tokens] float32, the incoming gradients; None for ones
    VOCAB: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits that a thread loads at once, 16 bytes
):
    """A program takes one row and sweeps over its logits twice: to find their maximum and the sum of
    exp(z - maximum), and, while they are still in the L2 cache, to overwrite them by softmax - onehot.

    Every lane keeps a maximum and a sum of its own, which is rescaled when the maximum grows (Milakov & Gimelshein
    2018, arXiv:1805.02867). The lanes are combined once, at the end: inside the loops no thread waits for another's
    numbers. num_stages=3 has two blocks of logits on their way from memory while a third is being worked on.
    """
    row = tl.program_id(0).to(tl.int64)  # 64 bits: tokens x vocab may be more than 2^31
    logits += row * VOCAB
    target = tl.load(targets + row)
    known = (target >= 0) & (target < VOCAB)  # any other token has a loss of NaN: a kernel can not raise
    z_target = tl.load(logits + target, mask=known, other=float("nan")).to(tl.float32)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]

    maxima = tl.full([LANES], -3.4e38, tl.float32)  # finite: a lane that sees no logit must not form inf - inf
    sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, VOCAB, LANES * VECTOR, num_stages=3):
        columns = start + offsets
        z = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maxima, tl.max(z, axis=1))
        sums = sums * tl.exp(maxima - larger) + tl.sum(tl.exp(z - larger[:, None]), axis=1)
        maxima = larger
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
    tl.store(losses + row, (maximum - z_target) + tl.log(total))  # in this order nothing cancels when z is large

    if WITH_GRADIENT:
        tl.debug_barrier()  # all threads have read z_target before one overwrites it
        d_loss = 1.0 if d_losses is None else tl.load(d_losses + row)
        factor = d_loss / total
        for start in tl.range(0, VOCAB, LANES * VECTOR, num_stages=3):
            columns = start + offsets
            z = tl.load(logits + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
            dz = tl.exp(z - maximum) * factor
            dz = tl.where(columns == target, dz - d_loss, dz)
            tl.store(logits + columns, dz.to(logits.dtype.element_ty), mask=columns < VOCAB)


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, losses: Tensor, d_losses: Tensor | None, with_gradient: bool
) -> None:
    """Write the losses [tokens] of logits [tokens, vocab]; with_gradient, overwrite the logits by the gradient of the
    sum of losses, weighed by d_losses [tokens] unless that is None. All contiguous."""
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        _cross_entropy_kernel[(len(logits),)](
            logits,
            targets,
            losses,
            d_losses,
            VOCAB=logits.shape[1],
            WITH_GRADIENT=with_gradient,
            LANES=LANES,
            VECTOR=16 // logits.element_size(),
            num_warps=LANES // 32,
        )


def _by_chunks_on_triton(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What _by_chunks computes, but the weight gradient is summed and returned in float32 whatever weight is."""
    cast_weight, targets = weight.to(hidden.dtype), targets.contiguous()
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    all_logits = hidden.new_empty(min(TRITON_CHUNK, len(hidden)), len(weight))  # the same memory for every chunk
    d_hidden = torch.empty_like(hidden) if with_gradients else None
    d_weight = torch.empty_like(weight, dtype=torch.float32) if with_gradients else None
    for start in range(0, len(hidden), TRITON_CHUNK):
        rows = slice(start, min(start + TRITON_CHUNK, len(hidden)))
        y = hidden[rows]  # [chunk, hidden]
        logits = all_logits[: len(y)]  # [chunk, vocab]
        torch.mm(y, cast_weight.T, out=logits)
        d_chunk = None if d_losses is None else d_losses[rows]
        cross_entropy_in_place(logits, targets[rows], losses[rows], d_chunk, with_gradients)
        if with_gradients:
            torch.mm(logits, cast_weight, out=d_hidden[rows])
            _add_product(d_weight, logits.T, y, first=start == 0)
    return losses, d_hidden, d_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, summed in the float32 of total whatever a and b are; the first product overwrites total."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


@torch.library.custom_op("tripod::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, with_gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [tokens] or their mean, and the gradients of the sum of losses (if not wanted, empty)."""
    by_chunks = _by_chunks_on_triton if triton_runs(hidden) else _by_chunks
    losses, d_hidden, d_weight = by_chunks(hidden, weight, targets, with_gradients)
    loss = losses.mean() if mean else losses
    if not with_gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0)
    return loss, d_hidden, d_weight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, mean, with_gradients):
    loss = hidden.new_empty(() if mean else hidden.shape[:1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    if not with_gradients:
        return loss, hidden.new_empty(0), weight.new_empty(0)
    return loss, torch.empty_like(hidden), torch.empty_like(weight)


@torch.library.custom_op("tripod::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_losses: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum of losses weighed by d_losses [tokens]."""
    by_chunks = _by_chunks_on_triton if triton_runs(hidden) else _by_chunks
    _, d_hidden, d_weight = by_chunks(hidden, weight, targets, True, d_losses.contiguous())
    return d_hidden, d_weight.to(weight.dtype)


@_linear_cross_entropy_backward.register_fake
def _(hidden, weight, targets, d_losses):
    return torch.empty_like(hidden), torch.empty_like(weight)


def _setup_context(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    # With a mean every token gets the same incoming gradient, so its own was formed already.
    ctx.formed = inputs[-1]
    ctx.set_materialize_grads(False)  # or there were zeros as large as the gradients, for these themselves
    ctx.save_for_backward(*(output[1:] if ctx.formed else inputs[:3]))


@torch.autograd.function.once_differentiable
def _backward(ctx, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.formed:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / d_hidden.shape[0]
        return _scaled(d_hidden, scale), _scaled(d_weight, scale), None, None, None
    return *_linear_cross_entropy_backward(*ctx.saved_tensors, d_loss), None, None, None


def _scaled(d: Tensor, scale: Tensor) -> Tensor:
    """d times a scalar, in the dtype of the scalar: 1 / tokens in 16 bits would make every gradient wrong alike."""
    if d.dtype == scale.dtype:
        return d * scale
    return d.to(scale.dtype).mul_(scale).to(d.dtype)


_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the logits hidden @ weight.T, which are never held all at once.

    hidden [tokens, hidden], weight [vocab, hidden], targets [tokens] int64. The products are formed in the dtype of
    hidden; a float32 weight gets a gradient accumulated in float32 whatever that is. Returns a scalar (the mean over
    tokens) or, with reduction "none", the loss of every token [tokens], in at least float32. Raises ValueError when
    shapes, dtypes or devices do not fit. Targets must be ids of the vocabulary, and none is ignored: another one is an
    error of torch's where the definition runs, and a loss that is not a number where the kernels do.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(hidden):
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [tokens, hidden] and weight [vocab, hidden], not {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{len(hidden)}] like the tokens of hidden, not {list(targets.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')
    if not (hidden.is_floating_point() and weight.is_floating_point() and targets.dtype == torch.int64):
        dtypes = f"{hidden.dtype}, {weight.dtype} and {targets.dtype}"
        raise ValueError(f"hidden and weight must be of floating point and targets int64, not {dtypes}")
    if not hidden.device == weight.device == targets.device:
        devices = f"{hidden.device}, {weight.device} and {targets.device}"
        raise ValueError(f"hidden, weight and targets must be on one device, not {devices}")
    mean = reduction == "mean"
    with_gradients = mean and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _linear_cross_entropy(hidden, weight, targets, mean, with_gradients)[0]
