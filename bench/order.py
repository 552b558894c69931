"""The order at the size of the Pile: time and memory to build it, to open it again, and to read batches.

    python -m bench.order --folder /large/disk             210,607,728 documents, 330 billion tokens; 20 minutes, 11 GB
    python -m bench.order --folder /tmp --scale 0.01       a hundredth of it

The index is made of random sizes like those of the Pile. The tokens are a sparse file, which takes no room on the disk.
Every figure is from a process of its own. Times are wall-clock, memory is the peak of resident memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from corpus.indexed import HEADER, MAGIC, block_slices
from data import batch, check_step, open_rows, requested_samples
from runtime.errors import Parser, UserError, run_command

DOCUMENTS, TOKENS = 210_607_728, 330e9
STEPS, BATCH = 143_000, 1024
ROOT = Path(__file__).parents[1]


def make(prefix: Path, scale: float) -> dict:
    """Write PREFIX.idx, and PREFIX.bin with zeros."""
    draw, documents = np.random.default_rng(0), int(DOCUMENTS * scale)
    mean, sigma = TOKENS / DOCUMENTS, 1.4  # log-normal: most documents are short, and a few have a million tokens
    sizes, begin = np.empty(documents, "<i4"), 0
    with open(f"{prefix}.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, documents, documents + 1))
        for block in block_slices(documents, "making sizes"):
            drawn = draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, block.stop - block.start)
            sizes[block] = drawn.clip(1, 2**27)
        file.write(sizes)
        for block in block_slices(documents, "making positions"):
            ends = begin + np.cumsum(2 * sizes[block].astype("<i8"))
            file.write(np.concatenate([[begin], ends[:-1]]).astype("<i8"))
            begin = int(ends[-1])
        for block in block_slices(documents + 1, "making document marks"):
            file.write(np.arange(block.start, block.stop, dtype="<i8"))
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(begin)
    return {}


def samples(scale: float) -> int:
    return requested_samples(int(STEPS * scale), BATCH)


def shuffles(prefix: Path, scale: float) -> dict:
    """The two shuffles that define the order, alone, as GPT-NeoX makes them: the floor of building it."""
    rng = np.random.RandomState(1234)
    begun = time.perf_counter()
    for count, dtype in ((int(DOCUMENTS * scale), np.int32), (int(TOKENS * scale / 2048), np.uint32)):
        rng.shuffle(np.arange(count, dtype=dtype))
    return {"seconds": time.perf_counter() - begun}


def opened(prefix: Path, scale: float) -> dict:
    """Open the order; the first time that builds it."""
    begun = time.perf_counter()
    rows = open_rows(prefix, samples(scale))
    return {"seconds": time.perf_counter() - begun, "rows": len(rows), "order_sha256": rows.sha256}


def batches(prefix: Path, scale: float) -> dict:
    """Read batches of 1024 rows: of steps that were never read, and of the same ones from the page cache."""
    rows = open_rows(prefix, samples(scale))
    steps = np.linspace(0, len(rows) // BATCH - 1, 20).astype(int).tolist()
    check_step(rows, steps[-1], BATCH)

    def seconds() -> float:
        times = []
        for step in steps:
            begun = time.perf_counter()
            batch(rows, step, BATCH)
            times.append(time.perf_counter() - begun)
        return float(np.median(times))

    return {"seconds": seconds(), "again": min(seconds() for _ in range(5))}


def view(prefix: Path, scale: float) -> dict:
    """`data.py view`, with the start of Python."""
    begun, command = (
        time.perf_counter(),
        [sys.executable, "data.py", "view", "--data", prefix, "--step", "3", "--row", "3"],
    )
    command += ["--steps", int(STEPS * scale)]
    subprocess.run([*map(str, command)], cwd=ROOT, check=True, capture_output=True)
    return {"seconds": time.perf_counter() - begun}


def alone(work: Callable, prefix: Path, scale: float) -> dict:
    """Run a function above in a process of its own. Adds its peak memory in bytes."""
    code = f"from bench.order import *; report({work.__name__}, Path({str(prefix)!r}), {scale})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{work.__name__} failed: {(done.stderr.splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout)


def report(work: Callable, prefix: Path, scale: float) -> None:
    print(json.dumps(work(prefix, scale) | {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(prog="bench.order", description=__doc__.split("\n\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files are made; they stay")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="share of the Pile (default: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file")
    s = parser.parse_args(arguments)
    if not 1e-3 <= s.scale <= 1:
        raise UserError(f"--scale {s.scale} must be within 0.001 .. 1")
    return s


def main() -> None:
    s = parse(sys.argv[1:])
    folder = s.folder / f"order-{s.scale:g}"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = folder / "pile"
    if list(folder.glob("*.order-*")):
        raise UserError(f"{folder} has an order already: remove the folder, so that it is built")
    alone(make, prefix, s.scale)  # a process begins with the peak memory of the one that starts it
    print(
        f"{os.cpu_count()} cores, numpy {np.__version__}, {s.scale:g} of the Pile: {DOCUMENTS * s.scale:,.0f} documents"
    )
    found = {"floor": alone(shuffles, prefix, s.scale), "build": alone(opened, prefix, s.scale)}
    found |= {"open again": alone(opened, prefix, s.scale), "batches": alone(batches, prefix, s.scale)}
    found["view"] = view(prefix, s.scale)
    gigabytes = {name: f"{figures['bytes'] / 1e9:.2f} GB" for name, figures in found.items() if "bytes" in figures}
    ratio = found["build"]["seconds"] / found["floor"]["seconds"]
    print(f"two shuffles alone           {found['floor']['seconds']:9.3f} s")
    print(
        f"build {found['build']['rows']:,} rows{found['build']['seconds']:14.3f} s  {gigabytes['build']}, {ratio:.2f} x"
    )
    print(f"open again                   {found['open again']['seconds']:9.3f} s  {gigabytes['open again']}")
    print(f"batch of 1024 rows           {found['batches']['seconds']:9.4f} s  {gigabytes['batches']}")
    print(f"the same, from the cache     {found['batches']['again']:9.4f} s")
    print(f"data.py view, one row        {found['view']['seconds']:9.3f} s")
    if s.json:
        s.json.write_text(json.dumps({"scale": s.scale, **found}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
