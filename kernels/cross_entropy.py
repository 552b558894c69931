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


def _softmax_of_chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [chunk] and probabilities [chunk, vocab], both at least float32, of hidden [chunk, hidden]."""
    # Half-precision logits are cast up before the softmax, as in GPT-NeoX v1.0.
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    target_logit = logits.gather(1, targets[:, None])
    largest = logits.amax(dim=1, keepdim=True)
    probabilities = torch.softmax(logits, dim=1, out=logits)
    # The largest probability is exp(largest - lse) >= 1 / vocab, so its logarithm is safe where that of p_t is not.
    lse = largest - probabilities.amax(dim=1, keepdim=True).log()
    return (lse - target_logit)[:, 0], probabilities


def _gradient_of_chunk(probabilities: Tensor, targets: Tensor) -> Tensor:
    """softmax - onehot, written over the probabilities [chunk, vocab]."""
    return probabilities.scatter_add_(1, targets[:, None], probabilities.new_full((len(targets), 1), -1.0))


def _accumulate(d_weight: Tensor, d_logits: Tensor, y: Tensor) -> None:
    """d_weight += d_logits^T y in the dtype of d_weight."""
    if d_weight.dtype == y.dtype:
        d_weight.addmm_(d_logits.T, y)
    else:
        d_weight += d_logits.T @ y


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, need_gradient: bool) -> Tensor:
        losses = torch.empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        cast_weight = weight.to(hidden.dtype)
        ctx.mean = mean
        if not (mean and need_gradient):
            for i in range(0, len(hidden), CHUNK):
                losses[i : i + CHUNK], _ = _softmax_of_chunk(hidden[i : i + CHUNK], cast_weight, targets[i : i + CHUNK])
            ctx.save_for_backward(hidden, weight, targets)
            return losses.mean() if mean else losses

        # Every token will get the same incoming gradient, so its own can be formed now.
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), CHUNK):
            y, t = hidden[i : i + CHUNK], targets[i : i + CHUNK]
            losses[i : i + CHUNK], probabilities = _softmax_of_chunk(y, cast_weight, t)
            d_logits = _gradient_of_chunk(probabilities, t).to(y.dtype)
            torch.mm(d_logits, cast_weight, out=d_hidden[i : i + CHUNK])
            _accumulate(d_weight, d_logits, y)
        ctx.save_for_backward(d_hidden, d_weight)
        return losses.mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.mean:
            d_hidden, d_weight = ctx.saved_tensors
            scale = d_loss / len(d_hidden)
            # In place: a second backward over one graph is refused by autograd, which sees that they have changed.
            return d_hidden.mul_(scale), d_weight.mul_(scale), None, None, None
        hidden, weight, targets = ctx.saved_tensors
        cast_weight = weight.to(hidden.dtype)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for i in range(0, len(hidden), CHUNK):
            y, t = hidden[i : i + CHUNK], targets[i : i + CHUNK]
            _, probabilities = _softmax_of_chunk(y, cast_weight, t)
            d_logits = _gradient_of_chunk(probabilities, t).mul_(d_loss[i : i + CHUNK, None]).to(y.dtype)
            torch.mm(d_logits, cast_weight, out=d_hidden[i : i + CHUNK])
            _accumulate(d_weight, d_logits, y)
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
