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

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1024  # tokens; large enough for efficient products, 206 MB of float32 logits at a vocabulary of 50304


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """For each chunk of tokens: where it is, its probabilities [chunk, vocab] in at least float32, and room of the same
    shape in the dtype of hidden. Both are the same memory in every chunk, and one another's where the dtypes are equal.
    """
    logits = hidden.new_empty(min(CHUNK, len(hidden)), len(weight))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    probabilities = logits if wide == hidden.dtype else torch.empty_like(logits, dtype=wide)
    for start in range(0, len(hidden), CHUNK):
        rows = slice(start, min(start + CHUNK, len(hidden)))
        z, p = logits[: rows.stop - start], probabilities[: rows.stop - start]
        torch.mm(hidden[rows], weight.T, out=z)
        p.copy_(z)  # half-precision logits are cast up before the softmax, as in GPT-NeoX v1.0
        yield rows, torch.softmax(p, dim=1, out=p), z


def _losses(probabilities: Tensor, targets: Tensor) -> Tensor:
    """-log p_t [chunk]; infinite where p_t has vanished."""
    return -probabilities.gather(1, targets[:, None])[:, 0].log()


def _repair(losses: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Compute the losses anew, as lse - z_t, of tokens so unlikely that p_t is too small for its dtype to hold well."""
    lost = losses > 80
    if lost.any():
        logits = (hidden[lost] @ weight.T).to(losses.dtype)
        losses[lost] = logits.logsumexp(dim=1) - logits.gather(1, targets[lost, None])[:, 0]


def _add_gradients(
    d_hidden: Tensor,
    d_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    probabilities: Tensor,
    d_logits: Tensor,
    d_loss: Tensor | None = None,
) -> None:
    """Write the gradient of a chunk's hidden states, and add that of the weight, from the chunk's probabilities.

    d_loss [chunk] weighs the tokens; None weighs each with 1. d_logits is room for the gradient in the dtype of hidden.
    """
    t = targets[:, None]
    probabilities.scatter_add_(1, t, probabilities.new_full(t.shape, -1.0))  # softmax - onehot
    if d_loss is not None:
        probabilities.mul_(d_loss[:, None])
    d_logits.copy_(probabilities)
    torch.mm(d_logits, weight, out=d_hidden)
    if d_weight.dtype == hidden.dtype:
        d_weight.addmm_(d_logits.T, hidden)
    else:
        d_weight += d_logits.T @ hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, need_gradient: bool) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        cast_weight = weight.to(hidden.dtype)
        # With a mean every token will get the same incoming gradient, so its own can be formed now.
        ctx.formed = mean and need_gradient
        if ctx.formed:
            d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, probabilities, room in _chunks(hidden, cast_weight):
            y, t = hidden[rows], targets[rows]
            losses[rows] = _losses(probabilities, t)
            if ctx.formed:
                _add_gradients(d_hidden[rows], d_weight, y, cast_weight, t, probabilities, room)
        _repair(losses, hidden, cast_weight, targets)
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
        hidden, weight, targets = ctx.saved_tensors
        cast_weight = weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows, probabilities, room in _chunks(hidden, cast_weight):
            y, t = hidden[rows], targets[rows]
            _add_gradients(d_hidden[rows], d_weight, y, cast_weight, t, probabilities, room, d_loss[rows])
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
