"""Bias and GELU between the two projections of the MLP.

    gelu(h) = h * P(Z <= h) for a standard normal Z                                        ("none": exact, by erf)
    gelu(h) = h / 2 * (1 + tanh(sqrt(2 / pi) * (h + 0.044715 h^3)))                         ("tanh")

Pythia was *trained* with the tanh form (every configuration sets `bias-gelu-fusion`, whose code is tanh) while the
published config.json says "gelu", which Hugging Face evaluates by erf. The two differ by at most 4.7e-4 in a point.
"""

import torch.nn.functional as F
from torch import Tensor


def bias_gelu(h: Tensor, bias: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(h + bias) for h [.., ffn] and bias [ffn]; approximate is "tanh" or "none". Same shape and dtype as h."""
    if bias.shape != h.shape[-1:]:
        raise ValueError(f"bias must be [{h.shape[-1]}] like the last dimension of h, not {list(bias.shape)}")
    return F.gelu(h + bias, approximate=approximate)
