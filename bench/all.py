"""All measurements of this machine, in pieces, the most valuable first: correctness, the step, the kernels, the rest.

    python -m bench.all                      run all pieces; run the command again to continue
    python -m bench.all --within 540         start no piece that would end later than this, by the plan
    python -m bench.all --again step-160m    run this piece again

Every piece is a process with a planned time, and is killed after three times as long. It writes NAME.json and NAME.log
to a directory named after the GPU. If a piece fails, the last line of its log is printed, and the other pieces still
run. A result is reused if its file is intact and code and machine are the same; all.json records them. `python -m
bench.report` then writes the tables of speeds. On a CPU every piece runs with size 14m and few tokens, and without a
GPU no test of correctness runs: that only shows that the pieces work (with TRITON_INTERPRET=1, on the kernels).
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
from math import inf
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

MAIN_SIZES = {"160m": 45, "1.4b": 50}  # measured beside all peers, eager and compiled: seconds
OTHER_SIZES = {"14m": 20, "70m": 20, "2.8b": 20, "410m": 20, "1b": 20, "6.9b": 20}  # beside plain torch
MICRO_STEPS = {"160m": 128, "1.4b": 32}  # in which a step is measured that accumulates gradients, as training does
BATCHES = (8, 4, 2, 1)  # rows of 2048 tokens: the largest that fits is measured
SPARE = 5  # seconds that bench.step needs to end, within the planned time of its piece
PATIENCE = 3  # planned times after which a piece is killed

# Placeholders in a command, and the ending of the file that replaces them. "{seconds}" becomes the plan less SPARE.
ENDINGS = {"{json}": ".json", "{plot}": ".png", "{junit}": ".xml"}


class Piece(NamedTuple):
    name: str
    seconds: float  # planned
    command: tuple[str, ...] = ()
    obstacle: str = ""  # why it cannot run on this machine


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def pieces(gpu_memory: float | None) -> list[Piece]:
    """The pieces for a GPU with gpu_memory bytes, or for a CPU (None). The times are planned for an H100."""
    workers = ("-n", "4") if find_spec("xdist") else ()  # a test takes up to 12 GB
    picture = ("--plot", "{plot}") if find_spec("matplotlib") else ()
    sizes = ",".join([*MAIN_SIZES, *OTHER_SIZES]) if gpu_memory else "14m"
    # A CPU rehearses with nano and few tokens: the interpreter needs over 15 minutes for 4 rows of 512 of size 14m.
    roofline = ("--size", ",".join(MAIN_SIZES)) if gpu_memory else ("--size", "nano", "--batch", "1", "--seq-len", "16")
    return [
        tests("correctness", 80, "gpu and not large", *workers),
        tests("correctness-large", 25, "large"),
        Piece("warm", 45, python("bench.warm", "--json", "{json}", "--size", sizes)),
        *(step(f"step-{size}", size, seconds, gpu_memory) for size, seconds in MAIN_SIZES.items()),
        *(
            step(f"step-{size}-accumulating", size, 18, gpu_memory, "plain", n, "--rounds", "1", "--no-compile")
            for size, n in MICRO_STEPS.items()
        ),
        *(kernels(op, 30 if op == "rotary_attention" else 10) for op in OPS),
        *(
            step(f"step-{size}", size, seconds, gpu_memory, "plain", 1, "--no-compile")
            for size, seconds in OTHER_SIZES.items()
        ),
        Piece("roofline", 20, python("bench.roofline", "--json", "{json}", *picture, *roofline)),
    ]


def tests(name: str, seconds: float, marked: str, *options: str) -> Piece:
    return Piece(name, seconds, python("pytest", "-m", marked, "-v", *options, "--junitxml", "{junit}"))


def kernels(op: str, seconds: float) -> Piece:
    options = "-k", op, "--benchmark-only", "--benchmark-json", "{json}", "-q"
    return Piece(f"kernels-{op}", seconds, python("pytest", "bench", *options))


def step(
    name: str,
    size: str,
    seconds: float,
    gpu_memory: float | None,
    against: str = "hf,plain,liger,litgpt",  # if time runs out, the last ones are skipped
    micro_steps: int = 1,
    *options: str,
) -> Piece:
    """The step with the least recomputation, and then the most rows, that fits Tripod by the plan.

    bench.step reports the peers that do not fit.
    """
    command = python("bench.step", "--json", "{json}", "--seconds", "{seconds}", "--against", against, *options)
    if not gpu_memory:
        small = "--size", "14m", "--batch", "1", "--seq-len", "32", "--micro-steps", f"{min(micro_steps, 2)}"
        return Piece(name, seconds, (*command, *small))
    least = float("inf")
    for recompute, batch in product(SAVED_ACTIVATIONS, BATCHES):
        needed = total_memory(Job(SIZES[size], batch * micro_steps, batch, 2048, "bf16", recompute))
        if needed <= USABLE * gpu_memory:
            shape = "--batch", f"{batch}", "--recompute", recompute, "--micro-steps", f"{micro_steps}"
            return Piece(name, seconds, (*command, "--size", size, *shape))
        least = min(least, needed)
    obstacle = f"needs {least / 1e9:.0f} GB by the plan, {USABLE * gpu_memory / 1e9:.0f} can be used"
    return Piece(name, 0, obstacle=obstacle)


# Running them


def run_all(todo: list[Piece], out: Path, origin: dict, again: set[str], within: float = inf) -> dict[str, dict]:
    """Run the pieces that have no intact result of the same origin (code and machine) in `out`, and those in `again`.
    Start none that would end later than `within` seconds from now, by the plan.

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
    progress, end = tqdm(todo), time.monotonic() + within
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
        began = time.monotonic()
        if began + piece.seconds > end:
            records[piece.name] = {"state": "skipped", "why": "no time was left: run the same command again"}
            continue
        result.unlink(missing_ok=True)
        why = run_piece(piece, out)
        record = {"state": "failed", "why": why} if why else {"state": "done", "sha256": digest(result)}
        records[piece.name] = record | {"seconds": round(time.monotonic() - began, 1)}
        stored[piece.name] = records[piece.name] | {"origin": origin}
        index.write_text(json.dumps(stored, indent=1) + "\n")
    return records


def run_piece(piece: Piece, out: Path) -> str:
    """Run a piece; after PATIENCE times its plan kill it and all its processes. Returns the error, or an empty
    string."""
    result, junit, log = (out / f"{piece.name}{ending}" for ending in (".json", ".xml", ".log"))
    values = {name: str(out / f"{piece.name}{ending}") for name, ending in ENDINGS.items()}
    values["{seconds}"], limit = f"{piece.seconds - SPARE:g}", PATIENCE * piece.seconds
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
            status = process.wait(limit)
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
        return f"took longer than {limit:g} seconds: {lines[-1]}"
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
    add("--patience", type=float, default=1, metavar="X", help="multiply all planned times by X (default: 1)")
    add("--within", type=float, default=inf, metavar="SECONDS", help="start no piece that would end later, by the plan")
    s = parser.parse_args(arguments)
    s.only, s.again = ([name for name in text.split(",") if name] for text in (s.only or ",".join(names), s.again))
    if unknown := set(s.only + s.again) - set(names):
        raise UserError(f"--only and --again know {', '.join(names)}, not {', '.join(sorted(unknown))}")
    for name in ("patience", "within"):
        if not getattr(s, name) > 0:
            raise UserError(f"--{name} must be positive, not {getattr(s, name)}")
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
    records = run_all(todo, out, {"code": code_digest(), "machine": host}, set(s.again), s.within)
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
