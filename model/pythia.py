"""The network: GPT-NeoX with parallel residuals, partial rotary embedding and untied embeddings.

    x = embed[tokens]
    for each layer:   x = x + attention(norm1(x)) + mlp(norm2(x))
    logits = unembed(final_norm(x))

The addition at the end of a layer is computed together with the norms at the start of the next layer. So a layer does
not return x + attn + mlp: it returns the terms, and the next layer adds them.

Parameters may have a wider dtype than the arithmetic: every matmul casts its weight to the dtype of its input.
"""

import hashlib
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (
    add_dual_layer_norm,
    add_layer_norm,
    bias_gelu,
    document_bounds,
    linear,
    linear_cross_entropy,
    linear_rotary_attention,
    rotary_tables,
    rotate,
)
from model.sizes import END_OF_TEXT, Config


class Affine(nn.Module):
    """Weight and bias of a projection or of a LayerNorm. Pythia.init_weights initialises them; kernels/ uses them."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))  # projection: [out, in], LayerNorm: [hidden]
        self.bias = nn.Parameter(torch.empty(shape[0]))


class KVCache:
    """Rotated keys and values of the tokens that one layer has seen: [batch, heads, capacity, head_dim] each."""

    def __init__(self, config: Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.k = torch.empty((batch, config.heads, capacity, config.head_dim), dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Append new tokens, qkv [batch, seq, heads, 3, head_dim], and let them attend to all tokens so far.

        Returns [batch, seq, heads, head_dim].
        """
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [batch, heads, seq, head_dim] each
        old, new = self.length, self.length + qkv.shape[1]
        self.k[:, :, old:new] = rotate(k, cos, sin)
        self.v[:, :, old:new] = v
        self.length = new
        q, k, v = rotate(q, cos, sin), self.k[:, :, :new], self.v[:, :, :new]
        mask = torch.ones(new - old, new, dtype=torch.bool, device=q.device).tril(diagonal=old)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


# The terms of a layer's output: x, attn, mlp [batch, seq, hidden], and branch_bias [hidden], the sum of the output
# biases of attention and MLP; None adds nothing. The biases are returned because FSDP frees a layer's parameters when
# its forward ends, and the next layer needs them.
Terms = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


