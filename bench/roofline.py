"""Where the time of a training step goes: every op beside the least time that this machine needs for it.

    python -m bench.roofline --size 160m --json FILE --plot FILE.png

First the ceilings are measured: bytes/s of a large copy and FLOP/s of a large square matmul. The floor of an op is the
time that its matmuls take at this FLOP/s, or the time to read its inputs and write its outputs once at these bytes/s,
whichever is longer. Then every op is timed alone, with the shapes and dtypes of the model, and so is the whole step of
train.py. Ceilings, step and ops take turns, so a slow phase of the machine slows all of them.

The projection to q, k and v and attention are one op of the network, which rotates q and k in place. Here they are two
ops, so that products and attention have a rate each, and on a GPU this attention copies qkv before it rotates.

"Between the ops" is the time of the step less the time of all ops: launches, waiting, small tensors. It can be
negative, because on a GPU an op that is timed alone starts with an empty cache.

On a CPU an op may be faster than its floor by bytes. Small tensors are in a cache, and writing in place costs less than
a copy.
"""

import gc
import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bench.arm import random_model
from bench.ceilings import copy_bandwidth, machine, matmul_ceiling
from bench.kernels.measure import differentiable, incoming_gradients, outputs_of
from bench.kernels.peers import (
    Floor,
    attention_floor,
    attention_inputs,
    cross_entropy_floor,
    gelu_floor,
    layer_norm_floor,
)
from bench.roofline_report import BETWEEN, plot, rate_of, text
from bench.timing import ForeignCPU, clock, flush_of, measure, undisturbed
from kernels import add_dual_layer_norm, add_layer_norm, bias_gelu, linear, linear_cross_entropy, rotary_attention
from kernels.backend import triton_runs
from kernels.cross_entropy import CHUNK, triton_chunk
from kernels.linear import matmul
from model import SIZES, Config
from parallel.gradients import Gradients
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.files import atomic_write
from runtime.host import reuse_freed_memory
from runtime.ranks import Dist
from step import Step, make_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TURNS = 3  # in each of them the ceilings, the step and every op are measured
STEPS = 3  # timed steps of a turn, after one that is not timed


