"""Where the time of a training step goes: every op beside the least time in which this machine could do it.

    python -m bench.roofline --size 160m --json FILE --plot FILE.png

The ceilings are measured first: bytes/s of a copy, and FLOP/s of a large square product. An op's floor is the time in
which these would compute the FLOPs of its products, or read its inputs and write its outputs once, whichever is longer.
Then, in turns, so that all see the same machine, every op is timed alone, on the shapes and in the dtypes in which the
model calls it, and so is the whole step, which is train.py's own. What the ops leave of the step passes between them:
launches, waiting, small tensors. It is less than nothing where ops take longer alone, as they may on a GPU, where alone
they start with an empty cache.

On a CPU floors by bytes may be passed: small tensors are found in its caches, and to write where one has read costs
less than a copy.
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

from bench.ceilings import (
    ForeignCPU,
    clock,
    copy_bandwidth,
    flush_of,
    machine,
    measure,
    product_ceiling,
    undisturbed,
)
from bench.kernel_measure import differentiable, incoming_gradients, outputs_of
from bench.kernel_peers import (
    Floor,
    attention_floor,
    attention_inputs,
    cross_entropy_floor,
    gelu_floor,
    layer_norm_floor,
)
from bench.step import random_model
from kernels import add_dual_layer_norm, add_layer_norm, bias_gelu, linear, linear_cross_entropy, rotary_attention
from kernels.backend import triton_runs
from kernels.cross_entropy import CHUNK, TRITON_CHUNK
from kernels.linear import product
from model import SIZES, Config
from parallel.gradients import Gradients
from plan.time import peak_flops
from runtime.errors import Parser, UserError, run_command
from runtime.host import reuse_freed_memory
from runtime.ranks import Dist
from step import Step, make_optimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TURNS = 3  # in which every op and the step are measured
STEPS = 3  # of a turn, after one that does not count
BETWEEN = "between the ops"


def parse(arguments: list[str]) -> Namespace:
    """The settings of a command line. Raises UserError on one that can not work."""
    cuda = torch.cuda.is_available()
    size, batch, seq_len, precision = ("160m", 8, 2048, "bf16") if cuda else ("14m", 4, 512, "fp32")
    parser = Parser(prog="bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default=size, metavar="NAMES", help=f"one Pythia or more, as 14m,70m ({size})")
    parser.add_argument("--batch", type=int, default=batch, metavar="N", help=f"rows of a step ({batch})")
    parser.add_argument("--seq-len", type=int, default=seq_len, metavar="N", help=f"tokens of a row ({seq_len})")
    parser.add_argument("--precision", choices=list(DTYPES), default=precision, help=f"of products ({precision})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw it; of several sizes FILE-SIZE.png each")
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
            import matplotlib  # noqa: F401 (better now than after all has been measured)
        except ImportError:
            raise UserError("--plot needs matplotlib: pip install matplotlib") from None
    return s


# The ops of a step


class Op(NamedTuple):
    name: str
    calls: int  # in a step
    floor: Floor  # of one call
    build: Callable[[], tuple[Callable, Callable[[], tuple[Tensor, ...]]]]
    """Make inputs; what is timed, and what is to be done before each round of it and gives its arguments."""


class Form(NamedTuple):
    """What the shapes and dtypes of a step follow from; config.seq_len is that of the step."""

    config: Config
    batch: int
    dtype: torch.dtype  # of activations and products; parameters are float32
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.batch * self.config.seq_len

    def draw(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """Normal numbers, small enough that no sum of them overflows or saturates."""
        return (0.1 * torch.randn(shape, device=self.device)).to(dtype or self.dtype).requires_grad_(grad)

    def activation(self, width: int, grad: bool = True) -> Tensor:
        return self.draw(self.batch, self.config.seq_len, width, grad=grad)

    def vectors(self, *widths: int) -> list[Tensor]:
        """Biases, or the weights and biases of LayerNorms."""
        return [self.draw(width, dtype=torch.float32) for width in widths]

    def ids(self) -> Tensor:
        return torch.randint(self.config.vocab, (self.batch, self.config.seq_len), device=self.device)


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
    """in, out, and whether the bias is added there, of the four of a layer."""
    hidden, ffn = config.hidden, config.ffn
    return {
        "qkv": (hidden, 3 * hidden, True),
        "attn_out": (hidden, hidden, False),
        "mlp_in": (hidden, ffn, False),
        "mlp_out": (ffn, hidden, False),
    }


def projection_ops(name: str, form: Form) -> list[Op]:
    """The three products of a projection, 2 tokens in out FLOPs each. Every one reads two, and writes the third, of an
    input [tokens, in], a weight [in, out] and an output [tokens, out]. The gradient of a bias belongs to d_weight."""
    width, out, biased = projections(form.config)[name]
    tokens, layers = form.tokens, form.config.layers
    numbers = tokens * width + width * out + tokens * out
    floor = Floor(2 * tokens * width * out, numbers * form.dtype.itemsize)

    def inputs(grad: bool = True) -> tuple[Tensor, ...]:
        return form.activation(width, grad), form.draw(out, width), *form.vectors(*[out] * biased)

    def d_input() -> tuple[Tensor, Tensor]:
        return form.activation(out, grad=False), form.draw(out, width, grad=False).T

    return [
        Op(f"{name} forward", layers, floor, partial(_forward, linear, inputs)),
        Op(f"{name} d_input", layers, floor, partial(_forward, product, d_input)),  # as backward of linear calls it
        Op(f"{name} d_weight", layers, floor, partial(_backward, linear, partial(inputs, grad=False))),
    ]


def loss_products(form: Form) -> list[Op]:
    """The three products inside linear_cross_entropy, one call a chunk of tokens."""
    tokens, vocab, hidden = form.tokens, form.config.vocab, form.config.hidden
    chunk = min(tokens, TRITON_CHUNK if triton_runs(torch.empty(0, dtype=form.dtype, device=form.device)) else CHUNK)
    numbers = chunk * hidden + chunk * vocab + vocab * hidden
    floor = Floor(2 * chunk * vocab * hidden, numbers * form.dtype.itemsize)
    chunks = -(-tokens // chunk)
    draw = partial(form.draw, grad=False)
    calls = {
        "forward": (product, lambda: (draw(chunk, hidden), draw(vocab, hidden))),
        "d_input": (product, lambda: (draw(chunk, vocab), draw(vocab, hidden).T)),
        "d_weight": (torch.mm, lambda: (draw(chunk, vocab).T, draw(chunk, hidden))),
    }
    return [Op(f"unembed {name}", chunks, floor, partial(_forward, *call)) for name, call in calls.items()]


def network_ops(form: Form) -> list[Op]:
    """Every op of forward and backward, as model/pythia.py calls it. Floors count tensors, not vectors or ids."""
    config, batch, itemsize = form.config, form.batch, form.dtype.itemsize
    layers, hidden, vocab, ffn = config.layers, config.hidden, config.vocab, config.ffn
    stream, table = form.tokens * hidden, vocab * hidden  # numbers in [batch, seq, hidden], and in an embedding

    def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight).to(form.dtype)

    def first_norms(x: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        return add_dual_layer_norm(x, None, None, *norms, config.eps)

    def norms(x: Tensor, attn: Tensor, mlp: Tensor, bias: Tensor, *norms: Tensor) -> tuple[Tensor, ...]:
        return add_dual_layer_norm(x, attn, mlp, *norms, config.eps, bias)

    def last_norm(x: Tensor, attn: Tensor, mlp: Tensor, bias: Tensor, *norm: Tensor) -> Tensor:
        return add_layer_norm(x, attn, mlp, *norm, config.eps, bias)[1]

    def gelu(h: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(h, bias, config.gelu)

    def embedding_inputs() -> tuple[Tensor, Tensor]:
        return form.ids(), form.draw(vocab, hidden, dtype=torch.float32)

    def streams(n: int, vectors: int) -> tuple[Tensor, ...]:
        return *(form.activation(hidden) for _ in range(n)), *form.vectors(*[hidden] * vectors)

    def loss_inputs() -> tuple[Tensor, ...]:
        return form.draw(form.tokens, hidden), form.draw(vocab, hidden, dtype=torch.float32), form.ids().flatten()

    def pair(name: str, calls: int, floors: tuple[Floor, Floor], function: Callable, make: Callable) -> list[Op]:
        passes = ("forward", _forward), ("backward", _backward)
        return [Op(f"{name} {p}", calls, f, partial(of, function, make)) for (p, of), f in zip(passes, floors)]

    def floors(floor_of: Callable) -> tuple[Floor, Floor]:
        return floor_of(config, batch, "forward", itemsize), floor_of(config, batch, "backward", itemsize)

    def moved(forward: int, backward: int) -> tuple[Floor, Floor]:
        """Floors of so many passes over the residual stream."""
        return Floor(0, forward * stream * itemsize), Floor(0, backward * stream * itemsize)

    embedding_floors = Floor(0, stream * (4 + itemsize)), Floor(0, stream * itemsize + 4 * table)
    loss_floor = cross_entropy_floor(config, batch, "both", itemsize)
    attention = partial(attention_inputs, config, batch, torch.empty(0, dtype=form.dtype, device=form.device))
    return [
        *pair("embedding", 1, embedding_floors, embedding, embedding_inputs),
        *pair("first norms", 1, moved(3, 5), first_norms, lambda: streams(1, 4)),  # x; u, v and x, dx', du, dv; dx
        *pair("add_dual_layer_norm", layers - 1, floors(layer_norm_floor), norms, lambda: streams(3, 5)),
        *(op for name in projections(config) for op in projection_ops(name, form)),
        *pair("rotary_attention", layers, floors(attention_floor), rotary_attention, attention),
        *pair("bias_gelu", layers, floors(gelu_floor), gelu, lambda: (form.activation(ffn), *form.vectors(ffn))),
        *pair("last norm", 1, moved(5, 3), last_norm, lambda: streams(3, 3)),  # x, attn, mlp; x', u and x', du; dx
        Op("linear_cross_entropy", 1, loss_floor, partial(_both, linear_cross_entropy, loss_inputs)),
    ]


def build_step(form: Form) -> Step:
    """train.py's step. At a learning rate of 0 every one is like the first."""
    model, ranks = random_model(form.config, form.device), Dist(device=form.device)
    model.compute_dtype = form.dtype
    return Step(model, Gradients(model, ranks, "none"), make_optimizer(model, 0.0), ranks)


