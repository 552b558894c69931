"""2,000 damaged runs. Each is refused in one line, or the run resumes and ends with the bits of an undisturbed run.

A case damages one of the two newest checkpoints, both, or the run's own files, and then does what users do: verify,
load the model, generate text, and start the same command again. Nothing that was damaged may be accepted; nothing may
hang, take more than 2 GB, print a traceback, or change a checkpoint when it refuses. Forged checkpoints have a manifest
that fits their hostile content. They may be accepted if that does no harm.
"""

import hashlib
import json
import random
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from conftest import records
from harness import ROOT, error_line, folder_in_memory, play, replace, scaled, shared_server

CASES = 2000
REPLACEMENTS = ["nothing", "directory", "fifo", "/dev/zero", "/proc/self/mem", "/proc/kmsg", "itself", "1 TB"]
STEPS = 3
FLAGS = ["--size", "14m", "--steps", STEPS, "--batch-size", 2, "--seq-len", 16, "--lr", 1e-2, "--keep-state", STEPS + 1]

SCRIPT = """
import contextlib, hashlib, io, json, os, resource, sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import checkpoints.manifest, checkpoints.resume, generate, model.huggingface, train
from checkpoints.save import Saver
from model import SIZES
from runtime.errors import UserError, run_command

SIZES["14m"] = replace(SIZES["14m"], layers=1, hidden=16, heads=2, vocab=384)
train.is_published_step = lambda step, last: True
FAULT
step, command = Path(sys.argv.pop(1)), sys.argv
memory = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (memory + 2**31, resource.RLIM_INFINITY))

def load():
    weights = model.huggingface.load(step).state_dict()
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in weights.values())).hexdigest()

def text():
    sys.argv = ["generate.py", "--checkpoint", str(step), "--prompt", "ab", "--tokens", "2", "--temperature", "0"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        generate.main()
    return printed.getvalue()

def verify():
    return checkpoints.manifest.verify_checkpoint(step)

for action in (verify, load, text) if step.name else ():
    try:
        print(json.dumps([action.__name__, action()]), flush=True)
    except UserError as error:
        print(json.dumps([action.__name__, {"refused": str(error)}]), flush=True)
sys.argv = command
run_command(train.main)
"""


# Damage

HOSTILE = [None, True, -1, 0.5, 10**400, 2**63, 1e308, float("inf"), float("nan"), "", "x", "\x1b[2J\x07", "\ud800"]
HOSTILE += ["../../x", "/etc/passwd", "x" * 10**5, [], [1], {}, {"a": {}}, [[[[[[[[]]]]]]]]]
TEXTS = [
    "",
    "\0" * 4096,
    "[" * 100_000,
    "[]",
    "7",
    "null",
    '{"step": ' + "1" * 5000,
    "\xff",
    "{}",
    "NaN",
    '"' + "x" * 10**6,
]