def parse(arguments: list[str]) -> Namespace:
    """Parse the command line. Raises UserError if a setting cannot work."""
    cuda = torch.cuda.is_available()
    size, batch, seq_len, precision = ("160m", 8, 2048, "bf16") if cuda else ("14m", 4, 512, "fp32")
    parser = Parser(prog="bench.roofline", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--size", default=size, metavar="NAMES", help=f"sizes, as 14m,70m (default: {size})")
    add("--batch", type=int, default=batch, metavar="N", help=f"rows of a step (default: {batch})")
    add("--seq-len", type=int, default=seq_len, metavar="N", help=f"tokens of a row (default: {seq_len})")
    add("--precision", choices=list(DTYPES), default=precision, help=f"of the matmuls (default: {precision})")
    add("--json", type=Path, metavar="FILE", help="write every number to this file")
    add("--plot", type=Path, metavar="FILE.png", help="draw a chart (several sizes: FILE-SIZE.png)")
    s = parser.parse_args(arguments)
    s.sizes = list(dict.fromkeys(s.size.split(",")))
    if unknown := set(s.sizes) - set(SIZES):
        raise UserError(f"--size knows {', '.join(SIZES)}, not {', '.join(sorted(unknown))}")
    for name in ("batch", "seq_len"):
        if getattr(s, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be positive, not {getattr(s, name)}")
    for name in ("json", "plot"):
        path = getattr(s, name)
        if path and not path.parent.is_dir():
            raise UserError(f"--{name} {path}: there is no directory {path.parent}")
    if s.plot:
        if s.plot.suffix != ".png":
            raise UserError(f"--plot {s.plot}: the name of a picture must end in .png")
        try:
            import matplotlib  # noqa: F401 (fail now, not after the measurement)
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    return s


# ---- the ops of a step


class Op(NamedTuple):
    name: str
    calls: int  # in a step
    floor: Floor  # of one call
    build: Callable[[], tuple[Callable, Callable[[], tuple[Tensor, ...]]]]
    """Makes the inputs. Returns the function to time, and the setup before each round, which returns its arguments."""


class StepSpec(NamedTuple):
    """Determines the shapes and dtypes of a step, and makes tensors of them."""

    config: Config  # with the seq_len of the step
    batch: int
    dtype: torch.dtype  # of activations and matmuls; parameters are float32
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.batch * self.config.seq_len

    def draw(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """0.1 * randn: small enough that no sum overflows or saturates."""
        return (0.1 * torch.randn(shape, device=self.device)).to(dtype or self.dtype).requires_grad_(grad)

    def activation(self, width: int, grad: bool = True) -> Tensor:
        return self.draw(self.batch, self.config.seq_len, width, grad=grad)

    def vectors(self, *widths: int) -> list[Tensor]:
        """One float32 vector for each width: biases, or the weights and biases of LayerNorms."""
        return [self.draw(width, dtype=torch.float32) for width in widths]

    def ids(self) -> Tensor:
        return torch.randint(self.config.vocab, (self.batch, self.config.seq_len), device=self.device)


# These are for Op.build: they make the inputs of `function` by make(), and time its forward pass, its backward pass, or
# both. They return the function to time and its setup.


def _forward(function: Callable, make: Callable[[], tuple[Tensor, ...]]):
    inputs = make()
    return function, lambda: inputs


def _backward(function: Callable, make: Callable[[], tuple[Tensor, ...]]):
    inputs = make()
    d_outputs = incoming_gradients(outputs_of(function, inputs))
    return (
        lambda *outputs: torch.autograd.grad(outputs, differentiable(inputs), d_outputs),
        lambda: outputs_of(function, inputs),
    )


def _both(function: Callable, make: Callable[[], tuple[Tensor, ...]]):
    inputs = make()
    return lambda *inputs: torch.autograd.grad(function(*inputs), differentiable(inputs)), lambda: inputs


def projections(config: Config) -> dict[str, tuple[int, int, bool]]:
    """The four projections of a layer: (in, out, whether linear adds the bias)."""
    hidden, ffn = config.hidden, config.ffn
    return {
        "qkv": (hidden, 3 * hidden, True),
        "attn_out": (hidden, hidden, False),
        "mlp_in": (hidden, ffn, False),
        "mlp_out": (ffn, hidden, False),
    }


def projection_ops(name: str, spec: StepSpec) -> list[Op]:
    """The three matmuls of a projection: forward, d_input, d_weight.

    Each has 2 tokens in out FLOPs. Of the tensors [tokens, in], [in, out] and [tokens, out] it reads two and writes the
    third. d_weight includes the gradient of the bias.
    """
    width, out, has_bias = projections(spec.config)[name]
    tokens, layers = spec.tokens, spec.config.layers
    elements = tokens * width + width * out + tokens * out
    floor = Floor(2 * tokens * width * out, elements * spec.dtype.itemsize)

    def inputs(grad: bool = True) -> tuple[Tensor, ...]:
        return spec.activation(width, grad), spec.draw(out, width), *spec.vectors(*[out] * has_bias)

    def d_input() -> tuple[Tensor, Tensor]:
        return spec.activation(out, grad=False), spec.draw(out, width, grad=False).T

    return [
        Op(f"{name} forward", layers, floor, partial(_forward, linear, inputs)),
        Op(f"{name} d_input", layers, floor, partial(_forward, matmul, d_input)),  # as the backward of linear calls it
        Op(f"{name} d_weight", layers, floor, partial(_backward, linear, partial(inputs, grad=False))),
    ]


def loss_matmuls(spec: StepSpec) -> list[Op]:
    """The three matmuls inside linear_cross_entropy, with one call for each chunk of tokens."""
    tokens, vocab, hidden = spec.tokens, spec.config.vocab, spec.config.hidden
    by_kernel = triton_runs(torch.empty(0, dtype=spec.dtype, device=spec.device))
    chunk = min(tokens, triton_chunk(hidden) if by_kernel else CHUNK)
    elements = chunk * hidden + chunk * vocab + vocab * hidden
    floor = Floor(2 * chunk * vocab * hidden, elements * spec.dtype.itemsize)
    chunks = -(-tokens // chunk)
    draw = partial(spec.draw, grad=False)
    calls = {
        "forward": (matmul, lambda: (draw(chunk, hidden), draw(vocab, hidden))),
        "d_input": (matmul, lambda: (draw(chunk, vocab), draw(vocab, hidden).T)),
        "d_weight": (torch.mm, lambda: (draw(chunk, vocab).T, draw(chunk, hidden))),
    }
    return [Op(f"unembed {name}", chunks, floor, partial(_forward, *call)) for name, call in calls.items()]


def network_ops(spec: StepSpec) -> list[Op]:
    """Every op of forward and backward, as model/pythia.py calls it. Floors do not count vectors and token ids."""
    config, batch, itemsize = spec.config, spec.batch, spec.dtype.itemsize
    layers, hidden, vocab, ffn = config.layers, config.hidden, config.vocab, config.ffn
    stream, table = spec.tokens * hidden, vocab * hidden  # elements of [batch, seq, hidden] and of an embedding

    def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight).to(spec.dtype)

    def first_norms(x: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        return add_dual_layer_norm(x, None, None, *norms, config.eps)

    def norms(x: Tensor, attn: Tensor, mlp: Tensor, bias: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        return add_dual_layer_norm(x, attn, mlp, *norms, config.eps, bias)

    def last_norm(x: Tensor, attn: Tensor, mlp: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return add_layer_norm(x, attn, mlp, *norm, config.eps, bias)[1]

    def gelu(h: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(h, bias, config.gelu)

    def embedding_inputs() -> tuple[Tensor, Tensor]:
        return spec.ids(), spec.draw(vocab, hidden, dtype=torch.float32)

    def streams(n: int, vectors: int) -> tuple[Tensor, ...]:
        return *(spec.activation(hidden) for _ in range(n)), *spec.vectors(*[hidden] * vectors)

    def loss_inputs() -> tuple[Tensor, ...]:
        return spec.draw(spec.tokens, hidden), spec.draw(vocab, hidden, dtype=torch.float32), spec.ids().flatten()

    def pair(name: str, calls: int, floors: tuple[Floor, Floor], function: Callable, make: Callable) -> list[Op]:
        return [
            Op(f"{name} forward", calls, floors[0], partial(_forward, function, make)),
            Op(f"{name} backward", calls, floors[1], partial(_backward, function, make)),
        ]

    def floors(floor_of: Callable) -> tuple[Floor, Floor]:
        return floor_of(config, batch, "forward", itemsize), floor_of(config, batch, "backward", itemsize)

    def stream_io(forward: int, backward: int) -> tuple[Floor, Floor]:
        """Floors of an op whose passes read or write a tensor of the residual stream this many times."""
        return Floor(0, forward * stream * itemsize), Floor(0, backward * stream * itemsize)

    embedding_floors = Floor(0, stream * (4 + itemsize)), Floor(0, stream * itemsize + 4 * table)
    loss_floor = cross_entropy_floor(config, batch, "both", itemsize)
    attention = partial(attention_inputs, config, batch, torch.empty(0, dtype=spec.dtype, device=spec.device))
    return [
        *pair("embedding", 1, embedding_floors, embedding, embedding_inputs),
        *pair("first norms", 1, stream_io(3, 5), first_norms, lambda: streams(1, 4)),  # x; u, v and x, dx', du, dv; dx
        *pair("add_dual_layer_norm", layers - 1, floors(layer_norm_floor), norms, lambda: streams(3, 5)),
        *(op for name in projections(config) for op in projection_ops(name, spec)),
        *pair("rotary_attention", layers, floors(attention_floor), rotary_attention, attention),
        *pair("bias_gelu", layers, floors(gelu_floor), gelu, lambda: (spec.activation(ffn), *spec.vectors(ffn))),
        *pair("last norm", 1, stream_io(5, 3), last_norm, lambda: streams(3, 3)),  # x, attn, mlp; x', u and x', du; dx
        Op("linear_cross_entropy", 1, loss_floor, partial(_both, linear_cross_entropy, loss_inputs)),
    ]


def build_step(spec: StepSpec) -> Step:
    """The step of train.py. The learning rate is 0, so all steps are equal."""
    model, dist = random_model(spec.config, spec.device), Dist(device=spec.device)
    model.compute_dtype = spec.dtype
    return Step(model, Gradients(model, dist, "none"), make_optimizer(model, 0.0), dist)


def update_ops(spec: StepSpec, step: Step) -> list[Op]:
    """What a step does with weights and gradients besides forward and backward.

    The gradients must exist when these ops are timed. AdamW reads a parameter, its gradient and two moments, and writes
    all but the gradient. In half precision the weights of the projections are cast, and their gradients are cast to
    float32. With a CUDA graph gradients are added to existing ones, which are zeroed after the update.
    """
    parameters, rounded = step.gradients.parameters, {weight: copy for _, weight, copy in step.cast_weights.casts}
    count, one = spec.config.parameters, torch.ones((), device=spec.device)
    # weight -> a tensor of the shape and dtype that is added to its gradient
    added = {weight: rounded.get(weight, weight) for weight in parameters} if step.graph else rounded

    def cast_weights() -> None:
        with step.cast_weights:
            pass

    @torch.no_grad()
    def accumulate() -> None:
        for weight, gradient in added.items():
            if step.graph:
                weight.grad += gradient
            else:
                gradient.to(weight.dtype)

    def update() -> None:
        step.optimizer.grad_scale = one  # AdamW divides the gradients by it in place; 1 keeps them
        step.optimizer.step()

    def bytes_of(read: dict[Tensor, Tensor], others: int) -> int:
        """Bytes to read these tensors, plus `others` bytes for each of their elements."""
        return sum((tensor.itemsize + others) * tensor.numel() for tensor in read.values())

    calls = [
        ("cast of weights", bytes_of(rounded, 4), cast_weights),
        ("sum of gradients", bytes_of(added, 8 if step.graph else 4), accumulate),
        ("norm of gradients", 4 * count, step.gradients.squared_norm),
        ("clipping and AdamW", 28 * count, update),
        ("zeroing of gradients", 4 * count if step.graph else 0, partial(step.optimizer.zero_grad, set_to_none=False)),
    ]
    return [Op(name, 1, Floor(0, size), lambda call=call: (call, tuple)) for name, size, call in calls if size]


# ---- the measurement


class Measured(NamedTuple):
    ops: dict[str, list[float]]  # name -> seconds of one call in each round
    steps: list[float]  # seconds of every step
    ceilings: Floor  # FLOP/s and bytes/s
    foreign_cpu: float | None  # fraction of the CPU time that other processes took


def measure_step(spec: StepSpec, ops: list[Op], step: Step, flush: Callable) -> Measured:
    """In each turn measure the ceilings, whole steps, and every op. The best ceilings of all turns are returned."""
    device = spec.device
    tokens = torch.randint(spec.config.vocab, (1, spec.batch, spec.config.seq_len + 1), device=device)
    now = clock(device)

    def steps() -> list[float]:
        moments = []
        for _ in range(1 + STEPS):  # the first is not counted
            step.forward_backward(tokens)
            step.update(lr=0.0).tolist()
            moments.append(now())
        return [after - before for before, after in pairwise(moments)]

    watch, matmuls, copies, step_seconds, seconds = ForeignCPU(), [], [], [], {op.name: [] for op in ops}
    steps()  # compile everything and allocate the memory
    with tqdm(total=TURNS * len(ops), desc=spec.config.name, leave=False) as progress:
        for _ in range(TURNS):
            matmuls.append(matmul_ceiling(spec.dtype, device, flush))
            copies.append(copy_bandwidth(device, flush))
            step_seconds += undisturbed(steps, device)
            step.forward_backward(tokens)  # gradients for update_ops
            for op in ops:
                call, setup = op.build()
                seconds[op.name] += measure(call, device, flush, setup)
                progress.update()
    return Measured(seconds, step_seconds, Floor(max(matmuls), max(copies)), watch.fraction())


# ---- the results


def row(op: Op, seconds: list[float], ceilings: Floor) -> dict:
    """What is reported of an op: totals of all its calls in a step, and the spread of one call."""
    floor = Floor(op.calls * op.floor.flops, op.calls * op.floor.bytes)
    least, bound = floor.least_seconds(*ceilings)
    return {
        "op": op.name,
        "calls": op.calls,
        "seconds": op.calls * median(seconds),
        "call_seconds": {"min": min(seconds), "median": median(seconds), "max": max(seconds), "rounds": len(seconds)},
        "flops": floor.flops,
        "bytes": floor.bytes,
        "bound": bound,
        "floor_seconds": least,
    }


def summarize(spec: StepSpec, rows: list[dict], measured: Measured, peak: float | None) -> dict:
    """What is reported of the whole step.

    mfu is model FLOP/s over a reference rate; mfu_at_floors is the same if every op took its floor. "full" counts all
    scores of attention, "causal" only the causal half.
    """
    seconds, floor = median(measured.steps), sum(row["floor_seconds"] for row in rows)
    flops = {which: spec.tokens * spec.config.flops_per_token(causal=which == "causal") for which in ("full", "causal")}
    references = {"the large product": measured.ceilings.flops} | ({"the data sheet": peak} if peak else {})
    return {
        "seconds": seconds,
        "seconds_min": min(measured.steps),
        "seconds_max": max(measured.steps),
        "steps": len(measured.steps),
        "tokens_per_s": spec.tokens / seconds,
        "ops_seconds": sum(row["seconds"] for row in rows),
        "floor_seconds": floor,
        "copy_bytes_per_s": measured.ceilings.bytes,
        "large_product_flops_per_s": measured.ceilings.flops,
        "foreign_cpu": measured.foreign_cpu,
        "flops": flops,
        "mfu": {name: {k: n / seconds / rate for k, n in flops.items()} for name, rate in references.items()},
        "mfu_at_floors": {name: {k: n / floor / rate for k, n in flops.items()} for name, rate in references.items()},
    }


# ---- the command


def run(s: Namespace, command: str) -> None:
    """Measure one size after the other: print, write and draw the results of each."""
    reuse_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    host, flush, peak = machine(device), flush_of(device), peak_flops(device)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": host,
        "gpu": host["gpu"],
        "threads": torch.get_num_threads(),
        "size": s.size,
        "batch": s.batch,
        "seq_len": s.seq_len,
        "precision": s.precision,
        "peak_flops_per_s": peak,
        "copy_bytes_per_s": 0.0,
        "large_product_flops_per_s": 0.0,
        "product_flops_per_s": {},
        "attention_flops_per_s": {},
        "steps": {},
        "products": [],
        "rows": [],
    }
    name = host["gpu"] or f"{host['cpu']}, {host['cores']} cores"
    print(f"{name}; torch {host['versions']['torch']}; {report['date']}")
    for size in s.sizes:
        try:
            matmuls, rows, step = measure_size(s, size, device, flush, peak)
        except torch.OutOfMemoryError:
            raise UserError(f"{size} does not fit: lower --batch {s.batch} or --seq-len {s.seq_len}") from None
        attention = rate_of([r for r in rows if r["op"].startswith("rotary_attention")])
        report["product_flops_per_s"][size], report["attention_flops_per_s"][size] = rate_of(matmuls), attention
        for ceiling in ("copy_bytes_per_s", "large_product_flops_per_s"):
            report[ceiling] = max(report[ceiling], step[ceiling])
        report["steps"][size] = step
        report["products"] += [{"size": size} | r for r in matmuls]
        report["rows"] += [{"size": size} | r for r in rows]
        if s.json:
            with atomic_write(s.json, "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")
        shape = f"{s.batch} x {s.seq_len} tokens a step, {s.precision}"
        print(text(f"Pythia {size}, {shape}", matmuls, attention, rows, step), flush=True)
        if s.plot:
            path = s.plot if len(s.sizes) == 1 else s.plot.with_stem(f"{s.plot.stem}-{size}")
            best = f"{1e3 * step['floor_seconds']:,.1f} if every op took its floor"
            title = f"A step of Pythia {size}: {1e3 * step['seconds']:,.1f} ms, {best}"
            plot(path, title, f"{name}: {shape}", rows, step)


def measure_size(
    s: Namespace, size: str, device: torch.device, flush: Callable, peak: float | None
) -> tuple[list[dict], list[dict], dict]:
    """Returns the rows of all matmuls, the rows of all ops with the time between them, and the summary of the step."""
    gc.collect()  # frees the step before: with a CUDA graph it is a reference cycle
    spec = StepSpec(replace(SIZES[size], seq_len=s.seq_len), s.batch, DTYPES[s.precision], device)
    step = build_step(spec)
    ops, unembed = [*network_ops(spec), *update_ops(spec, step)], loss_matmuls(spec)
    measured = measure_step(spec, [*ops, *unembed], step, flush)
    rows = [row(op, measured.ops[op.name], measured.ceilings) for op in ops]
    matmuls = [r for r in rows if r["op"].split()[0] in projections(spec.config)]
    matmuls += [row(op, measured.ops[op.name], measured.ceilings) for op in unembed]
    summary = summarize(spec, rows, measured, peak)
    between = summary["seconds"] - summary["ops_seconds"]
    zero = {"flops": 0, "bytes": 0, "bound": None, "floor_seconds": 0.0}
    return matmuls, [*rows, {"op": BETWEEN, "calls": 1, "seconds": between} | zero], summary


def main() -> None:
    run(parse(sys.argv[1:]), shlex.join(["python", "-m", "bench.roofline", *sys.argv[1:]]))


if __name__ == "__main__":
    run_command(main)
