"""Everything there is to measure on this machine, in pieces: correctness, the step of every size, roofline, kernels.

    python -m bench.all                      the same line again goes on where it ended
    python -m bench.all --again step-160m    this piece once more

Every piece is a process with a time limit, and leaves NAME.json and NAME.log in a directory named after the GPU. One
that fails is named with the last line of its log, and the others go on. A piece is not run again as long as its file is
whole and the code and the machine are those that made it: all.json notes that. Then `python -m bench.report` puts the
speeds into docs/speed.md. On a CPU the shapes are small, to show that it works.
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
from bench.kernel_peers import OPS
from bench.report import RESULTS, ROOT, aligned
from model import SIZES
from plan import report
from runtime.errors import Parser, UserError, run_command

SIZES_OF_STEPS = ("14m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b")
COMPILED = ("160m", "1.4b")  # compiling the peers takes longer than all else
BATCHES = (8, 4, 2, 1)  # rows of 2048 tokens: the most that fits
SPARE = 10  # seconds of the time limit of a step in which bench.step starts and ends

# What a command writes, by how it is named there: the result, a picture, a report of pytest. "{seconds}" is its time.
ENDINGS = {"{json}": ".json", "{plot}": ".png", "{junit}": ".xml"}


class Piece(NamedTuple):
    name: str
    seconds: float  # time limit
    command: tuple[str, ...] = ()
    obstacle: str = ""  # why it is left out here


def python(*arguments: str) -> tuple[str, ...]:
    return sys.executable, "-m", *arguments


def pieces(gpu_memory: float | None) -> list[Piece]:
    """What there is to do on a GPU of so many bytes, or on a CPU.

    A time limit is what an H100 should never need; most of it goes into compiling, which is done once.
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
    # What takes long is to compile.
    side_by_side = ("-n", "8", "--dist", "loadgroup") if find_spec("xdist") else ()
    return [
        Piece("warm", 50, python("bench.warm", "--json", "{json}", "--size", ",".join(SIZES_OF_STEPS))),
        Piece("correctness", 210, python("pytest", "-m", "gpu", "-v", *side_by_side, "--junitxml", "{junit}")),
        *(step_that_fits(size, 60 if size in COMPILED else 32, gpu_memory) for size in SIZES_OF_STEPS),
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
    """The step of as many rows as fit, by the plan; with as little recomputation as will do. What of the peers does not
    fit then is reported by bench.step."""
    least = float("inf")
    for recompute, batch in product(report.KEPT, BATCHES):
        needed = sum(report.memory(SIZES[size], batch, 2048, "bf16", recompute).values())
        if needed <= report.USABLE * gpu_memory:
            eager = () if size in COMPILED else ("--no-compile",)
            against = "plain,liger,hf,litgpt"  # if the time is over too early, it is for the last
            shape = "--batch", f"{batch}", "--recompute", recompute, "--rounds", "3"
            return step(size, seconds, *shape, "--against", against, *eager)
        least = min(least, needed)
    lack = f"takes {least / 1e9:.0f} GB by the plan, {report.USABLE * gpu_memory / 1e9:.0f} can be used"
    return Piece(f"step-{size}", 0, obstacle=lack)


# Running them


def run_all(todo: list[Piece], out: Path, maker: dict, again: set[str]) -> dict[str, dict]:
    """Run what `out` does not already have, of the same maker (code and machine): a record of every piece.

    state     done, had (by an earlier run), failed, left out
    seconds   that it took
    why       it failed or was left out
    sha256    of its file
    """
    index, records = out / "all.json", {}
    try:
        stored = json.loads(index.read_text()) if index.exists() else {}
    except ValueError as error:
        raise UserError(f"{index} is damaged ({error}): remove it, and all pieces run again") from None
    progress = tqdm(todo)
    for piece in progress:
        progress.set_description(piece.name)
        result, before = out / f"{piece.name}.json", stored.get(piece.name, {})
        whole = "sha256" in before and result.exists() and digest(result) == before["sha256"]
        if piece.obstacle:
            records[piece.name] = {"state": "left out", "why": piece.obstacle}
            continue
        if whole and before["maker"] == maker and piece.name not in again:
            records[piece.name] = before | {"state": "had"}
            continue
        result.unlink(missing_ok=True)
        began = time.monotonic()
        why = run_piece(piece, out)
        record = {"state": "failed", "why": why} if why else {"state": "done", "sha256": digest(result)}
        records[piece.name] = record | {"seconds": round(time.monotonic() - began, 1)}
        stored[piece.name] = records[piece.name] | {"maker": maker}
        index.write_text(json.dumps(stored, indent=1) + "\n")
    return records


def run_piece(piece: Piece, out: Path) -> str:
    """Run a piece and all the processes that it starts, up to its time limit. Returns what went wrong, or nothing."""
    result, junit, log = (out / f"{piece.name}{ending}" for ending in (".json", ".xml", ".log"))
    words = {name: str(out / f"{piece.name}{ending}") for name, ending in ENDINGS.items()}
    words["{seconds}"] = f"{piece.seconds - SPARE:g}"
    with log.open("w") as file:
        process = subprocess.Popen(
            [words.get(word, word) for word in piece.command],
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
        result.write_text(json.dumps(counts(junit), indent=1) + "\n")
        junit.unlink()
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    if status is None:
        return f"took longer than {piece.seconds:g} seconds: {lines[-1]}"
    if status:
        return f"exit status {status}: {lines[-1]}"
    return "" if result.exists() else f"wrote no {result.name}: {lines[-1]}"


def counts(junit: Path) -> dict:
    """How many tests passed, were skipped and failed, these with their names, of a report of pytest."""
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
    """sha256 of all code that a measurement may depend on: it changes with every edit, whether committed or not."""
    folders = (ROOT, *(ROOT / name for name in ("kernels", "model", "bench", "tests")))
    files = sorted(path for folder in folders for path in folder.glob("*.py"))
    return hashlib.sha256("".join(map(digest, files)).encode()).hexdigest()


# The command line


def parse(arguments: list[str], names: list[str]) -> Namespace:
    """The settings of a command line. Raises UserError on one that can not work."""
    parser = Parser(prog="bench.all", description=__doc__.split("\n\n")[0], epilog=f"Pieces: {', '.join(names)}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="of results (bench/results/GPU; on a CPU runs/bench)")
    parser.add_argument("--only", metavar="NAMES", help="run these pieces (default: all)")
    parser.add_argument("--again", default="", metavar="NAMES", help="run these pieces also if their results are there")
    parser.add_argument("--patience", type=float, default=1, metavar="X", help="times all time limits (default: 1)")
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
    facts = machine(device)
    memory = torch.cuda.get_device_properties(device).total_memory if gpu else None
    s = parse(sys.argv[1:], [piece.name for piece in pieces(memory)])
    # The small shapes of a CPU are no results.
    default = RESULTS / re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") if gpu else ROOT / "runs" / "bench"
    out = (s.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    todo = [p._replace(seconds=p.seconds * s.patience) for p in pieces(memory) if p.name in s.only]
    records = run_all(todo, out, {"code": code_digest(), "machine": facts}, set(s.again))
    print("\n".join(summary(records)))
    if any(record["state"] == "failed" for record in records.values()):
        raise UserError(f"some pieces failed: the same line runs them again; see {out}/NAME.log")
    print("python -m bench.report puts the speeds into docs/speed.md")


def summary(records: dict[str, dict]) -> list[str]:
    """A line for every piece."""
    rows = [
        {"piece": name, "state": record["state"], "seconds": f"{record.get('seconds', '')}"}
        for name, record in records.items()
    ]
    lines = aligned(rows)
    whys = ["", *(record.get("why", "") for record in records.values())]
    return [f"{line}  {why}".rstrip() for line, why in zip(lines, whys)]


if __name__ == "__main__":
    run_command(main)