def update_ops(form: Form, step: Step) -> list[Op]:
    """What a step does with gradients, which it must have when these are timed, and with parameters. AdamW reads a
    parameter, its gradient and two moments, and writes all but the gradient. In half precision RoundedWeights rounds
    weights, and writes their gradients in float32; with a CUDA graph all are added to what lies there, and zeroed."""
    parameters, rounded = step.gradients.parameters, {weight: copy for _, weight, copy in step.rounded.places}
    numbers, one = form.config.parameters, torch.ones((), device=form.device)
    # What is added to gradients is as large as this.
    added = {weight: rounded.get(weight, weight) for weight in parameters} if step.graph else rounded

    def round_weights() -> None:
        with step.rounded:
            pass

    @torch.no_grad()
    def add_up() -> None:
        for weight, gradient in added.items():
            if step.graph:
                weight.grad += gradient
            else:
                gradient.to(weight.dtype)

    def update() -> None:
        step.optimizer.grad_scale = one  # divides gradients, and leaves them so
        step.optimizer.step()

    def moved(read: dict[Tensor, Tensor], others: int) -> int:
        """Bytes: of tensors that are read, and `others` for each of their numbers."""
        return sum((tensor.itemsize + others) * tensor.numel() for tensor in read.values())

    calls = [
        ("weights rounded", moved(rounded, 4), round_weights),
        ("gradients added up", moved(added, 8 if step.graph else 4), add_up),
        ("norm of gradients", 4 * numbers, step.gradients.squared_norm),
        ("clipping and AdamW", 28 * numbers, update),
        ("gradients zeroed", 4 * numbers if step.graph else 0, partial(step.optimizer.zero_grad, set_to_none=False)),
    ]
    return [Op(name, 1, Floor(0, moved), lambda call=call: (call, tuple)) for name, moved, call in calls if moved]


