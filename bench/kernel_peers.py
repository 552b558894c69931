"""Every op of kernels/ and what a user would run instead: its inputs, the floor of its cost, and its arms.

An arm is a function of the inputs of the op that returns another function and its arguments. Only function(*arguments)
is timed: what an arm does before, such as imports, compilation, tables and masks, a user does once, or it is not part
of the comparison. The first arm, `tripod`, is ours; the others give the same outputs and the same gradients, which is
checked before they are timed. An arm that can not be had on a machine raises, and the exception is the reason that is
reported.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.peers import rotate_half
from kernels import add_dual_layer_norm, bias_gelu, linear_cross_entropy, rotary_attention, rotary_tables, rotate
from kernels.backend import triton_runs
from model import SIZES, Config

Passes = Literal["forward", "backward", "both"]
Arm = Callable[..., tuple[Callable, tuple[Tensor, ...]]]


class Floor(NamedTuple):
    """What an op can not do without: FLOPs of matrix products, and bytes, of its inputs read and its outputs written
    once. Vectors, such as biases and statistics, are left out: they are less than a hundredth."""

    flops: float
    bytes: float


def compiled(arm: Arm) -> Arm:
    """The arm under torch.compile, for this one shape."""

    def build(*inputs: Tensor) -> tuple[Callable, tuple[Tensor, ...]]:
        torch.compiler.reset()  # shapes met before count towards the limit of recompilations
        function, arguments = arm(*inputs)
        return torch.compile(function, dynamic=False, fullgraph=True), arguments

    return build


def _random(shape: tuple[int, ...], like: Tensor, scale: float = 1.0) -> Tensor:
    """Normal numbers of the dtype and on the device of `like`."""
    return (scale * torch.randn(shape, device=like.device)).to(like).requires_grad_()


# ---------------------------------------------------------------------------------------------- rotary_attention


def attention_inputs(config: Config, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """qkv [batch, seq, heads, 3, head_dim], cos and sin [seq, rotary_dim / 2]."""
    tables = rotary_tables(config.seq_len, config.rotary_dim, config.rotary_base, torch.float32, like.device)
    return _random((batch, config.seq_len, config.heads, 3, config.head_dim), like), *tables


def attention_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """Forward has two products, scores and values, and backward five, of which the causal half is credited:

        flops   4 batch seq^2 hidden / 2 forward, 10 batch seq^2 hidden / 2 backward
        bytes   4 batch seq hidden forward (q, k, v; out), 8 backward (q, k, v, out, d_out; dq, dk, dv), x itemsize

    A backward that forms the scores twice, as ours does so that nothing is added up by atomics, gets no more credit.
    """
    tokens = batch * config.seq_len * config.hidden
    products, tensors = (2, 4) if passes == "forward" else (5, 8)
    return Floor(products * tokens * config.seq_len, tensors * tokens * itemsize)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # causal attention of q, k, v [batch, seq, heads, head_dim]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def _forced(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _flash_deterministic() -> Attend:
    """torch's FlashAttention-2 has a deterministic backward, which it runs under this switch of the whole process; who
    times the arm turns it off again."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid, at the cost of another pass
    return _forced(SDPBackend.FLASH_ATTENTION)


def _flash_attn() -> Attend:
    from flash_attn import flash_attn_func

    return partial(flash_attn_func, causal=True, deterministic=True)


