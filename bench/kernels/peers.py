"""Every op of kernels/: its inputs, its floor, and its arms (Tripod's kernel and what a user would run instead).

An arm takes the inputs of the op and returns a function and its arguments. Only function(*arguments) is timed. The arm
itself does what a user does once (imports, compilation, tables, masks) and what is not part of the comparison. The
first arm, `tripod`, is ours. The other arms must return the same outputs and gradients; this is checked before they are
timed. An arm raises if it cannot run on this machine, and the exception is reported as the reason.
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
    """The least work that an op needs: FLOPs of its matmuls, and bytes to read its inputs and write its outputs once.

    Vectors (biases, statistics) are not counted: they are less than 1% of the bytes.
    """

    flops: float
    bytes: float

    def least_seconds(self, flops_per_s: float, bytes_per_s: float) -> tuple[float, str]:
        """The least time at these rates, and which of them determines it: "flops" or "bytes"."""
        seconds = {"flops": self.flops / flops_per_s, "bytes": self.bytes / bytes_per_s}
        bound = max(seconds, key=seconds.get)
        return seconds[bound], bound


def compiled(arm: Arm) -> Arm:
    """The arm under torch.compile, for this one shape."""

    def build(*inputs: Tensor) -> tuple[Callable, tuple[Tensor, ...]]:
        torch.compiler.reset()  # earlier shapes count towards the limit of recompilations
        function, arguments = arm(*inputs)
        return torch.compile(function, dynamic=False, fullgraph=True), arguments

    return build


def _random(shape: tuple[int, ...], like: Tensor, scale: float = 1.0) -> Tensor:
    """scale * randn, with the dtype and device of `like`."""
    return (scale * torch.randn(shape, device=like.device)).to(like).requires_grad_()


# ---------------------------------------------------------------------------------------------- rotary_attention


def attention_inputs(config: Config, batch: int, like: Tensor) -> tuple[Tensor, ...]:
    """qkv [batch, seq, heads, 3, head_dim], cos and sin [seq, rotary_dim / 2]."""
    tables = rotary_tables(config.seq_len, config.rotary_dim, config.rotary_base, torch.float32, like.device)
    return _random((batch, config.seq_len, config.heads, 3, config.head_dim), like), *tables


def attention_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """Forward has two matmuls (scores, output), backward has five. Only their causal half is counted.

        flops   4 batch seq^2 hidden / 2 forward, 10 batch seq^2 hidden / 2 backward
        bytes   itemsize batch seq hidden times 4 forward (q, k, v; out), 8 backward (q, k, v, out, d_out; dq, dk, dv)

    Our backward computes the scores twice, to avoid atomics. The second time is not counted, nor is the copy of qkv
    that rotary_attention rotates. (In the network linear_rotary_attention rotates the output of its projection.)
    """
    elements = batch * config.seq_len * config.hidden
    matmuls, tensors = (2, 4) if passes == "forward" else (5, 8)
    return Floor(matmuls * elements * config.seq_len, tensors * elements * itemsize)


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
    """torch's FlashAttention-2 with its deterministic backward.

    This sets a flag of the whole process. The caller resets it after timing.
    """
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs another pass
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
    """Returns a function: qkv -> rotated q, rotated k, v, each [batch, seq, heads, head_dim].

    It rotates as transformers does: in the dtype of qkv, with cos and sin repeated for both halves.
    """
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
    """Rotary embedding in one kernel, by torch.compile, followed by attention of a library."""

    def arm(qkv: Tensor, cos: Tensor, sin: Tensor):
        torch.compiler.reset()
        rotated, attend = torch.compile(_rotation(qkv, cos, sin), dynamic=False, fullgraph=True), make()
        return lambda qkv: attend(*rotated(qkv)), (qkv,)

    return arm


def _without_rotary(make: Callable[[], Attend]) -> Arm:
    """Attention of a library alone, which is less work than ours.

    q and k are rotated, and q, k and v are made contiguous, before the timing starts.
    """

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
    """x, attn and mlp [batch, seq, hidden], then weight1, bias1, weight2 and bias2 [hidden].

    There are no output biases, because peers add them in their projections.
    """
    shape = batch, config.seq_len, config.hidden
    return *(_random(shape, like) for _ in range(3)), *(_random(shape[-1:], like) for _ in range(4))


def layer_norm_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """bytes: itemsize batch seq hidden times 6 forward (x, attn, mlp; x', u, v), 5 backward (x', dx', du, dv; dx).

    x, attn and mlp have the same gradient, so it is written once.
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
    """bytes: itemsize batch seq ffn times 2 forward (h; out), 3 backward (h, d_out; dh)."""
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
    """hidden [tokens, hidden], weight [vocab, hidden] and targets [tokens]. The std of the logits is 1."""
    tokens = batch * config.seq_len
    hidden = _random((tokens, config.hidden), like)
    weight = _random((config.vocab, config.hidden), like, scale=config.hidden**-0.5)
    return hidden, weight, torch.randint(config.vocab, (tokens,), device=like.device)


def cross_entropy_floor(config: Config, batch: int, passes: Passes, itemsize: int) -> Floor:
    """Three matmuls (logits, two gradients), none computed twice.

    flops   6 batch seq vocab hidden
    bytes   itemsize 2 (batch seq + vocab) hidden (hidden, weight; their gradients)
    """
    tokens = batch * config.seq_len
    return Floor(6 * tokens * config.vocab * config.hidden, 2 * (tokens + config.vocab) * config.hidden * itemsize)


def eager_cross_entropy(*inputs: Tensor):
    return lambda hidden, weight, targets: F.cross_entropy((hidden @ weight.T).float(), targets), inputs


def torch_linear_cross_entropy(*inputs: Tensor):
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise ImportError(f"torch {torch.__version__} has no chunked F.linear_cross_entropy: torch 2.13 has one")
    return partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()), inputs


