"""Unembedding and cross-entropy without ever holding all logits.

For one token with final hidden state y [hidden], unembedding W [vocab, hidden] and next token t,

    logits  z = W y                       [vocab]
    loss    l = log(sum over j of exp(z_j)) - z_t
    gradient    dl/dz = softmax(z) - onehot(t),    dl/dy = W^T dl/dz,    dl/dW = dl/dz y^T

The logits of a micro-batch are by far the largest tensor of a small model: 8 x 2048 tokens x 50304 x 4 bytes = 3.3 GB,
several times over. But the gradient of a token needs only the logits of this token. So the tokens are taken in a few
chunks. The logits of a chunk are overwritten by their softmax and then by their gradient, from which dy and dW are
computed at once. Nothing is computed twice, and the extra memory is one chunk.

The gradient is kept *unscaled* (between -1 and 1) until backward multiplies dy and dW by the incoming gradient and
1 / tokens. Scaled earlier, almost all of it would underflow in float16.
"""

import torch
from torch import Tensor

from kernels.backend import tl, triton, triton_runs
from kernels.linear import matmul

# ---- reference -------------------------------------------------------------------------------------------------------

CHUNK = 1024  # tokens; large enough for efficient matmuls, 206 MB of float32 logits at a vocabulary of 50304
CAST = 32  # rows of half-precision logits that a CPU casts at a time: 6 MB of float32, which fit into its cache


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss of every token [tokens], and gradients of hidden and weight, each token weighted by d_losses [tokens]."""
    cast_weight, wide = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    d_hidden, d_weight = (torch.empty_like(hidden), torch.empty_like(weight)) if with_gradients else (None, None)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden)))
        y, t = hidden[rows], targets[rows, None]  # [chunk, hidden], [chunk, 1]
        logits = matmul(y, cast_weight)  # [chunk, vocab]
        d_chunk = None if d_losses is None else d_losses[rows, None]
        _cross_entropy_in_place_reference(logits, t, losses[rows], d_chunk, with_gradients)
        if with_gradients:
            d_hidden[rows] = matmul(logits, cast_weight.T)
            if d_weight.dtype == y.dtype:
                torch.addmm(d_weight, logits.T, y, beta=0 if start == 0 else 1, out=d_weight)  # 0: overwrite
            elif start == 0:
                d_weight.copy_(logits.T @ y)
            else:
                d_weight += logits.T @ y  # accumulated in float32
        del logits  # frees its memory before the next chunk is allocated
    unlikely = losses > 80  # p_t is too small for float32 to represent well, or at all: the loss is lse - z_t
    if unlikely.any():
        logits = (hidden[unlikely] @ cast_weight.T).to(wide)
        losses[unlikely] = logits.logsumexp(dim=1) - logits.gather(1, targets[unlikely, None])[:, 0]
    return losses, d_hidden, d_weight


def _cross_entropy_in_place_reference(
    logits: Tensor, targets: Tensor, losses: Tensor, d_losses: Tensor | None, with_gradients: bool
) -> None:
    """Write the losses [tokens] of logits [tokens, vocab] and targets [tokens, 1]. With gradients, overwrite the logits
    by their gradient, each token weighted by d_losses [tokens, 1].

    Half-precision logits are cast to float32 before the softmax, as in GPT-NeoX v1.0.
    """
    cast = logits.dtype != losses.dtype
    step = CAST if cast and not logits.is_cuda else len(logits)
    wide = losses.new_empty(step if cast else 0, logits.shape[1])
    for start in range(0, len(logits), step):
        rows = slice(start, start + step)
        z, t = logits[rows], targets[rows]
        # p uses one memory for logits, then probabilities, then the gradient of the logits.
        p = wide[: len(z)].copy_(z) if cast else z
        torch.softmax(p, dim=1, out=p)
        losses[rows] = -p.gather(1, t)[:, 0].log()
        if with_gradients:
            p.scatter_add_(1, t, p.new_full(t.shape, -1.0))  # softmax - onehot
            if d_losses is not None:
                p.mul_(d_losses[rows])
            if cast:
                z.copy_(p)


# ---- kernels ---------------------------------------------------------------------------------------------------------

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    """exp(x), 0 below 1e-38. For smaller results tl.exp has three more instructions."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, d_losses_ptr,
    VOCAB: tl.constexpr, WITH_GRADIENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Loss of one row of logits a program, and the gradient of the logits in their place.

    logits_ptr    [tokens, VOCAB], overwritten by their gradient if WITH_GRADIENT
    targets_ptr   [tokens] int64
    losses_ptr    [tokens] float32, output
    d_losses_ptr  [tokens] float32, the incoming gradients, or None for ones

    A program sweeps over its logits twice. The first sweep finds their maximum and the sum of exp(z - maximum). The
    second overwrites them by softmax - onehot, while they are still in the L2 cache.

    Each of the LANES threads loads VECTOR logits at a time, 16 bytes. It keeps its own maximum and its own sum, which
    it rescales when the maximum grows (Milakov & Gimelshein 2018, arXiv:1805.02867). The lanes are combined once, at
    the end, so inside the loops no thread waits for another. With num_stages=3 two blocks of logits are being loaded
    while the program works on a third.
    """
    row = tl.program_id(0).to(tl.int64)  # int64: tokens * vocab may exceed 2^31
    logits_ptr += row * VOCAB
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < VOCAB)  # any other target gets a loss of NaN, because a kernel cannot raise
    z_target = tl.load(logits_ptr + target, mask=known, other=float("nan")).to(tl.float32)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]  # [LANES, VECTOR]

    maxima = tl.full([LANES], -3.4e38, tl.float32)  # finite, because a lane without logits must not compute inf - inf
    sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, VOCAB, LANES * VECTOR, num_stages=3):
        columns = start + offsets
        z = tl.load(logits_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maxima, tl.max(z, axis=1))
        sums = sums * _exp(maxima - larger) + tl.sum(_exp(z - larger[:, None]), axis=1)
        maxima = larger
    maximum = tl.max(maxima, axis=0)
    total = tl.sum(sums * _exp(maxima - maximum), axis=0)
    tl.store(losses_ptr + row, (maximum - z_target) + tl.log(total))  # in this order large logits do not cancel

    if WITH_GRADIENT:
        tl.debug_barrier()  # all threads must have read z_target before one of them overwrites it
        d_loss = 1.0 if d_losses_ptr is None else tl.load(d_losses_ptr + row)
        factor = d_loss / total
        for start in tl.range(0, VOCAB, LANES * VECTOR, num_stages=3):
            columns = start + offsets
            z = tl.load(logits_ptr + columns, mask=columns < VOCAB, other=float("-inf")).to(tl.float32)
            dz = _exp(z - maximum) * factor
            dz = tl.where(columns == target, dz - d_loss, dz)
            tl.store(logits_ptr + columns, dz.to(logits_ptr.dtype.element_ty), mask=columns < VOCAB)


# ---- op --------------------------------------------------------------------------------------------------------------

LANES = 1024  # threads for a row: a multiprocessor works on two rows, and the rows in work fit into the L2 cache
REGISTERS = 32  # of a thread: two rows have 2048 threads, and a multiprocessor has 65,536 registers


def triton_chunk(hidden: int) -> int:
    """Tokens of a chunk: 412 MB of bfloat16 logits, twice as much in narrow models.

    Every chunk reads and writes the float32 weight gradient once. The narrower the model, the larger is its share of
    the time of a step.
    """
    return 8192 if hidden <= 1024 else 4096


def cross_entropy_in_place(
    logits: Tensor, targets: Tensor, losses: Tensor, d_losses: Tensor | None, with_gradient: bool
) -> None:
    """Launch the kernel: write the losses [tokens] of logits [tokens, vocab]. With gradient, overwrite the logits by
    their gradient, each token weighted by d_losses [tokens] unless that is None. All tensors must be contiguous."""
    launch = {"LANES": LANES, "VECTOR": 16 // logits.element_size(), "num_warps": LANES // 32, "maxnreg": REGISTERS}
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        cross_entropy_kernel[(len(logits),)](
            logits, targets, losses, d_losses, VOCAB=logits.shape[1], WITH_GRADIENT=with_gradient, **launch
        )


def linear_cross_entropy_by_kernel(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As linear_cross_entropy_reference, but the weight gradient is float32 whatever the dtype of weight is."""
    cast_weight, targets = weight.to(hidden.dtype), targets.contiguous()
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    chunk = min(triton_chunk(hidden.shape[1]), len(hidden))
    all_logits = hidden.new_empty(chunk, len(weight))  # every chunk reuses this memory
    d_hidden = torch.empty_like(hidden) if with_gradients else None
    d_weight = torch.empty_like(weight, dtype=torch.float32) if with_gradients else None
    for start in range(0, len(hidden), chunk):
        rows = slice(start, min(start + chunk, len(hidden)))
        y = hidden[rows]  # [chunk, hidden]
        logits = all_logits[: len(y)]  # [chunk, vocab]
        torch.mm(y, cast_weight.T, out=logits)
        d_chunk = None if d_losses is None else d_losses[rows]
        cross_entropy_in_place(logits, targets[rows], losses[rows], d_chunk, with_gradients)
        if with_gradients:
            torch.mm(logits, cast_weight, out=d_hidden[rows])
            _add_matmul(d_weight, logits.T, y, first=start == 0)
    return losses, d_hidden, d_weight


