"""Time tiles of the attention kernels on this GPU, and print the entries of kernels/tiles.py to commit.

    python -m bench.tiles --head-dim 64,128 --json FILE

Candidates are the shipped tile of every kernel and those below, which fit more programs on a multiprocessor or keep the
tensor cores busy for longer. A candidate must give the numbers of the shipped tile up to rounding, and the same bits
twice. Candidates take turns, so a slow phase of the GPU slows all of them. The shipped tile stays unless another one is
faster by more than NOISE. A head_dim takes about two minutes, most of them to compile.

Nothing here runs in training: the shape of a tile sets the order of summation, so the table must be static. After a
change of the table run `pytest -m cubin` and, on the GPU, `pytest -m gpu tests/kernels`.
"""

import json
import math
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.ceilings import machine
from bench.kernels.measure import reason
from bench.timing import flush_of, measure
from kernels import tiles
from kernels.attention import launch_dkv, launch_dq, launch_forward
from kernels.backend import triton_runs
from kernels.tiles import Attention, Tile
from model import SIZES
from runtime.errors import Parser, UserError, run_command
from runtime.files import atomic_write

SIZE_OF = {32: "31m", 64: "160m", 80: "2.8b", 128: "1.4b", 256: "1b"}  # head_dim -> the size whose shape is timed
TURNS = 3  # in each of them every candidate is timed
NOISE = 0.02  # of the time of a kernel
AGREEMENT = 2e-2  # relative difference, in the norm, of two tiles in half precision

# Tile(block_q, block_k, num_warps, num_stages). A program of forward and dq owns queries, one of dk and dv owns keys.
OWN_QUERIES = [
    *(Tile(*tile, stages) for tile in ((128, 128, 8), (128, 64, 8), (64, 64, 4)) for stages in (2, 3)),
    Tile(128, 32, 8, 2),
]
OWN_KEYS = [tile._replace(block_q=tile.block_k, block_k=tile.block_q) for tile in OWN_QUERIES]


class Kernel(NamedTuple):
    shipped: Callable[[Attention], Tile | None]
    candidates: list[Tile]
    matmuls: int
    launch: Callable[["Tensors", Tile], None]
    outputs: tuple[str, ...]  # what a launch writes


class Tensors(NamedTuple):
    """The tensors of one attention, as in kernels/attention.py."""

    qkv: Tensor
    out: Tensor
    d_out: Tensor
    lse: Tensor
    delta: Tensor
    d_qkv: Tensor


def _dkv(dk: bool, dv: bool) -> Callable[[Tensors, Tile], None]:
    return lambda t, tile: launch_dkv(t.qkv, t.d_out, t.lse, t.delta, t.d_qkv, tile, dk, dv)


KERNELS = {  # in the order in which one computes what the next one reads
    "forward": Kernel(
        lambda a: a.forward, OWN_QUERIES, 2, lambda t, tile: launch_forward(t.qkv, t.out, t.lse, tile), ("out", "lse")
    ),
    "dq": Kernel(lambda a: a.dq, OWN_QUERIES, 3, lambda t, tile: launch_dq(*t, tile), ("delta", "d_qkv")),
    "dk and dv": Kernel(lambda a: None if a.dv else a.dk, OWN_KEYS, 4, _dkv(True, True), ("d_qkv",)),
    "dk": Kernel(lambda a: a.dk if a.dv else None, OWN_KEYS, 3, _dkv(True, False), ("d_qkv",)),
    "dv": Kernel(lambda a: a.dv, OWN_KEYS, 2, _dkv(False, True), ("d_qkv",)),
}


