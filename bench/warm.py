"""Compile the kernels of several sizes side by side, so that whatever comes after finds them in Triton's cache.

    python -m bench.warm --size 14m,160m,1.4b

On a GPU, a process for each size makes one small step of two layers: a kernel is compiled for the widths of a model.
"""

import json
import subprocess
import sys
import time
from argparse import SUPPRESS
from dataclasses import replace
from pathlib import Path

import torch

from bench.step import ROOT, random_model
from model import SIZES
from parallel.gradients import Gradients
from runtime.errors import Parser, UserError, run_command
from runtime.ranks import Dist
from step import Step, make_optimizer


def small_step(size: str, device: torch.device) -> float:
    """A step of one row of 512 tokens, in bfloat16. Returns its loss in nats."""
    model = random_model(replace(SIZES[size], layers=2), device)
    model.compute_dtype = torch.bfloat16
    ranks = Dist(device=device)
    step = Step(model, Gradients(model, ranks, "none"), make_optimizer(model, 1e-3), ranks)
    step.forward_backward(torch.randint(SIZES[size].vocab, (1, 1, 513), device=device))
    return step.update(1e-3)[0].item()


def main() -> None:
    parser = Parser(prog="bench.warm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default=",".join(SIZES), metavar="NAMES", help="(default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write there how long each took")
    parser.add_argument("--here", action="store_true", help=SUPPRESS)  # this process is one of those
    s = parser.parse_args(sys.argv[1:])
    sizes = s.size.split(",")
    if unknown := set(sizes) - set(SIZES):
        raise UserError(f"--size knows {', '.join(SIZES)}, not {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        raise UserError("bench.warm needs a GPU: on a CPU nothing is compiled")
    if s.here:
        small_step(sizes[0], torch.device("cuda"))
        return
    began, line = time.perf_counter(), (sys.executable, "-m", "bench.warm", "--here", "--size")
    started = {size: subprocess.Popen([*line, size], cwd=ROOT) for size in sizes}
    failed = [size for size, process in started.items() if process.wait()]
    if failed:
        raise UserError(f"a step of {', '.join(failed)} failed: see above")
    seconds = time.perf_counter() - began
    print(f"compiled for {', '.join(sizes)} in {seconds:.1f} s")
    if s.json:
        s.json.write_text(json.dumps({"sizes": sizes, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    run_command(main)
