"""Pythia in other code bases: transformers, litgpt, plain torch in the style of nanoGPT, and that with Liger's kernels.

Every peer gets Tripod's weights, so equal losses and gradients prove that the networks are equal. A peer is called as
its own training loop calls it: transformers and nanoGPT compute the loss inside the module, so torch.compile sees the
loss too; litgpt compiles only the network.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import rotary_tables
from model import Config, Pythia
from model.huggingface import huggingface_name, published_config

PACKAGES = {"hf": "transformers", "litgpt": "litgpt", "liger": "liger_kernel", "plain": "torch"}  # peer: its package

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (network, tokens, targets [batch, seq]) -> mean loss in nats


def obstacle(peer: str) -> str:
    """Why a peer cannot run on this machine, or an empty string if it can."""
    if find_spec(PACKAGES[peer]) is None:
        return "not installed"
    return "needs a GPU" if peer == "liger" and not torch.cuda.is_available() else ""


def build_peer(peer: str, ours: Pythia) -> tuple[nn.Module, Loss]:
    """The network of a peer, on the device of `ours` and with a copy of its weights, and the function of its loss."""
    with ours.embed.device:  # a CPU would take minutes to draw the initial weights of a large network
        network, name, loss = {"hf": _hf, "litgpt": _litgpt, "liger": _liger, "plain": _plain}[peer](ours.config)
    theirs = dict(network.named_parameters())
    with torch.no_grad():
        for our_name, parameter in ours.named_parameters():
            if peer == "litgpt" and ".qkv." in our_name:
                by_head = parameter.unflatten(0, (ours.config.heads, 3, ours.config.head_dim))
                parameter = by_head.transpose(0, 1).flatten(0, 2)  # rows ordered [(q, k, v), head, head_dim]
            theirs.pop(name(our_name)).copy_(parameter)
    if theirs:
        raise ValueError(f"{peer} has parameters that Tripod has not: {', '.join(theirs)}")
    return network, loss


# transformers


def _hf(config: Config) -> tuple[nn.Module, Callable[[str], str], Loss]:
    from transformers import AutoModelForCausalLM, GPTNeoXConfig

    theirs = GPTNeoXConfig(**published_config(config, torch.float32, "gelu_pytorch_tanh") | {"use_cache": False})
    network = AutoModelForCausalLM.from_config(theirs, attn_implementation="sdpa")

    def name(ours: str) -> str:
        # transformers 4 calls the unembedding embed_out, transformers 5 lm_head
        return "lm_head.weight" if ours == "unembed" and hasattr(network, "lm_head") else huggingface_name(ours)

    # With labels alone transformers would shift them by one; with shift_labels it only checks that labels are there.
    return network, name, lambda network, x, y: network(input_ids=x, labels=y, shift_labels=y.contiguous()).loss


# litgpt


_LITGPT = {
    "embed": "transformer.wte.weight",
    "unembed": "lm_head.weight",
    "final_norm": "transformer.ln_f",
    "norm1": "norm_1",
    "norm2": "norm_2",
    "qkv": "attn.qkv",
    "attn_out": "attn.proj",
    "mlp_in": "mlp.fc",
    "mlp_out": "mlp.proj",
}


def _litgpt(config: Config) -> tuple[nn.Module, Callable[[str], str], Loss]:
    import litgpt

    theirs = litgpt.Config(
        name=f"pythia-{config.name}",
        block_size=config.seq_len,
        n_layer=config.layers,
        n_embd=config.hidden,
        n_head=config.heads,
        intermediate_size=config.ffn,
        padded_vocab_size=config.vocab,
        rotary_percentage=config.rotary_fraction,
        rope_base=int(config.rotary_base),
        norm_eps=config.eps,
        gelu_approximate=config.gelu,
    )

    def name(ours: str) -> str:
        prefix, layer = "", ours.split(".")
        if layer[0] == "blocks":
            prefix, layer = f"transformer.h.{layer[1]}.", layer[2:]
        return prefix + ".".join([_LITGPT[layer[0]], *layer[1:]])

    return litgpt.GPT(theirs), name, lambda network, x, y: F.cross_entropy(network(x).flatten(0, 1), y.flatten())


# Plain torch, in the style of nanoGPT's model.py


class PlainBlock(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.norm1 = nn.LayerNorm(config.hidden, eps=config.eps)
        self.norm2 = nn.LayerNorm(config.hidden, eps=config.eps)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.attn_out = nn.Linear(config.hidden, config.hidden)
        self.mlp_in = nn.Linear(config.hidden, config.ffn)
        self.mlp_out = nn.Linear(config.ffn, config.hidden)

    def attention(self, u: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, hidden = u.shape
        qkv = self.qkv(u).view(batch, seq, self.config.heads, -1).transpose(1, 2)  # [batch, heads, seq, 3 head_dim]
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_out(out.transpose(1, 2).reshape(batch, seq, hidden))

    def mlp(self, v: Tensor) -> Tensor:
        return self.mlp_out(F.gelu(self.mlp_in(v), approximate=self.config.gelu))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x + self.attention(self.norm1(x), cos, sin) + self.mlp(self.norm2(x))


class Plain(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.hidden, eps=config.eps)
        self.unembed = nn.Linear(config.hidden, config.vocab, bias=False)
        device = self.embed.weight.device
        tables = rotary_tables(config.seq_len, config.rotary_dim, config.rotary_base, torch.float32, device)
        for table, values in zip(("cos", "sin"), tables):  # [seq_len, rotary_dim]: the second half repeats the first
            self.register_buffer(table, torch.cat((values, values), dim=-1), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(tokens)  # [batch, seq, hidden]
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.loss(self.final_norm(x).flatten(0, 1), targets.flatten())

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x [tokens, hidden], targets [tokens] -> mean cross-entropy in nats."""
        return F.cross_entropy(self.unembed(x), targets)


def rotate_half(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary embedding to the first rotary_dim columns of t [.., head_dim]; cos and sin are [.., rotary_dim]."""
    rotated, rest = t[..., : cos.shape[-1]], t[..., cos.shape[-1] :]
    a, b = rotated.chunk(2, dim=-1)
    return torch.cat((rotated * cos + torch.cat((-b, a), dim=-1) * sin, rest), dim=-1).to(t.dtype)


def _plain_name(ours: str) -> str:
    return ours + ".weight" if ours in ("embed", "unembed") else ours


def _plain(config: Config) -> tuple[nn.Module, Callable[[str], str], Loss]:
    return Plain(config), _plain_name, lambda network, x, y: network(x, y)


# Plain torch with the kernels of Liger-Kernel that fit this network: LayerNorm, and unembedding with cross-entropy


def _liger(config: Config) -> tuple[nn.Module, Callable[[str], str], Loss]:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss
    from liger_kernel.transformers.layer_norm import LigerLayerNorm

    network, loss_of = Plain(config), LigerFusedLinearCrossEntropyLoss()

    def norm() -> nn.Module:
        return LigerLayerNorm(config.hidden, eps=config.eps, bias=True)

    for block in network.blocks:
        block.norm1, block.norm2 = norm(), norm()
    network.final_norm = norm()
    network.loss = lambda x, targets: loss_of(network.unembed.weight, x, targets)
    return network, _plain_name, lambda network, x, y: network(x, y)