def parse(arguments: list[str]) -> Namespace:
    """Parse the command line. Raises UserError if a setting cannot work."""
    parser = Parser(prog="bench.tiles", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    known = ",".join(map(str, SIZE_OF))
    add("--head-dim", default=known, metavar="NUMBERS", help=f"entries to time (default: {known})")
    add("--size", metavar="NAME", help="time the shape of this size, if --head-dim is one number")
    add("--batch", type=int, default=8, metavar="N", help="rows (default: 8)")
    add("--seq-len", type=int, default=2048, metavar="N", help="tokens of a row (default: 2048)")
    add("--json", type=Path, metavar="FILE", help="write every time to this file")
    s = parser.parse_args(arguments)
    names = s.head_dim.split(",")
    if unknown := set(names) - set(known.split(",")):
        raise UserError(f"--head-dim knows {known}, not {', '.join(sorted(unknown))}")
    s.sizes = {head_dim: SIZE_OF[head_dim] for head_dim in dict.fromkeys(map(int, names))}
    if s.size:
        if s.size not in SIZES:
            raise UserError(f"--size knows {', '.join(SIZES)}, not {s.size}")
        if list(s.sizes) != [SIZES[s.size].head_dim]:
            raise UserError(f"--size {s.size} needs --head-dim {SIZES[s.size].head_dim}, not {s.head_dim}")
        s.sizes = {SIZES[s.size].head_dim: s.size}
    if min(s.batch, s.seq_len) < 1:
        raise UserError(f"--batch and --seq-len must be positive, not {s.batch} and {s.seq_len}")
    if s.json and not s.json.parent.is_dir():
        raise UserError(f"--json {s.json}: there is no directory {s.json.parent}")
    return s


# ---- the measurement


def draw(batch: int, seq: int, heads: int, head_dim: int, like: Tensor) -> Tensors:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=like.device).to(like.dtype)

    lse, delta = (torch.empty(batch, heads, seq, device=like.device) for _ in range(2))
    qkv, d_out = normal(batch, seq, heads, 3, head_dim), normal(batch, seq, heads, head_dim)
    return Tensors(qkv, torch.empty_like(d_out), d_out, lse, delta, torch.zeros_like(qkv))


def results(kernel: Kernel, tensors: Tensors, tile: Tile) -> list[Tensor]:
    """Copies of what a launch with this tile writes."""
    kernel.launch(tensors, tile)
    return [getattr(tensors, name).clone() for name in kernel.outputs]


def obstacle(kernel: Kernel, tensors: Tensors, tile: Tile, expected: list[Tensor]) -> str:
    """Why the tile cannot be used, or "". `expected` is what the shipped tile writes, or empty."""
    try:
        found, again = (results(kernel, tensors, tile) for _ in range(2))
    except Exception as error:  # of the compiler or the launch: too much shared memory, for example
        return reason(error)
    if not all(map(torch.equal, found, again)):
        return "two launches give different bits"
    for name, x, y in zip(kernel.outputs, found, expected):
        difference = ((x.double() - y.double()).norm() / y.double().norm()).item()
        if not difference < AGREEMENT:
            return f"{name} differs from the shipped tile's by {difference:.1e}"
    return ""


class Timed(NamedTuple):
    tile: Tile
    seconds: list[float]  # of every round; empty if there is an obstacle
    obstacle: str = ""

    @property
    def median(self) -> float:
        return median(self.seconds)


def time_kernel(kernel: Kernel, shipped: Tile | None, tensors: Tensors, flush: Callable) -> list[Timed]:
    """Every candidate, the shipped tile first. Afterwards the tensors hold what the first usable tile writes."""
    candidates = list(dict.fromkeys([shipped, *kernel.candidates] if shipped else kernel.candidates))
    expected, obstacles = [], {}
    for tile in candidates:
        obstacles[tile] = obstacle(kernel, tensors, tile, expected)
        if not obstacles[tile] and not expected:
            expected = results(kernel, tensors, tile)
    usable = [tile for tile in candidates if not obstacles[tile]]
    seconds = {tile: [] for tile in candidates}
    for _ in range(TURNS):
        for tile in usable:
            seconds[tile] += measure(lambda tile=tile: kernel.launch(tensors, tile), tensors.qkv.device, flush)
    for tile in usable[:1]:
        kernel.launch(tensors, tile)
    return [Timed(tile, seconds[tile], obstacles[tile]) for tile in candidates]


# ---- the choice


def best(timed: list[Timed], shipped: Tile | None) -> Timed | None:
    """The fastest tile, or the shipped one if the fastest is not faster by more than NOISE. None if none runs."""
    usable = [t for t in timed if not t.obstacle]
    fastest = min(usable, key=lambda t: t.median, default=None)
    for t in usable:
        if t.tile == shipped and (1 - NOISE) * t.median <= fastest.median:
            return t
    return fastest