# Measured


class Measured(NamedTuple):
    ops: dict[str, list[float]]  # name -> seconds of one call, in every round
    steps: list[float]  # seconds of every step
    ceilings: Floor  # FLOP/s and bytes/s
    foreign_cpu: float | None  # share of the CPU that other processes took meanwhile


def measure_step(form: Form, ops: list[Op], step: Step, flush: Callable) -> Measured:
    """In each of some turns the ceilings, of which the best counts, some whole steps, and some rounds of every op."""
    device = form.device
    tokens = torch.randint(form.config.vocab, (1, form.batch, form.config.seq_len + 1), device=device)
    now = clock(device)

    def steps() -> list[float]:
        moments = []
        for _ in range(1 + STEPS):  # the first is not counted
            step.forward_backward(tokens)
            step.update(lr=0.0).tolist()
            moments.append(now())
        return [after - before for before, after in pairwise(moments)]

    watch, products, copies, step_seconds, seconds = ForeignCPU(), [], [], [], {op.name: [] for op in ops}
    steps()  # everything is compiled, and memory allocated
    with tqdm(total=TURNS * len(ops), desc=form.config.name, leave=False) as progress:
        for _ in range(TURNS):
            products.append(product_ceiling(form.dtype, device, flush))
            copies.append(copy_bandwidth(device, flush))
            step_seconds += undisturbed(steps, device)
            step.forward_backward(tokens)  # gradients for update_ops
            for op in ops:
                call, setup = op.build()
                seconds[op.name] += measure(call, device, flush, setup)
                progress.update()
    return Measured(seconds, step_seconds, Floor(max(products), max(copies)), watch.share())


