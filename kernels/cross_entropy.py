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

CHUNK = 1024  # tokens; large enough for efficient products, 206 MB of float32 logits at a vocabulary of 50304


def _by_chunks(
    hidden: Tensor, weight: Tensor, targets: Tensor, with_gradients: bool, d_losses: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Loss of every token [tokens], and the gradients of their sum, weighed by d_losses [tokens]."""
    cast_weight, wide = weight.to(hidden.dtype), torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(len(hidden), dtype=wide)
    # The same memory for every chunk: logits, then probabilities, then the gradient of the logits.
    all_logits = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    all_probabilities = all_logits if wide == hidden.dtype else torch.empty_like(all_logits, dtype=wide)
    d_hidden, d_weight = (torch.empty_like(hidden), torch.zeros_like(weight)) if with_gradients else (None, None)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden)))
        y, t = hidden[rows], targets[rows, None]  # [chunk, hidden], [chunk, 1]
        logits, probabilities = all_logits[: len(y)], all_probabilities[: len(y)]  # [chunk, vocab]
        torch.mm(y, cast_weight.T, out=logits)
        probabilities.copy_(logits)  # half-precision logits are cast up before the softmax, as in GPT-NeoX v1.0
        torch.softmax(probabilities, dim=1, out=probabilities)
        losses[rows] = -probabilities.gather(1, t)[:, 0].log()
        if with_gradients:
            d_logits = probabilities.scatter_add_(1, t, probabilities.new_full(t.shape, -1.0))  # softmax - onehot
            if d_losses is not None:
                d_logits.mul_(d_losses[rows, None])
            d_logits = logits.copy_(d_logits)
            torch.mm(d_logits, cast_weight, out=d_hidden[rows])
            if d_weight.dtype == y.dtype:
                d_weight.addmm_(d_logits.T, y)
            else:
                d_weight += d_logits.T @ y  # accumulated in float32
    unlikely = losses > 80  # p_t is too small for float32 to hold well, or at all: the loss is lse - z_t
    if unlikely.any():
        logits = (hidden[unlikely] @ cast_weight.T).to(wide)
        losses[unlikely] = logits.logsumexp(dim=1) - logits.gather(1, targets[unlikely, None])[:, 0]
    return losses, d_hidden, d_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, need_gradient: bool) -> Tensor:
        # With a mean every token will get the same incoming gradient, so its own can be formed now.
        ctx.formed = mean and need_gradient
        losses, d_hidden, d_weight = _by_chunks(hidden, weight, targets, ctx.formed)
        ctx.save_for_backward(*((d_hidden, d_weight) if ctx.formed else (hidden, weight, targets)))
        return losses.mean() if mean else losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.formed:
            d_hidden, d_weight = ctx.saved_tensors
            scale = d_loss / len(d_hidden)
            # In place: a second backward over one graph is refused by autograd, which sees that they have changed.
            return d_hidden.mul_(scale), d_weight.mul_(scale), None, None, None
        _, d_hidden, d_weight = _by_chunks(*ctx.saved_tensors, True, d_loss)
        return d_hidden, d_weight, None, None, None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of the logits hidden @ weight.T, which are never held all at once.

    hidden [tokens, hidden], weight [vocab, hidden], targets [tokens] int64. The products are formed in the dtype of
    hidden; a float32 weight gets a gradient accumulated in float32 whatever that is. Returns a scalar (the mean over
    tokens) or, with reduction "none", the loss of every token [tokens], in at least float32. Raises ValueError when
    shapes do not fit.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or not len(hidden):
        shapes = f"{list(hidden.shape)} and {list(weight.shape)}"
        raise ValueError(f"hidden must be [tokens, hidden] and weight [vocab, hidden], not {shapes}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{len(hidden)}] like the tokens of hidden, not {list(targets.shape)}")
    if reduction not in ("mean", "none"):
        raise ValueError(f'reduction must be "mean" or "none", not {reduction!r}')
    need_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, reduction == "mean", need_gradient)
