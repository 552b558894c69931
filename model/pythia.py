"""The network: GPT-NeoX with parallel residuals, partial rotary embedding and untied embeddings.

    x = embed[tokens]
    for each layer:   x = x + attention(norm1(x)) + mlp(norm2(x))
    logits = unembed(final_norm(x))

The addition that ends one layer is computed together with the norms that begin the next, so a layer passes on the three
summands (x, attn, mlp) and the next one adds them.

Parameters may be kept in a wider dtype than the arithmetic: every product casts its weight to the dtype of its input.
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
    linear,
    linear_cross_entropy,
    rotary_attention,
    rotary_tables,
    rotate,
)
from model.sizes import Config


class Projection(nn.Module):
    """A weight [out, in] and a bias [out], not yet initialised: Pythia.init_weights does that for all."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """The weight and bias [hidden] of a LayerNorm; the arithmetic is in kernels.layernorm."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))

    def as_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.weight.to(dtype), self.bias.to(dtype)


class KVCache:
    """Rotated keys, and values, of the tokens that one layer has seen: [batch, heads, capacity, head_dim] each."""

    def __init__(self, config: Config, batch: int, capacity: int, dtype: torch.dtype, device: torch.device | str):
        self.k = torch.empty((batch, config.heads, capacity, config.head_dim), dtype=dtype, device=device)
        self.v = torch.empty_like(self.k)
        self.length = 0

    def attend(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of new tokens, qkv [batch, seq, heads, 3, head_dim], to themselves and to all before them."""
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # [batch, heads, seq, head_dim] each
        old, new = self.length, self.length + qkv.shape[1]
        self.k[:, :, old:new] = rotate(k, cos, sin)
        self.v[:, :, old:new] = v
        self.length = new
        q, k, v = rotate(q, cos, sin), self.k[:, :, :new], self.v[:, :, :new]
        visible = torch.ones(new - old, new, dtype=torch.bool, device=q.device).tril(diagonal=old)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.norm1 = Norm(config.hidden)
        self.norm2 = Norm(config.hidden)
        self.qkv = Projection(config.hidden, 3 * config.hidden)  # rows ordered [head, (q, k, v), head_dim]
        self.attn_out = Projection(config.hidden, config.hidden)
        self.mlp_in = Projection(config.hidden, config.ffn)
        self.mlp_out = Projection(config.ffn, config.hidden)

    def attention(self, u: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        heads, head_dim = self.config.heads, self.config.head_dim
        qkv = self.qkv(u).unflatten(-1, (heads, 3, head_dim))  # [batch, seq, heads, 3, head_dim]
        out = rotary_attention(qkv, cos, sin) if cache is None else cache.attend(qkv, cos, sin)
        return self.attn_out(out.flatten(-2))  # [batch, seq, hidden]

    def mlp(self, v: Tensor) -> Tensor:
        h = linear(v, self.mlp_in.weight)  # [batch, seq, ffn]
        return self.mlp_out(bias_gelu(h, self.mlp_in.bias.to(v.dtype), self.config.gelu))

    def forward(
        self,
        x: Tensor,
        attn: Tensor | None,
        mlp: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        cache: KVCache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The summands of the residual stream, [batch, seq, hidden] each, before and after the layer."""
        norm1, norm2, eps = self.norm1.as_dtype(x.dtype), self.norm2.as_dtype(x.dtype), self.config.eps
        if self.config.parallel:
            x, u, v = add_dual_layer_norm(x, attn, mlp, *norm1, *norm2, eps)
            return x, self.attention(u, cos, sin, cache), self.mlp(v)
        x, u = add_layer_norm(x, attn, mlp, *norm1, eps)
        x, v = add_layer_norm(x, self.attention(u, cos, sin, cache), None, *norm2, eps)
        return x, None, self.mlp(v)


class Pythia(nn.Module):
    """A Pythia of the given shape, initialised as published from `seed` (unless built on the meta device).

    `compute_dtype` is the dtype of activations and products; None means that of the parameters.
    """

    def __init__(self, config: Config, seed: int = 1234):
        super().__init__()
        if config.hidden % config.heads:
            raise ValueError(f"hidden {config.hidden} is not a multiple of heads {config.heads}")
        self.config = config
        self.compute_dtype: torch.dtype | None = None
        self.embed = nn.Parameter(torch.empty(config.vocab, config.hidden))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = Norm(config.hidden)
        self.unembed = nn.Parameter(torch.empty(config.vocab, config.hidden))
        if not self.embed.is_meta:
            self.init_weights(seed)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "mean",
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        """Logits [batch, seq, vocab] of tokens [batch, seq], or, given targets [batch, seq], the cross-entropy in nats:
        its mean, or with reduction "none" that of every token [batch, seq]. With caches, one a
        layer, tokens go on where they end.
        """
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        x = F.embedding(tokens, self.embed)
        x = x.to(self.compute_dtype or x.dtype)  # [batch, seq, hidden]
        whole = -(-end // self.config.seq_len) * self.config.seq_len  # so that few different tables are made
        cos, sin = _tables(self.config, whole, x.dtype, x.device)
        cos, sin = cos[start:end], sin[start:end]
        attn = mlp = None
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks)):
            x, attn, mlp = block(x, attn, mlp, cos, sin, cache)
        _, x = add_layer_norm(x, attn, mlp, *self.final_norm.as_dtype(x.dtype), self.config.eps)
        if targets is None:
            return linear(x, self.unembed)
        loss = linear_cross_entropy(x.flatten(0, 1), self.unembed, targets.flatten(), reduction)
        return loss if reduction == "mean" else loss.view(targets.shape)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter as Pythia did (the numbers themselves came from GPUs and can not be had from a seed).

        biases                                   0
        LayerNorm                                weight 1, bias 0
        matrices                                 normal, with the deviation of init_std
        """
        for name, parameter in self.named_parameters():
            parameter.copy_(torch.from_numpy(initial_rows(self.config, name, tuple(parameter.shape), seed)))


def init_std(config: Config, name: str) -> float:
    """Standard deviation of the initial normal distribution of a weight matrix.

                                                  "small" (most sizes)        "normal" (6.9b, 12b)
        attn_out, mlp_out                         2 / (layers sqrt(hidden))   0.02 / sqrt(2 layers)
        embed, unembed, qkv, mlp_in               sqrt(2 / (5 hidden))        0.02

    small_init is of Nguyen & Salazar 2019 (arXiv:1910.05895), wang_init of Mesh Transformer JAX; the right column holds
    the defaults of GPT-NeoX, which ran for 6.9b and 12b because their configurations leave both out.
    """
    output = name.endswith(("attn_out.weight", "mlp_out.weight"))
    if config.init == "small":
        return 2 / (config.layers * config.hidden**0.5) if output else (2 / (5 * config.hidden)) ** 0.5
    return 0.02 / (2 * config.layers) ** 0.5 if output else 0.02


INIT_BLOCK = 128  # rows drawn from one generator


def initial_rows(config: Config, name: str, shape: tuple[int, ...], seed: int, rows: slice = slice(None)) -> np.ndarray:
    """Rows `rows` of the initial value of parameter `name` of the full `shape`, float32.

    A row depends on (seed, name, row) only: any shard, on any number of ranks, gets the numbers it would have in the
    whole, without drawing the whole. Philox is counter-based: the blocks of one tensor are far apart in one stream.
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
    with torch.inference_mode(False):  # made while generating, they must serve in training too
        return rotary_tables(seq_len, config.rotary_dim, config.rotary_base, dtype, device)