# The report


def row(op: Op, seconds: list[float], ceilings: Floor) -> dict:
    """What is reported of an op: of all its calls in a step, and the spread of one call."""
    flops, moved = op.calls * op.floor.flops, op.calls * op.floor.bytes
    least = {"flops": flops / ceilings.flops, "bytes": moved / ceilings.bytes}
    bound = max(least, key=least.get)
    return {
        "op": op.name,
        "calls": op.calls,
        "seconds": op.calls * median(seconds),
        "call_seconds": {"min": min(seconds), "median": median(seconds), "max": max(seconds), "rounds": len(seconds)},
        "flops": flops,
        "bytes": moved,
        "bound": bound,
        "floor_seconds": least[bound],
    }


def rate_of(rows: list[dict]) -> float:
    """FLOP/s of some rows together."""
    return sum(row["flops"] for row in rows) / sum(row["seconds"] for row in rows)


def summarize(form: Form, rows: list[dict], measured: Measured, peak: float | None) -> dict:
    """The step as a whole. MFU is model FLOPs of a second over a rate, with all of the scores of attention credited and
    with their causal half: as measured, and if every op took its floor."""
    seconds, floor = median(measured.steps), sum(row["floor_seconds"] for row in rows)
    flops = {which: form.tokens * form.config.flops_per_token(causal=which == "causal") for which in ("full", "causal")}
    rates = {"the large product": measured.ceilings.flops} | ({"the data sheet": peak} if peak else {})
    return {
        "seconds": seconds,
        "seconds_min": min(measured.steps),
        "seconds_max": max(measured.steps),
        "steps": len(measured.steps),
        "tokens_per_s": form.tokens / seconds,
        "ops_seconds": sum(row["seconds"] for row in rows),
        "floor_seconds": floor,
        "copy_bytes_per_s": measured.ceilings.bytes,
        "large_product_flops_per_s": measured.ceilings.flops,
        "foreign_cpu": measured.foreign_cpu,
        "flops": flops,
        "mfu": {of: {which: n / seconds / rate for which, n in flops.items()} for of, rate in rates.items()},
        "mfu_at_floors": {of: {which: n / floor / rate for which, n in flops.items()} for of, rate in rates.items()},
    }


def above(row: dict) -> float:
    return row["seconds"] - row["floor_seconds"]


def table(rows: list[dict], step: dict) -> str:
    """One line an op, the one with most to win first; then the step."""
    lines = [("op", "calls", "ms a step", "of step", "floor ms", "floor by", "reached", "ms above")]
    for r in sorted(rows, key=above, reverse=True):
        reached = r["floor_seconds"] / r["seconds"] if r["bound"] else None
        lines.append(_line(r["op"], r["calls"], r["seconds"], step["seconds"], r["floor_seconds"], r["bound"], reached))
    reached = step["floor_seconds"] / step["seconds"]
    lines.append(_line("the step", 1, step["seconds"], step["seconds"], step["floor_seconds"], None, reached))
    return aligned(lines)


def _line(op: str, calls: int, seconds: float, step: float, floor: float, bound: str | None, reached: float | None):
    return (
        op,
        f"{calls}",
        f"{1e3 * seconds:,.2f}",
        f"{seconds / step:.1%}",
        f"{1e3 * floor:,.2f}",
        {"flops": "FLOPs", "bytes": "bytes", None: ""}[bound],
        "" if reached is None else f"{reached:.0%}",
        f"{1e3 * (seconds - floor):,.2f}",
    )