def liger_cross_entropy(*inputs: Tensor):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    return lambda hidden, weight, targets: LigerCrossEntropyFunction.apply(hidden @ weight.T, targets, None)[0], inputs


def _liger_fused(memory: int | None) -> Arm:
    """Liger's fused op. By default one chunk of logits takes as much memory as `hidden`.

    memory: let a chunk take this many times as much. Only later releases of Liger have this argument.
    """

    def arm(*inputs: Tensor):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        # An autograd.Function takes no keyword arguments. These are bias, ce_weight, ignore_index, lse_square_scale,
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


# ------------------------------------------------------------------------------------------------------- all ops


@dataclass(frozen=True)
class Op:
    inputs: Callable[[Config, int, Tensor], tuple[Tensor, ...]]
    floor: Callable[[Config, int, Passes, int], Floor]
    arms: dict[str, Arm]
    passes: tuple[Passes, ...] = ("forward", "backward")
    sizes: tuple[str, ...] = ("160m", "1.4b", "12b")


OPS = {
    # These sizes have head_dim 64, 128 and 80.
    "rotary_attention": Op(attention_inputs, attention_floor, ATTENTION, sizes=("160m", "1.4b", "2.8b")),
    "add_dual_layer_norm": Op(layer_norm_inputs, layer_norm_floor, LAYER_NORM),
    "bias_gelu": Op(gelu_inputs, gelu_floor, GELU),
    # Fused ops, ours included, compute the gradients in forward.
    "linear_cross_entropy": Op(cross_entropy_inputs, cross_entropy_floor, CROSS_ENTROPY, passes=("both",)),
}


class Setting(NamedTuple):
    """The device and the shapes of the measurement."""

    device: torch.device
    dtype: torch.dtype
    batch: int
    sizes: dict[str, Config] | None  # None: the sizes of every op, with full shapes
    note: str

    def configs(self, op: Op) -> dict[str, Config]:
        return self.sizes or {size: SIZES[size] for size in op.sizes}


def setting() -> Setting:
    """The setting for this machine. Its note says what to know before reading the numbers."""
    if torch.cuda.is_available():
        device = torch.device("cuda")
        runs = triton_runs(torch.empty(0, device=device))
        note = "" if runs else "Triton cannot run on this device: `tripod` is the torch definition of each op"
        return Setting(device, torch.bfloat16, 8, None, note)
    seq, note = 256, "no CUDA device: small shapes, and `tripod` is the torch definition of each op, not Triton"
    if triton_runs(torch.empty(0)):
        seq, note = 32, "Triton's interpreter: this shows that the kernels run and agree; the times mean nothing"
    small = replace(SIZES["14m"], seq_len=seq, vocab=1000)
    return Setting(torch.device("cpu"), torch.float32, 1, {"14m": small}, note)