def choose(timed: dict[str, list[Timed]], shipped: Attention) -> Attention:
    """The entry to commit. A kernel of which no tile runs keeps its shipped tile.

    dk and dv stay in one launch, or in two, unless the other is faster by more than NOISE.
    """
    found = {name: best(timed[name], kernel.shipped(shipped)) for name, kernel in KERNELS.items()}
    forward, dq = (found[name].tile if found[name] else getattr(shipped, name) for name in ("forward", "dq"))
    one, dk, dv = found["dk and dv"], found["dk"], found["dv"]
    one_launch = (one.median if one else math.inf) * (1 - NOISE if shipped.dv is None else 1)
    two_launches = (dk.median + dv.median if dk and dv else math.inf) * (1 if shipped.dv is None else 1 - NOISE)
    if one_launch == two_launches == math.inf:
        return shipped._replace(forward=forward, dq=dq)
    return Attention(forward, dq, one.tile) if one_launch < two_launches else Attention(forward, dq, dk.tile, dv.tile)


def entry(head_dim: int, launches: Attention) -> str:
    """A line of kernels/tiles.py."""
    written = ", ".join(f"Tile({', '.join(map(str, tile))})" for tile in launches if tile)
    return f"        {head_dim}: Attention({written}),"


def table(timed: dict[str, list[Timed]], shipped: Attention, flops: float) -> str:
    """The evidence: a line for every candidate. flops: of one matmul, of which only the causal half is counted."""
    lines = [f"{'kernel':10} {'tile':18} {'ms':>8} {'min':>8} {'max':>8} {'TFLOP/s':>8}"]
    for name, kernel in KERNELS.items():
        for t in timed[name]:
            line = f"{name:10} {', '.join(map(str, t.tile)):18} "
            if t.obstacle:
                line += t.obstacle
            else:
                line += " ".join(f"{1e3 * x:8.3f}" for x in (t.median, min(t.seconds), max(t.seconds)))
                line += f" {kernel.matmuls * flops / t.median / 1e12:8.1f}"
            lines.append(line + "  shipped" * (t.tile == kernel.shipped(shipped)))
    return "\n".join(lines)


# ---- the command


def time_all(shape: tuple[int, int, int, int], like: Tensor, shipped: Attention) -> dict[str, list[Timed]]:
    """The candidates of every kernel for (batch, seq, heads, head_dim), with the dtype and device of `like`."""
    tensors, flush, timed = draw(*shape, like), flush_of(like.device), {}
    for name, kernel in tqdm(KERNELS.items(), f"head_dim {shape[3]}", leave=False):
        timed[name] = time_kernel(kernel, kernel.shipped(shipped), tensors, flush)
    return timed


def run(s: Namespace, command: str, like: Tensor) -> None:
    """Time, print and write the entries of s.sizes, with the dtype and device of `like`."""
    arch = tiles.architecture(like.device)
    report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "command": command, "arch": arch}
    report |= {"machine": machine(like.device), "entries": {}, "times": {}}
    print(f"{report['machine']['gpu']}; torch {torch.__version__}; {report['date']}")
    for head_dim, size in s.sizes.items():
        heads, shipped = SIZES[size].heads, tiles.attention(arch, head_dim, like.dtype)
        try:
            timed = time_all((s.batch, s.seq_len, heads, head_dim), like, shipped)
        except torch.OutOfMemoryError:
            raise UserError(f"{size} does not fit: lower --batch {s.batch} or --seq-len {s.seq_len}") from None
        chosen = choose(timed, shipped)
        print(f"\nhead_dim {head_dim}, the shape of {size}: {s.batch} x {s.seq_len} tokens, {heads} heads")
        print(table(timed, shipped, s.batch * s.seq_len**2 * heads * head_dim))
        print(f"\nATTENTION[{arch}], {'as shipped' if chosen == shipped else 'changed'}:\n{entry(head_dim, chosen)}")
        sys.stdout.flush()
        report["entries"][head_dim] = entry(head_dim, chosen).strip()
        report["times"][size] = {name: [t._asdict() for t in ts] for name, ts in timed.items()}
        if s.json:
            with atomic_write(s.json, "w") as file:
                file.write(json.dumps(report, indent=1) + "\n")


def main() -> None:
    s = parse(sys.argv[1:])
    if not torch.cuda.is_available() or not triton_runs(torch.empty(0, device="cuda")):
        raise UserError("bench.tiles needs a GPU of compute capability 8, 9 or 10: there is none")
    like = torch.empty(0, dtype=torch.bfloat16, device="cuda")
    run(s, shlex.join(["python", "-m", "bench.tiles", *sys.argv[1:]]), like)


if __name__ == "__main__":
    run_command(main)
