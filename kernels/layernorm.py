"""Residual addition and the LayerNorms that read its result.

A Pythia layer is parallel: attention and MLP read two LayerNorms of the *same* input, and both outputs are added to it,

    x' = x + (attn + mlp)
    u  = (x' - mean) / sqrt(variance + eps) * weight1 + bias1       for the attention of the next layer
    v  = (x' - mean) / sqrt(variance + eps) * weight2 + bias2       for the MLP of the next layer

with mean and (biased) variance over the hidden dimension. The addition of one layer is joined with the LayerNorms of
the next because they touch the same numbers. The order of the sum is that of GPT-NeoX.
"""

import torch.nn.functional as F
from torch import Tensor


def add_residuals(x: Tensor, attn: Tensor | None, mlp: Tensor | None) -> Tensor:
    """x + (attn + mlp), all [.., hidden]; a branch that is None adds nothing. Raises ValueError on unequal shapes."""
    for name, branch in (("attn", attn), ("mlp", mlp)):
        if branch is not None and branch.shape != x.shape:
            raise ValueError(f"{name} must have the shape of x {list(x.shape)}, not {list(branch.shape)}")
    if attn is None or mlp is None:
        branch = mlp if attn is None else attn
        return x if branch is None else x + branch
    return x + (attn + mlp)


def add_layer_norm(
    x: Tensor, attn: Tensor | None, mlp: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """(x + (attn + mlp), its LayerNorm), both [.., hidden]; weight and bias are [hidden]."""
    x = add_residuals(x, attn, mlp)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_dual_layer_norm(
    x: Tensor,
    attn: Tensor | None,
    mlp: Tensor | None,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x' = x + (attn + mlp), LayerNorm1(x'), LayerNorm2(x')), all [.., hidden]; weights and biases are [hidden].

    attn and mlp are None before the first layer, whose input is the embedding alone.
    """
    x, u = add_layer_norm(x, attn, mlp, weight1, bias1, eps)
    return x, u, F.layer_norm(x, x.shape[-1:], weight2, bias2, eps)