def _flex(seq: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda batch, head, q, k: q >= k, None, None, seq, seq, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(q, k, v, block_mask=mask).transpose(1, 2).contiguous()

    return attend


def _rotation(qkv: Tensor, cos: Tensor, sin: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """qkv -> rotated q and k, and v, [batch, seq, heads, head_dim], as transformers does it: in the dtype of qkv, with
    tables that hold both halves."""
    cos, sin = (torch.cat((table, table), dim=-1).to(qkv.dtype)[:, None] for table in (cos, sin))

    def rotated(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unbind(3)
        return rotate_half(q, cos, sin), rotate_half(k, cos, sin), v

    return rotated


def eager_attention(qkv: Tensor, cos: Tensor, sin: Tensor):
    rotated = _rotation(qkv, cos, sin)
    return lambda qkv: _sdpa(*rotated(qkv)), (qkv,)


def flex_attention(qkv: Tensor, cos: Tensor, sin: Tensor):
    rotated, attend = _rotation(qkv, cos, sin), _flex(qkv.shape[1], qkv.device)
    return lambda qkv: attend(*rotated(qkv)), (qkv,)


def _rotary_and(make: Callable[[], Attend]) -> Arm:
    """Rotation in one kernel, by torch.compile, and then attention by a library."""

    def arm(qkv: Tensor, cos: Tensor, sin: Tensor):
        torch.compiler.reset()
        rotated, attend = torch.compile(_rotation(qkv, cos, sin), dynamic=False, fullgraph=True), make()
        return lambda qkv: attend(*rotated(qkv)), (qkv,)

    return arm


def _without_rotary(make: Callable[[], Attend]) -> Arm:
    """Attention of a library alone: queries and keys are rotated, and all are copied apart, ahead of the clock. It does
    less than we do."""

    def arm(qkv: Tensor, cos: Tensor, sin: Tensor):
        q, k, v = qkv.unbind(3)
        q, k = (rotate(t.transpose(1, 2), cos, sin).transpose(1, 2).contiguous() for t in (q, k))
        return make(), (q, k, v.contiguous())

    return arm


LIBRARIES = {
    "flash": lambda: _forced(SDPBackend.FLASH_ATTENTION),
    "flash-deterministic": _flash_deterministic,
    "cudnn": lambda: _forced(SDPBackend.CUDNN_ATTENTION),
    "flash-attn": _flash_attn,
}

ATTENTION = {
    "tripod": lambda *inputs: (rotary_attention, inputs),
    "eager": eager_attention,
    "compile": compiled(eager_attention),
    "flex": compiled(flex_attention),
    **{f"rotary+{name}": _rotary_and(make) for name, make in LIBRARIES.items()},
    **{f"{name} alone": _without_rotary(make) for name, make in LIBRARIES.items()},
}


# ------------------------------------------------------------------------------------------- add_dual_layer_norm


def layer_norm_inputs(config: Config, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """x, attn and mlp [batch, seq, hidden], and the two weights and biases [hidden].

    No output biases: a peer leaves them to its projections, and pays for their gradients there.
    """
    shape = batch, config.seq_len, config.hidden
    return *(_random(shape, like) for _ in range(3)), *(_random(shape[-1:], like) for _ in range(4))


def layer_norm_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """bytes   6 batch seq hidden forward (x, attn, mlp; x', u, v), 5 backward (x', dx', du, dv; dx), x itemsize

    The gradient of x is that of attn and mlp as well.
    """
    return Floor(0, (6 if passes == "forward" else 5) * batch * config.seq_len * config.hidden * itemsize)


def eager_layer_norm(*inputs: Tensor):
    def add_and_norm(x, attn, mlp, weight1, bias1, weight2, bias2):
        x = x + attn + mlp
        return x, F.layer_norm(x, weight1.shape, weight1, bias1), F.layer_norm(x, weight2.shape, weight2, bias2)

    return add_and_norm, inputs


def liger_layer_norm(*inputs: Tensor):
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def add_and_norm(x, attn, mlp, weight1, bias1, weight2, bias2):
        x = x + attn + mlp
        norm = LigerLayerNormFunction.apply
        return x, norm(x, weight1, bias1, 1e-5), norm(x, weight2, bias2, 1e-5)

    return add_and_norm, inputs


LAYER_NORM = {
    "tripod": lambda *inputs: (add_dual_layer_norm, inputs),
    "eager": eager_layer_norm,
    "compile": compiled(eager_layer_norm),
    "liger": liger_layer_norm,
}


# ---------------------------------------------------------------------------------------------------- bias_gelu


def gelu_inputs(config: Config, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """h [batch, seq, ffn] and the bias [ffn]."""
    return _random((batch, config.seq_len, config.ffn), like), _random((config.ffn,), like)


def gelu_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """bytes   2 batch seq ffn forward (h; out), 3 backward (h, d_out; dh), x itemsize"""
    return Floor(0, (2 if passes == "forward" else 3) * batch * config.seq_len * config.ffn * itemsize)


def eager_gelu(*inputs: Tensor):
    return lambda h, bias: F.gelu(h + bias, approximate="tanh"), inputs


GELU = {
    "tripod": lambda *inputs: (bias_gelu, inputs),
    "eager": eager_gelu,
    "compile": compiled(eager_gelu),
}


# ----------------------------------------------------------------------------------------- linear_cross_entropy


def cross_entropy_inputs(config: Config, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """hidden [tokens, hidden], weight [vocab, hidden] and targets [tokens]. The logits have a deviation of 1."""
    tokens = batch * config.seq_len
    hidden = _random((tokens, config.hidden), like)
    weight = _random((config.vocab, config.hidden), like, scale=config.hidden**-0.5)
    return hidden, weight, torch.randint(config.vocab, (tokens,), device=like.device)


def cross_entropy_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """Three products, of the logits and of the two gradients, with nothing computed twice:

    flops   6 batch seq vocab hidden
    bytes   2 (batch seq + vocab) hidden (hidden, weight; their gradients), x itemsize
    """
    tokens = batch * config.seq_len
    return Floor(6 * tokens * config.vocab * config.hidden, 2 * (tokens + config.vocab) * config.hidden * itemsize)


def eager_cross_entropy(*inputs: Tensor):
    return lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.T).float(), targets), inputs


def torch_linear_cross_entropy(*inputs: Tensor):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy: 2.13 has")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()), inputs


def liger_cross_entropy(*inputs: Tensor):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda hidden, weight, targets: LigerCrossEntropyFunction.apply(hidden @ weight.T, targets, None)[0], inputs


def _liger_fused(memory: int | None) -> Arm:
    """Liger's counterpart of our op. By default its chunks are so small that a chunk of logits takes the memory of
    hidden; later releases have an argument by which it may be a multiple."""

    def arm(*inputs: Tensor):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # An autograd.Function takes no keywords. These are bias, ce_weight, ignore_index, lse_square_scale,
        # label_smoothing, reduction, softcap, return_z_loss, accum_dtype, use_token_scaling, return_token_accuracy,
        # return_predicted_tokens, ce_impl, ce_mode and chunk_mem_const.
        middle = None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None
        rest = () if memory is None else (*middle, memory)
        return lambda *inputs: LigerFusedLinearCrossEntropyFunction.apply(*inputs, *rest)[0], inputs

    return arm


CROSS_ENTROPY = {
    "tripod": lambda *inputs: (linear_cross_entropy, inputs),
    "eager": eager_cross_entropy,
    "compile": compiled(eager_cross_entropy),
    "torch chunked": torch_linear_cross_entropy,
    "liger": _liger_fused(None),
    "liger x16": _liger_fused(16),
    "liger logits": liger_cross_entropy,
}


# -------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Op:
    inputs: Callable[[Config, int, Tensor], tuple[Tensor, ...]]
    floor: Callable[[Config, int, Passes, int], Floor]
    arms: dict[str, Arm]
    passes: tuple[Passes, ...] = ("forward", "backward")
    sizes: tuple[str, ...] = ("160m", "1.4b", "12b")


OPS = {
    # One of each head_dim: 64, 128 and 80.
    "rotary_attention": Op(attention_inputs, attention_floor, ATTENTION, sizes=("160m", "1.4b", "2.8b")),
    "add_dual_layer_norm": Op(layer_norm_inputs, layer_norm_floor, LAYER_NORM),
    "bias_gelu": Op(gelu_inputs, gelu_floor, GELU),
    # Forward forms the gradients too, in ours as in other fused ones.
    "linear_cross_entropy": Op(cross_entropy_inputs, cross_entropy_floor, CROSS_ENTROPY, passes=("both",)),
}


class Setting(NamedTuple):
    """Where and at what shapes the ops are measured here."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    sizes: dict[str, Config] | None  # None: the sizes of every op, at their full shape
    note: str

    def configs(self, op: Op) -> dict[str, Config]:
        return self.sizes or {size: SIZES[size] for size in op.sizes}


def setting() -> Setting:
    if torch.cuda.is_available():
        device = torch.device("cuda")
        runs = triton_runs(torch.empty(0, device=device))
        note = "" if runs else "Triton can not run on this device: `tripod` is the definitions in torch"
        return Setting(device, torch.bfloat16, 8, None, note)
    seq, note = 256, "no CUDA device: small shapes, and `tripod` is the definitions in torch, not the Triton kernels"
    if triton_runs(torch.empty(0)):
        seq, note = 32, "Triton's interpreter: this shows that the kernels run and agree, and times nothing of use"
    small = replace(SIZES["14m"], seq_len=seq, vocab=1000)
    return Setting(torch.device("cpu"), torch.float32, 1, {"14m": small}, note)