class Block(nn.Module):
    """One layer."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.norm1 = Affine(config.hidden)
        self.norm2 = Affine(config.hidden)
        self.qkv = Affine(3 * config.hidden, config.hidden)  # rows ordered [head, (q, k, v), head_dim]
        self.attn_out = Affine(config.hidden, config.hidden)
        self.mlp_in = Affine(config.ffn, config.hidden)
        self.mlp_out = Affine(config.hidden, config.ffn)

    def attention(self, u: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None, documents: Tensor | None) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden], without the bias of attn_out."""
        heads, projection = self.config.heads, (self.qkv.weight, self.qkv.bias)
        if cache is None:
            out = linear_rotary_attention(u, *projection, cos, sin, heads, documents)  # [batch, seq, heads, head_dim]
        else:
            out = cache.attend(linear(u, *projection).unflatten(-1, (heads, 3, -1)), cos, sin)
        return linear(out.flatten(-2), self.attn_out.weight)

    def mlp(self, v: Tensor) -> Tensor:
        """[batch, seq, hidden] -> [batch, seq, hidden], without the bias of mlp_out."""
        h = linear(v, self.mlp_in.weight)  # [batch, seq, ffn]
        return linear(bias_gelu(h, self.mlp_in.bias, self.config.gelu), self.mlp_out.weight)

    def forward(
        self, terms: Terms, cos: Tensor, sin: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> Terms:
        """The terms of the layer before -> the terms of this layer. cos, sin: [seq, rotary_dim / 2].

        documents: the bounds of documents that attention does not cross (kernels.document_bounds); not with a cache.
        """
        norm1, norm2 = (self.norm1.weight, self.norm1.bias), (self.norm2.weight, self.norm2.bias)
        x, attn, mlp, bias = terms
        if self.config.parallel:
            x, u, v = add_dual_layer_norm(x, attn, mlp, *norm1, *norm2, self.config.eps, bias)
            return x, self.attention(u, cos, sin, cache, documents), self.mlp(v), self.attn_out.bias + self.mlp_out.bias
        x, u = add_layer_norm(x, attn, mlp, *norm1, self.config.eps, bias)
        attn = self.attention(u, cos, sin, cache, documents)
        x, v = add_layer_norm(x, attn, None, *norm2, self.config.eps, self.attn_out.bias)
        return x, None, self.mlp(v), self.mlp_out.bias.clone()


class Pythia(nn.Module):
    """A Pythia of the given shape, initialised as published from `seed` (unless built on the meta device).

    `compute_dtype` is the dtype of activations and matmuls; None: the dtype of the parameters. With `document_mask`
    attention does not cross the ends of documents, except with caches. Raises ValueError if hidden is not a multiple of
    heads.
    """

    def __init__(self, config: Config, seed: int = 1234):
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"hidden {config.hidden} is not a multiple of heads {config.heads}")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.document_mask = False
        self.embed = nn.Parameter(torch.empty(config.vocab, config.hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = Affine(config.hidden)
        self.unembed = nn.Parameter(torch.empty(config.vocab, config.hidden))
        if not self.embed.is_meta:
            self.init_weights(seed)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        caches: list[KVCache] | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [batch, seq, vocab] of tokens [batch, seq].

        With targets [batch, seq]: the cross-entropy in nats instead, its mean, or [batch, seq] with reduction "none",
        or with "both" the mean and, without gradient, [batch, seq]. The mean has loss_weights [batch, seq], if given.
        With caches, one a layer: tokens continue the sequence in the caches.
        """
        x = self.final_hidden(tokens, caches)
        if targets is None:
            return linear(x, self.unembed)
        loss_weights = None if loss_weights is None else loss_weights.flatten()
        loss = linear_cross_entropy(x.flatten(0, 1), self.unembed, targets.flatten(), reduction, loss_weights)
        if reduction == "both":
            return loss[0], loss[1].view(targets.shape)
        return loss if reduction == "mean" else loss.view(targets.shape)

    def final_hidden(self, tokens: Tensor, caches: list[KVCache] | None = None) -> Tensor:
        """What the unembedding turns into logits: [batch, seq, hidden] of tokens [batch, seq]; caches as in forward."""
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        x = F.embedding(tokens, self.embed)
        x = x.to(self.compute_dtype or x.dtype)  # [batch, seq, hidden]
        table_len = -(-end // self.config.seq_len) * self.config.seq_len  # few different tables
        cos, sin = _tables(self.config, table_len, x.dtype, x.device)
        cos, sin = cos[start:end], sin[start:end]
        documents = document_bounds(tokens, END_OF_TEXT) if self.document_mask else None
        terms = x, None, None, None
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            terms = block(terms, cos, sin, cache, documents)
        x, attn, mlp, bias = terms
        return add_layer_norm(x, attn, mlp, self.final_norm.weight, self.final_norm.bias, self.config.eps, bias)[1]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from Pythia's distributions. (No seed gives the published numbers: they are of GPUs.)"""
        for name, parameter in self.named_parameters():
            parameter.copy_(torch.from_numpy(initial_rows(self.config, name, tuple(parameter.shape), seed)))


def init_std(config: Config, name: str) -> float:
    """Standard deviation of the initial weights of a matrix.

                                                  "small" (most sizes)        "normal" (6.9b, 12b)
        attn_out, mlp_out                         2 / (layers sqrt(hidden))   0.02 / sqrt(2 layers)
        embed, unembed, qkv, mlp_in               sqrt(2 / (5 hidden))        0.02

    Sources: small_init is from Nguyen & Salazar 2019 (arXiv:1910.05895), wang_init from Mesh Transformer JAX. The right
    column has the defaults of GPT-NeoX, because the configurations of 6.9b and 12b set neither.
    """
    output = name.endswith(("attn_out.weight", "mlp_out.weight"))
    if config.init == "small":
        return 2 / (config.layers * config.hidden**0.5) if output else (2 / (5 * config.hidden)) ** 0.5
    return 0.02 / (2 * config.layers) ** 0.5 if output else 0.02


INIT_BLOCK = 128  # rows drawn from one generator


def initial_rows(config: Config, name: str, shape: tuple[int, ...], seed: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows `rows` of the initial value of parameter `name`, whose full shape is `shape`: float32 [rows, ..].

    Biases are 0, LayerNorm weights 1, matrices normal with the standard deviation of init_std.

    A row depends on (seed, name, row) only. So a rank draws its shard without drawing the whole tensor, and the numbers
    do not depend on the number of ranks. Philox is counter-based: the blocks of a tensor are far apart in one stream.
    """
    start, stop, _ = rows.indices(shape[0])
    if len(shape) == 1:
        return np.full(stop - start, float("norm" in name and name.endswith("weight")), dtype=np.float32)
    key = int.from_bytes(hashlib.sha256(f"{name}/{seed}".encode()).digest()[:16])
    values = np.empty((stop - start, *shape[1:]), dtype=np.float32)
    for first in range(start - start % INIT_BLOCK, stop, INIT_BLOCK):
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, first]))
        block = generator.standard_normal((min(INIT_BLOCK, shape[0] - first), *shape[1:]), dtype=np.float32)
        low, high = max(first, start), min(first + len(block), stop)
        values[low - start : high - start] = block[low - first : high - first]
    return values * np.float32(init_std(config, name))


@lru_cache(maxsize=8)
def _tables(config: Config, seq_len: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(dtype, torch.float32)
    with torch.inference_mode(False):  # the cached tables are used in training too
        return rotary_tables(seq_len, config.rotary_dim, config.rotary_base, dtype, device)