def products_table(products: list[dict], ceiling: float) -> str:
    """The rates of the three products of every weight, a line each."""
    rates = {row["op"]: rate_of([row]) for row in products}
    lines = [("TFLOP/s (of the large product)", "forward", "d_input", "d_weight")]
    for name in dict.fromkeys(op.split()[0] for op in rates):
        cells = (rates[f"{name} {which}"] for which in lines[0][1:])
        lines.append((name, *(f"{rate / 1e12:.3g} ({rate / ceiling:.0%})" for rate in cells)))
    return aligned(lines)


def aligned(lines: list[tuple[str, ...]]) -> str:
    """Columns, of which the first is words and the others are numbers."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rows = [[cell.rjust(width) for cell, width in zip(line, widths)] for line in lines]
    return "\n".join("  ".join((line[0].ljust(widths[0]), *row[1:])).rstrip() for line, row in zip(lines, rows))


def text(title: str, products: list[dict], attention: float, rows: list[dict], step: dict) -> str:
    """All that is printed of a size."""
    large = step["large_product_flops_per_s"]
    took = f"{1e3 * step['seconds']:,.1f} ms ({1e3 * step['seconds_min']:,.1f}..{1e3 * step['seconds_max']:,.1f})"
    lines = [
        f"\n{title}: {took}, {step['tokens_per_s']:,.0f} tokens/s",
        f"copy {step['copy_bytes_per_s'] / 1e9:,.1f} GB/s, large product {large / 1e12:,.3g} TFLOP/s; all products of "
        f"the step {rate_of(products) / 1e12:,.3g}, attention {attention / 1e12:,.3g}",
        "",
        products_table(products, large),
        "",
        table(rows, step),
    ]
    for (of, now), best in zip(step["mfu"].items(), step["mfu_at_floors"].values()):
        causal = f"{now['causal']:.1%} with the causal half of attention"
        lines.append(f"MFU of {of} {now['full']:.1%}, {causal}; at the floors {best['full']:.1%}, {best['causal']:.1%}")
    if step["foreign_cpu"] is not None:
        lines.append(f"other processes took {step['foreign_cpu']:.0%} of the CPU meanwhile")
    return "\n".join(lines)


COLOURS = {  # of the pieces of a bar
    "flops": ("#2f6fb3", "floor, by FLOPs"),
    "bytes": ("#2a9d7c", "floor, by bytes"),
    "above": ("#f2a65a", "above the floor"),
    "between": ("#9aa3ad", BETWEEN),
}


class Bar(NamedTuple):
    label: str
    seconds: float
    reached: str  # what is written beside it
    pieces: dict[str, float]  # in seconds, for COLOURS


def bars(rows: list[dict], step_seconds: float) -> list[Bar]:
    """The bars of the picture, the shortest first. What is less than 1/200 of a step is drawn as one."""

    def bar(label: str, rows: list[dict]) -> Bar:
        pieces = dict.fromkeys(COLOURS, 0.0)
        for r in rows:
            if r["bound"]:
                floor = min(r["floor_seconds"], r["seconds"])  # an op may find its inputs in a cache
                pieces[r["bound"]] += floor
                pieces["above"] += r["seconds"] - floor
            else:
                pieces["between"] += max(r["seconds"], 0.0)
        seconds, floors = (sum(r[key] for r in rows) for key in ("seconds", "floor_seconds"))
        reached = f", {floors / seconds:.0%}" if floors else ""
        return Bar(label, seconds, f"{1e3 * seconds:,.2f} ms{reached}", pieces)

    small = [r for r in rows if abs(r["seconds"]) <= step_seconds / 200]
    large = [r for r in rows if r not in small]
    labels = [r["op"] if r["calls"] == 1 else f"{r['op']}  × {r['calls']}" for r in large]
    drawn = [bar(label, [r]) for label, r in zip(labels, large)]
    if small:
        drawn.append(bar(f"{len(small)} others", small))
    return sorted(drawn, key=lambda bar: bar.seconds)


def plot(path: Path, title: str, subtitle: str, rows: list[dict], step: dict) -> None:
    """A bar an op, the longest on top: its floor and what is above it, in milliseconds of a step."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = bars(rows, step["seconds"])
    figure = Figure(figsize=(10, 2.2 + 0.3 * len(drawn)), dpi=150, layout="constrained")
    axes = figure.subplots()
    longest = 1e3 * drawn[-1].seconds
    for y, bar in enumerate(drawn):
        left = 0.0
        for kind, piece in bar.pieces.items():
            axes.barh(y, 1e3 * piece, left=left, height=0.72, color=COLOURS[kind][0])
            left += 1e3 * piece
        axes.text(left + 0.008 * longest, y, bar.reached, va="center", fontsize=8, color="#444444")
    axes.set_yticks(range(len(drawn)), [bar.label for bar in drawn], fontsize=9)
    axes.set(xlim=(0, 1.16 * longest), ylim=(-0.6, len(drawn) - 0.4))
    axes.set_xlabel("milliseconds a step; percent: floor over time taken", fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e3e6ea", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=26)
    axes.annotate(subtitle, (0, 1), (0, 10), "axes fraction", "offset points", fontsize=9, color="#444444")
    handles = [Patch(color=colour, label=label) for colour, label in COLOURS.values()]
    axes.legend(handles=handles, loc="lower right", fontsize=9, frameon=False)
    figure.savefig(path)


def run(s: Namespace, command: str) -> None:
    """Measure, print, write and draw, one size after the other."""
    reuse_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts, flush, peak = machine(device), flush_of(device), peak_flops(device)
    report = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": facts,
        "gpu": facts["gpu"],
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
    name = facts["gpu"] or f"{facts['cpu']}, {facts['cores']} cores"
    print(f"{name}; torch {facts['versions']['torch']}; {report['date']}")
    for size in s.sizes:
        try:
            products, rows, step = measure_size(s, size, device, flush, peak)
        except torch.OutOfMemoryError:
            raise UserError(f"{size} does not fit: lower --batch {s.batch} or --seq-len {s.seq_len}") from None
        attention = rate_of([r for r in rows if r["op"].startswith("rotary_attention")])
        report["product_flops_per_s"][size], report["attention_flops_per_s"][size] = rate_of(products), attention
        for ceiling in ("copy_bytes_per_s", "large_product_flops_per_s"):
            report[ceiling] = max(report[ceiling], step[ceiling])
        report["steps"][size] = step
        report["products"] += [{"size": size} | r for r in products]
        report["rows"] += [{"size": size} | r for r in rows]
        if s.json:
            s.json.write_text(json.dumps(report, indent=1) + "\n")
        shape = f"{s.batch} x {s.seq_len} tokens a step, {s.precision}"
        print(text(f"Pythia {size}, {shape}", products, attention, rows, step), flush=True)
        if s.plot:
            path = s.plot if len(s.sizes) == 1 else s.plot.with_stem(f"{s.plot.stem}-{size}")
            best = f"{1e3 * step['floor_seconds']:,.1f} if every op took its floor"
            title = f"A step of Pythia {size}: {1e3 * step['seconds']:,.1f} ms, {best}"
            plot(path, title, f"{name}: {shape}", rows, step)


def measure_size(
    s: Namespace, size: str, device: torch.device, flush: Callable, peak: float | None
) -> tuple[list[dict], list[dict], dict]:
    """The rows of all products, those of all ops with what is between them, and the step."""
    gc.collect()  # a step with a CUDA graph refers to itself
    form = Form(replace(SIZES[size], seq_len=s.seq_len), s.batch, DTYPES[s.precision], device)
    step = build_step(form)
    ops, unembed = [*network_ops(form), *update_ops(form, step)], loss_products(form)
    measured = measure_step(form, [*ops, *unembed], step, flush)
    rows = [row(op, measured.ops[op.name], measured.ceilings) for op in ops]
    products = [r for r in rows if r["op"].split()[0] in projections(form.config)]
    products += [row(op, measured.ops[op.name], measured.ceilings) for op in unembed]
    summary = summarize(form, rows, measured, peak)
    between = summary["seconds"] - summary["ops_seconds"]
    zero = {"flops": 0, "bytes": 0, "bound": None, "floor_seconds": 0.0}
    return products, [*rows, {"op": BETWEEN, "calls": 1, "seconds": between} | zero], summary


def main() -> None:
    run(parse(sys.argv[1:]), shlex.join(["python", "-m", "bench.roofline", *sys.argv[1:]]))


if __name__ == "__main__":
    run_command(main)