def flip(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def zero(raw: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + bytes(len(raw[at : at + 4096])) + raw[at + 4096 :]


def resize(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice([raw[: rng.randrange(len(raw))], raw[:8], raw + rng.randbytes(9), raw + bytes(4096), raw + raw])


def edit_json(value: object, rng: random.Random) -> object:
    """Change, drop or rename one entry of a JSON object, at any depth."""
    while True:
        keys = sorted(value) if isinstance(value, dict) else [*range(len(value))]
        key = rng.choice(keys)
        inner = value[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.2:
            break
        value = inner
    if isinstance(value, dict) and rng.random() < 0.2:
        lost = value.pop(key)
        if rng.random() < 0.5:
            value[f"{key}\x1b[31m"] = lost
    else:
        value[key] = rng.choice(HOSTILE)


def edit(raw: bytes, rng: random.Random) -> bytes:
    """Change one entry of a JSON file or of the header of a safetensors file."""
    with suppress(ValueError):
        value = json.loads(raw)
        edit_json(value, rng)
        return json.dumps(value, indent=1).encode()
    length = int.from_bytes(raw[:8], "little")
    value = json.loads(raw[8 : 8 + length])
    edit_json(value, rng)
    header = json.dumps(value).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + raw[8 + length :]


def poison(raw: bytes, rng: random.Random) -> bytes:
    """Values that no model has, in a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    at = 8 + length + 4 * rng.randrange((len(raw) - 8 - length) // 4)
    return raw[:at] + rng.choice([b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"]) + raw[at + 4 :]


def nonsense(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice(TEXTS).encode("latin-1")


def contents(directory: Path) -> dict[str, object]:
    """Every file below a directory, by its path there: its bytes, or its kind if it cannot be read."""
    found = {}
    for path in directory.rglob("*"):
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode) and facts.st_size < 10**9:
            found[str(path.relative_to(directory))] = path.read_bytes()
        elif not path.is_dir() or path.is_symlink():
            found[str(path.relative_to(directory))] = (stat.S_IFMT(facts.st_mode), facts.st_size)
    return found


def names(step: Path) -> list[str]:
    """The files of a checkpoint that its manifest lists."""
    return sorted(contents(step).keys() - {"manifest.json"})


def damage_file(run: Path, step: Path, rng: random.Random) -> str:
    """Damage one file of a checkpoint, which then does not fit its manifest."""
    name = rng.choice([*names(step), "manifest.json"])
    path = step / name
    kinds = [flip, flip, zero, resize, nonsense, edit]
    change = rng.choice([*kinds, poison] if name.endswith(".safetensors") else kinds)
    path.write_bytes(change(path.read_bytes(), rng))
    return f"{change.__name__} {name}"


def replace_file(run: Path, step: Path, rng: random.Random) -> str:
    name = rng.choice([*names(step), "manifest.json", "state", ""])
    replace(step / name, rng.choice(REPLACEMENTS))
    return f"replace {name or step.name}"


def swap_files(run: Path, step: Path, rng: random.Random) -> str:
    """Exchange two files of a checkpoint, or one with the same file of the other checkpoint; or add a file."""
    first, second = (step / name for name in rng.sample(names(step), 2))
    kind = rng.choice(["swap", "other", "add"])
    if kind == "other":
        first = step / rng.choice([*names(step), "manifest.json"])
        second = next(path for path in run.glob("step*") if path != step) / first.relative_to(step)
    elif kind == "add":
        second = step / rng.choice(
            ["state/part-00002-of-00002.safetensors", "model-00001-of-00002.safetensors", "state/x"]
        )
        second.write_bytes(first.read_bytes())
        return f"add {second.name}"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b)
    second.write_bytes(a)
    return f"{kind} {first.name} {second.name}"


def entry_of(raw: bytes, is_safetensors: bool, old: dict) -> dict:
    """What a manifest says of a file. Of a file whose header is not valid it says what a forger can."""
    if not is_safetensors:
        return {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = dict(old["tensors"])
    with suppress(ValueError, TypeError, LookupError, AttributeError):
        header = json.loads(raw[8:start])
        places = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: hashlib.sha256(raw[start + a : start + b]).hexdigest() for name, (a, b) in places.items()}
    return {"bytes": len(raw), "header_sha256": hashlib.sha256(raw[:start]).hexdigest(), "tensors": tensors}


def forge(run: Path, step: Path, rng: random.Random) -> str:
    """Hostile content with a manifest that fits it."""
    manifest = json.loads((step / "manifest.json").read_text())
    kind = "the manifest"
    if rng.random() < 0.3:
        edit_json(manifest, rng)
    else:
        path = step / rng.choice(names(step))
        is_safetensors, name = path.suffix == ".safetensors", str(path.relative_to(step))
        change = rng.choice([edit, edit, poison] if is_safetensors else [edit, edit, nonsense])
        raw = change(path.read_bytes(), rng)
        path.write_bytes(raw)
        manifest["files"][name] = entry_of(raw, is_safetensors, manifest["files"][name])
        kind = f"{name} by {change.__name__}"
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    manifest = {**content, "sha256": hashlib.sha256(json.dumps(content).encode()).hexdigest()}
    (step / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return f"forge {kind}"


def damage_metrics(run: Path, step: Path, rng: random.Random) -> str:
    """Records that are missing, double, in another order, or no records."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kind = rng.choice(["drop", "double", "reorder", "cut", "empty", "zeros", "utf-8", "step", "nonsense", "replace"])
    i = rng.randrange(2)  # a record that is needed
    if kind in ("drop", "double"):
        lines[i : i + 1] = [lines[i]] * (2 if kind == "double" else 0)
    elif kind == "reorder":
        lines[:2] = lines[1::-1]
    elif kind == "step":
        record = json.loads(lines[i]) | {"step": rng.choice([v for v in HOSTILE if v != "\ud800"])}
        lines[i] = json.dumps(record) + "\n"
    path.write_text("".join(lines))
    raw = path.read_bytes()
    if kind == "replace":
        replace(path, rng.choice(REPLACEMENTS))
    elif kind in ("cut", "empty", "zeros", "utf-8", "nonsense"):
        at = rng.randrange(raw.index(b"\n", raw.index(b"\n") + 1))
        changed = {
            "cut": raw[:at],
            "empty": b"",
            "zeros": raw[:at] + bytes(999),
            "utf-8": raw[:at] + b"\xff" + raw[at:],
        }
        path.write_bytes(changed.get(kind, nonsense(raw, rng)))
    return f"metrics.jsonl: {kind}"


def damage_run_json(run: Path, step: Path, rng: random.Random) -> str:
    path = run / rng.choice(["run.json", "run.json", ".lock"])
    change = rng.choice([flip, zero, resize, nonsense, edit, replace])
    if change is replace or not path.read_bytes():
        replace(path, rng.choice(REPLACEMENTS))
    else:
        path.write_bytes(change(path.read_bytes(), rng) if path.name != ".lock" else b"\xff\0\x1b[2J")
    return f"{path.name}: {change.__name__}"


KINDS = {damage_file: 40, replace_file: 14, swap_files: 10, forge: 22, damage_metrics: 7, damage_run_json: 7}


# Cases


class Campaign:
    """Copies of a run that are damaged and started again."""

    def __init__(self, corpus: Path, folder: Path, fault: str = ""):
        self.corpus, self.folder, self.script = corpus, folder, SCRIPT.replace("FAULT", fault)
        status, output = self.start(folder / "undisturbed", "")
        assert status == 0, output
        run = Path(shutil.copytree(folder / "undisturbed", folder / "run"))
        for step in (0, STEPS):
            shutil.rmtree(run / f"step{step}")
        (run / ".lock").write_bytes(b"process 1 on a machine\n")
        self.answers = {}
        for step in (1, 2):
            copy = shutil.copytree(run, folder / f"copy{step}")
            status, output = self.start(copy, copy / f"step{step}")
            assert status == 0, output
            self.answers[step] = self.read_answers(output)
            assert self.answers[step]["verify"] == []

    def start(self, run: Path, step: Path | str) -> tuple[int | None, str]:
        """Do what users do, in a new process. Returns its exit status, None if it hangs, and what it has printed."""
        log = run.with_name(f"{run.name}.log")
        flags = [ROOT, step, *FLAGS, "--data", self.corpus, "--out", run]
        process = shared_server().start(self.script, flags, log)
        try:
            return process.wait(40), log.read_text(errors="replace")
        except subprocess.TimeoutExpired:
            process.kill()
            return None, log.read_text(errors="replace")

    def read_answers(self, output: str) -> dict:
        return dict(json.loads(line) for line in output.splitlines() if line.startswith('["'))

    def case(self, seed: int, number: int) -> tuple[str, str]:
        rng, run = random.Random(f"{seed} {number}"), self.folder / f"case{number}"
        shutil.copytree(self.folder / "run", run)
        damage = rng.choices([*KINDS], [*KINDS.values()])[0]
        steps = rng.choice([[2], [2], [2], [1], [2, 1]]) if damage in (damage_file, replace_file, forge) else [2]
        what = [damage(run, run / f"step{step}", rng) for step in steps]
        before = {step: contents(run / f"step{step}") for step in (1, 2)}
        status, output = self.start(run, run / f"step{steps[0]}")
        try:
            forged = " ".join(what) if damage is forge else ""
            found, why = self.judge(run, steps[0], forged, before, status, output)
        except Exception as error:
            found, why = "wrong", f"the harness does not understand this: {error!r} {output[-300:]}"
        shutil.rmtree(run)
        run.with_name(f"{run.name}.log").unlink()
        return found, f"case {number}, step {steps}, {what}: {why}"

    def judge(
        self, run: Path, step: int, forged: str, before: dict, status: int | None, output: str
    ) -> tuple[str, str]:
        if status is None:
            return "hangs", repr(output[-300:])
        if "MemoryError" in output or "bad_alloc" in output:
            return "hangs", f"takes all memory: {output[-300:]!r}"
        if "Traceback" in output or status not in (0, 1):
            return "tracebacks", f"status {status}: {output[-500:]!r}"
        if problem := self.judge_answers(run, step, forged, before, self.read_answers(output)):
            return "wrong", problem
        if status == 1:
            if not error_line(output):
                return "wrong", f"not one line: {output[-500:]!r}"
            for n in (1, 2):  # a damaged one may have been replaced, if the run went back and trained on
                whole = before[n] == contents(self.folder / f"run/step{n}")
                if (whole or "saved" not in output) and before[n] != contents(run / f"step{n}"):
                    return "lost", f"it refuses, but step {n} has changed"
            return "refused", ""
        resumed = int(re.search(r"step (\d+) to", output)[1])
        ours, theirs = (contents(folder / f"step{STEPS}") for folder in (run, self.folder / "undisturbed"))
        for files in (ours, theirs):
            del files["manifest.json"]  # it also has settings from run.json, which the case may have changed
        same = ours == theirs
        if not forged and resumed and before[resumed] != contents(self.folder / f"run/step{resumed}"):
            return "wrong", f"resumed from the damaged step {resumed}"
        if forged and "poison" in forged and "state/" in forged:
            return "harmless", ""  # other weights or moments: a checkpoint of another training, and no damage
        # If metrics.jsonl is missing, as after a user moved it away, the run says so and writes the later records.
        first = resumed if "metrics.jsonl is missing: the records of steps" in output else 0
        if not same or records(run) != records(self.folder / "undisturbed")[first:]:
            return "wrong", f"resumed from step {resumed} and ended with {'other records' if same else 'other bits'}"
        return "harmless", ""

    def judge_answers(self, run: Path, step: int, forged: str, before: dict, answers: dict) -> str:
        """What is wrong with the answers of verify, load and generate; "" if nothing is."""
        original = contents(self.folder / f"run/step{step}")
        changed = before[step] != original
        for line in [*answers["verify"], *(a["refused"] for a in answers.values() if isinstance(a, dict))]:
            if not line.isprintable() or f"step{step}" not in line or len(line) > 2000:
                return f"not one line that names a file: {line[:300]!r}"
        if not forged and bool(answers["verify"]) != changed:
            return f"verify says {answers['verify']}"
        for action in ("load", "text"):
            if isinstance(answers[action], dict) or forged:
                continue
            if answers[action] != self.answers[step][action]:
                return f"{action} accepts it"
        return ""


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


@pytest.mark.parametrize("cases", [20, pytest.param(scaled(CASES), marks=pytest.mark.slow)])
def test_damaged_runs(cases, corpus, folder):
    play("checkpoints", partial(Campaign(corpus, folder).case, 1), cases).check()


# The harness finds what it is meant to find.


def test_a_trainer_that_does_not_verify_is_caught(corpus, folder):
    fault = "checkpoints.manifest.verify_checkpoint = checkpoints.resume.verify_checkpoint = lambda *_: []"
    tally = play("broken", partial(Campaign(corpus, folder, fault).case, 2), 12)
    assert tally.counts["wrong"] + tally.counts["tracebacks"] > 2
