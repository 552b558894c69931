"""Compile the kernels of several sizes in parallel, so that later commands find them in Triton's cache.

    python -m bench.warm --size 14m,160m,1.4b

For each size a process makes one small step with two layers. That compiles all kernels of the size,
because they depend on the widths of the model and not on its depth. On a CPU nothing is compiled; it only runs.
"""

import json
import subprocess
import sys
import time
from argparse import SUPPRESS
from dataclasses import replace
from pathlib import Path

import torch

from bench.arm import ROOT, random_model
from model import SIZES, SUITE
from parallel.gradients import Gradients
from runtime.errors import Parser, UserError, run_command
from runtime.ranks import Dist
from step import Step, make_optimizer


def small_step(size: str, device: torch.device) -> float:
    """Make one step of one row, in bfloat16 on a GPU. Returns the loss in nats."""
    model = random_model(replace(SIZES[size], layers=2), device)
    model.compute_dtype, tokens = (torch.bfloat16, 512) if device.type == "cuda" else (torch.float32, 16)
    dist = Dist(device=device)
    step = Step(model, Gradients(model, dist, "none"), make_optimizer(model, 1e-3), dist)
    step.forward_backward(torch.randint(SIZES[size].vocab, (1, 1, tokens + 1), device=device))
    return step.update(1e-3)[0].item()


def main() -> None:
    parser = Parser(prog="bench.warm", description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default=",".join(SUITE), metavar="NAMES", help="sizes, as 14m,70m (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the sizes and the seconds taken to this file")
    parser.add_argument("--here", action="store_true", help=SUPPRESS)  # this process makes the step itself
    s = parser.parse_args(sys.argv[1:])
    sizes = s.size.split(",")
    if unknown := set(sizes) - set(SIZES):
        raise UserError(f"--size knows {', '.join(SIZES)}, not {', '.join(sorted(unknown))}")
    if s.here:
        small_step(sizes[0], torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return
    began, command = time.perf_counter(), (sys.executable, "-m", "bench.warm", "--here", "--size")
    processes = {size: subprocess.Popen([*command, size], cwd=ROOT) for size in sizes}
    if failed := [size for size, process in processes.items() if process.wait()]:
        raise UserError(f"a step of {', '.join(failed)} failed: see its output above")
    seconds = time.perf_counter() - began
    print(f"compiled for {', '.join(sizes)} in {seconds:.1f} s")
    if s.json:
        s.json.write_text(json.dumps({"sizes": sizes, "seconds": seconds}) + "\n")


if __name__ == "__main__":
    run_command(main)
