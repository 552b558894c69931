"""All measurements of this machine, in pieces: correctness, the step of every size, the roofline, the kernels.

    python -m bench.all                      run all pieces; run the command again to continue
    python -m bench.all --again step-160m    run this piece again

Every piece is a process with a time limit. It writes NAME.json and NAME.log to a directory named after the GPU. If a
piece fails, the last line of its log is printed, and the other pieces still run. A result is reused if its file is
intact and code and machine are the same; all.json records them. `python -m bench.report` then writes the tables of
speeds. On a CPU the shapes are small: they only show that the pieces work.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from contextlib import suppress
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import torch
from tqdm import tqdm

from bench.ceilings import machine
from bench.kernels.peers import OPS
from bench.report import RESULTS, ROOT, aligned
from model import SIZES
from plan.memory import SAVED_ACTIVATIONS, USABLE, Job, total_memory
from runtime.errors import Parser, UserError, run_command

STEP_SIZES = ("14m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b")
COMPILED = ("160m", "1.4b")  # sizes with compiled peers: compiling them takes the most time
BATCHES = (8, 4, 2, 1)  # rows of 2048 tokens: the largest that fits is measured
SPARE = 10  # seconds that bench.step needs to start and end, within the time limit of its piece

# Placeholders in a command, and the ending of the file that replaces them. "{seconds}" becomes the limit less SPARE.
ENDINGS = {"{json}": ".json", "{plot}": ".png", "{junit}": ".xml"}


class Piece(NamedTuple):
    name: str
    seconds: float  # time limit
    command: tuple[str, ...] = ()
    obstacle: str = ""  # why it cannot run on this machine


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def pieces(gpu_memory: float | None) -> list[Piece]:
    """The pieces for a GPU with gpu_memory bytes, or for a CPU (None).

    The time limits are generous for an H100. Most of the time goes into compiling, which is done once.
    """
    picture = ("--plot", "{plot}") if find_spec("matplotlib") else ()
    roofline = python("bench.roofline", "--json", "{json}", *picture)
    if not gpu_memory:
        small = ("--batch", "1", "--seq-len", "256", "--no-compile")
        return [
            Piece("correctness", 0, obstacle="needs a GPU"),
            Piece("roofline", 240, (*roofline, "--size", "14m")),
            *(kernels(op, 120) for op in OPS),
            *(step(size, 120, *small) for size in ("14m", "70m")),
        ]
    parallel = ("-n", "8", "--dist", "loadgroup") if find_spec("xdist") else ()
    return [
        Piece("warm", 50, python("bench.warm", "--json", "{json}", "--size", ",".join(STEP_SIZES))),
        Piece("correctness", 210, python("pytest", "-m", "gpu", "-v", *parallel, "--junitxml", "{junit}")),
        *(step_that_fits(size, 60 if size in COMPILED else 32, gpu_memory) for size in STEP_SIZES),
        Piece("roofline", 60, (*roofline, "--size", "160m,1.4b")),
        *(kernels(op, 120 if op == "rotary_attention" else 60) for op in OPS),
    ]


def kernels(op: str, seconds: float) -> Piece:
    options = "-k", op, "--benchmark-only", "--benchmark-json", "{json}", "-q"
    return Piece(f"kernels-{op}", seconds, python("pytest", "bench", *options))


def step(size: str, seconds: float, *arguments: str) -> Piece:
    command = python("bench.step", "--size", size, "--json", "{json}", "--seconds", "{seconds}", *arguments)
    return Piece(f"step-{size}", seconds, command)


def step_that_fits(size: str, seconds: float, gpu_memory: float) -> Piece:
    """The step with the least recomputation, and then the most rows, that fits Tripod by the plan.

    bench.step reports the peers that do not fit.
    """
    least = float("inf")
    for recompute, batch in product(SAVED_ACTIVATIONS, BATCHES):
        needed = total_memory(Job(SIZES[size], batch, batch, 2048, "bf16", recompute))
        if needed <= USABLE * gpu_memory:
            eager = () if size in COMPILED else ("--no-compile",)
            against = "plain,liger,hf,litgpt"  # if time runs out, the last ones are skipped
            shape = "--batch", f"{batch}", "--recompute", recompute, "--rounds", "3"
            return step(size, seconds, *shape, "--against", against, *eager)
        least = min(least, needed)
    obstacle = f"needs {least / 1e9:.0f} GB by the plan, {USABLE * gpu_memory / 1e9:.0f} can be used"
    return Piece(f"step-{size}", 0, obstacle=obstacle)


# Running them


def run_all(todo: list[Piece], out: Path, origin: dict, again: set[str]) -> dict[str, dict]:
    """Run the pieces that have no intact result of the same origin (code and machine) in `out`, and those in `again`.

    Returns a record of every piece:
    state     done, reused (the result of an earlier run), failed, or skipped
    seconds   time taken
    why       why it failed or was skipped
    sha256    of its result file
    """
    index, records = out / "all.json", {}
    try:
        stored = json.loads(index.read_text()) if index.exists() else {}
    except ValueError as error:
        raise UserError(f"{index} is damaged ({error}): remove it, then all pieces run again") from None
    progress = tqdm(todo)
    for piece in progress:
        progress.set_description(piece.name)
        result, before = out / f"{piece.name}.json", stored.get(piece.name, {})
        intact = "sha256" in before and result.exists() and digest(result) == before["sha256"]
        if piece.obstacle:
            records[piece.name] = {"state": "skipped", "why": piece.obstacle}
            continue
        if intact and before.get("origin") == origin and piece.name not in again:
            records[piece.name] = before | {"state": "reused"}
            continue
        result.unlink(missing_ok=True)
        began = time.monotonic()
        why = run_piece(piece, out)
        record = {"state": "failed", "why": why} if why else {"state": "done", "sha256": digest(result)}
        records[piece.name] = record | {"seconds": round(time.monotonic() - began, 1)}
        stored[piece.name] = records[piece.name] | {"origin": origin}
        index.write_text(json.dumps(stored, indent=1) + "\n")
    return records


def run_piece(piece: Piece, out: Path) -> str:
    """Run a piece; after its time limit kill it and all its processes. Returns the error, or an empty string."""
    result, junit, log = (out / f"{piece.name}{ending}" for ending in (".json", ".xml", ".log"))
    values = {name: str(out / f"{piece.name}{ending}") for name, ending in ENDINGS.items()}
    values["{seconds}"] = f"{piece.seconds - SPARE:g}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [values.get(word, word) for word in piece.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = process.wait(piece.seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if junit.exists():
        result.write_text(json.dumps(count_tests(junit), indent=1) + "\n")
        junit.unlink()
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    if status is None:
        return f"took longer than {piece.seconds:g} seconds: {lines[-1]}"
    if status:
        return f"exit status {status}: {lines[-1]}"
    return "" if result.exists() else f"wrote no {result.name}: {lines[-1]}"


def count_tests(junit: Path) -> dict:
    """The number of passed and skipped tests in a JUnit file, and the names of failed ones."""
    cases = list(ElementTree.parse(junit).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failed": [f"{case.get('classname')}::{case.get('name')}" for case in bad],
        "seconds": sum(float(case.get("time")) for case in cases),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_digest() -> str:
    """sha256 of all code that a measurement may depend on. Every edit changes it, committed or not."""
    folders = (ROOT / "tests", *(file.parent for file in ROOT.glob("*/__init__.py")))
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    return hashlib.sha256("".join(map(digest, sorted(set(files)))).encode()).hexdigest()


# The command line


def parse(arguments: list[str], names: list[str]) -> Namespace:
    """Parse the command line. Raises UserError if a setting cannot work."""
    parser = Parser(prog="bench.all", description=__doc__.split("\n\n")[0], epilog=f"Pieces: {', '.join(names)}")
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="results directory (default: bench/results/GPU; on a CPU runs/bench)")
    add("--only", metavar="NAMES", help="run only these pieces (default: all)")
    add("--again", default="", metavar="NAMES", help="run these pieces even if they have results")
    add("--patience", type=float, default=1, metavar="X", help="multiply all time limits by X (default: 1)")
    s = parser.parse_args(arguments)
    s.only, s.again = ([name for name in text.split(",") if name] for text in (s.only or ",".join(names), s.again))
    if unknown := set(s.only + s.again) - set(names):
        raise UserError(f"--only and --again know {', '.join(names)}, not {', '.join(sorted(unknown))}")
    if not s.patience > 0:
        raise UserError(f"--patience must be positive, not {s.patience}")
    return s


def main() -> None:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    host = machine(device)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else None
    s = parse(sys.argv[1:], [piece.name for piece in pieces(memory)])
    # Not bench/results on a CPU: its small shapes are only a test.
    default = RESULTS / re.sub(r"[^a-z0-9]+", "-", host["gpu"].lower()).strip("-") if gpu else ROOT / "runs" / "bench"
    out = (s.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [p._replace(seconds=p.seconds * s.patience) for p in pieces(memory) if p.name in s.only]
    records = run_all(todo, out, {"code": code_digest(), "machine": host}, set(s.again))
    print("\n".join(summary(records)))
    if any(record["state"] == "failed" for record in records.values()):
        raise UserError(f"some pieces failed: see {out}/NAME.log; the same command runs them again")
    print("python -m bench.report puts the speeds into README.md")


def summary(records: dict[str, dict]) -> list[str]:
    """The lines of a table of all pieces."""
    rows = [
        {"piece": name, "state": record["state"], "seconds": f"{record.get('seconds', '')}"}
        for name, record in records.items()
    ]
    lines = aligned(rows)
    whys = ["", *(record.get("why", "") for record in records.values())]
    return [f"{line}  {why}".rstrip() for line, why in zip(lines, whys)]


if __name__ == "__main__":
    run_command(main)