def _add_matmul(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, summed in the float32 of total whatever the dtype of a and b; the first call overwrites total."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


@torch.library.custom_op("tripod::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, with_gradients: bool, loss_weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses [tokens], their weighted mean (empty without `mean`), and the gradients of the weighted sum of losses
    (empty without with_gradients)."""
    compute = linear_cross_entropy_by_kernel if triton_runs(hidden) else linear_cross_entropy_reference
    losses, d_hidden, d_weight = compute(hidden, weight, targets, with_gradients, loss_weights)
    weighted = losses if loss_weights is None else losses * loss_weights
    loss = weighted.mean() if mean else losses.new_empty(0)
    if not with_gradients:
        return losses, loss, hidden.new_empty(0), weight.new_empty(0)
    return losses, loss, d_hidden, d_weight.to(weight.dtype)


@torch.library.custom_op("tripod::linear_cross_entropy_backward", mutates_args=())
def _linear_cross_entropy_backward(
    hidden: Tensor, weight: Tensor, targets: Tensor, d_losses: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of hidden and weight, each token weighted by d_losses [tokens]."""
    compute = linear_cross_entropy_by_kernel if triton_runs(hidden) else linear_cross_entropy_reference
    _, d_hidden, d_weight = compute(hidden, weight, targets, True, d_losses.contiguous())
    return d_hidden, d_weight.to(weight.dtype)


@_linear_cross_entropy.register_fake
def _(hidden, weight, targets, mean, with_gradients, loss_weights):
    losses = hidden.new_empty(hidden.shape[:1], dtype=torch.promote_types(hidden.dtype, torch.float32))
    loss = losses.new_empty(() if mean else 0)
    return losses, loss, *(torch.empty_like(x) if with_gradients else x.new_empty(0) for x in (hidden, weight))


def _cross_entropy_setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.computed = inputs[4]  # forward computed the gradients: those of a mean wait for one number only
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zero tensors for the unused outputs
    ctx.save_for_backward(*(output[2:] if ctx.computed else inputs[:3]))


@torch.autograd.function.once_differentiable
def _cross_entropy_gradients(ctx, d_losses: Tensor, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.computed:
        d_hidden, d_weight = ctx.saved_tensors
        scale = d_loss / d_hidden.shape[0]
        return _scaled(d_hidden, scale), _scaled(d_weight, scale), None, None, None, None
    return *_linear_cross_entropy_backward(*ctx.saved_tensors, d_losses), None, None, None, None


def _scaled(d: Tensor, scale: Tensor) -> Tensor:
    """d times a scalar in the dtype of the scalar: 1 / tokens cast to 16 bits would bias every gradient equally."""
    if d.dtype == scale.dtype:
        return d * scale
    return d.to(scale.dtype).mul_(scale).to(d.dtype)


_linear_cross_entropy_backward.register_fake(lambda h, w, *_: (torch.empty_like(h), torch.empty_like(w)))
_linear_cross_entropy.register_autograd(_cross_entropy_gradients, setup_context=_cross_entropy_setup_context)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean", loss_weights: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy in nats of the logits hidden @ weight.T, which are never all held in memory.

    hidden [tokens, hidden], weight [vocab, hidden], targets [tokens] int64. Matmuls run in the dtype of hidden; a
    float32 weight gets a gradient accumulated in float32. Returns, in at least float32, a scalar (the mean over tokens)
    or, with reduction "none", the loss of every token [tokens], or, with "both", the pair of them. Gradients of the
    mean cost one pass over the logits, those of "none" two. So in "both" the losses of the tokens are without gradient.

    With loss_weights [tokens], at least float32, the mean is sum(loss_weights * losses) / tokens, whatever the sum of
    the weights is: a weight changes what this token contributes and nothing else. The losses of "both" have no weights.

    Raises ValueError if shapes, dtypes or devices do not fit. Targets must be ids of the vocabulary, and none is
    ignored. For another target the reference raises torch's error, and the kernel returns a loss of NaN.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(hidden):
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [tokens, hidden] and weight [vocab, hidden], not {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{len(hidden)}] like the tokens of hidden, not {list(targets.shape)}")
    if reduction not in ("mean", "none", "both"):
        raise ValueError(f'reduction must be "mean", "none" or "both", not {reduction!r}')
    if loss_weights is not None and (
        reduction == "none"
        or (loss_weights.shape, loss_weights.device) != (targets.shape, targets.device)
        or loss_weights.dtype not in (torch.float32, torch.float64)
    ):
        raise ValueError('loss_weights must be float32 or float64 like targets, and are for "mean" and "both"')
    if not (hidden.is_floating_point() and weight.is_floating_point() and targets.dtype == torch.int64):
        dtypes = f"{hidden.dtype}, {weight.dtype} and {targets.dtype}"
        raise ValueError(f"hidden and weight must have a floating point dtype and targets int64, not {dtypes}")
    if not hidden.device == weight.device == targets.device:
        devices = f"{hidden.device}, {weight.device} and {targets.device}"
        raise ValueError(f"hidden, weight and targets must be on one device, not {devices}")
    mean = reduction != "none"
    with_gradients = mean and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss_weights = None if loss_weights is None else loss_weights.contiguous()
    losses, loss, *_ = _linear_cross_entropy(hidden, weight, targets, mean, with_gradients, loss_weights)
    if reduction == "both":
        return loss, losses.detach()
    return loss if mean else losses
