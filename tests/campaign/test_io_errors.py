"""200 file operations that fail: with EIO, ENOSPC, EDQUOT or EROFS, once or from then on.

failing_io.c makes the n-th open, write, fsync, rename, mkdir, unlink, read or pread of a path in the run directory or
beside the data fail. The trainer ends with status 1 and one line that names a file, or goes on if it can do without.
No reported checkpoint is lost, and the same command then ends with the bits of a run that was never disturbed.
"""

import errno
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from conftest import records
from harness import Server, Trainer, error_line, folder_in_memory, play, scaled
from test_faults import assert_whole, checkpoints

CASES = 200
STEPS, HALF = 6, 3
FLAGS = ["--size", "14m", "--steps", STEPS, "--batch-size", 4, "--seq-len", 32, "--lr", 1e-2]
FULL = [errno.EIO, errno.ENOSPC, errno.EDQUOT]
ERRORS = {
    "open": [errno.EIO],
    "create": [*FULL, errno.EROFS],
    "write": FULL,
    "fsync": FULL,
    "rename": [*FULL, errno.EROFS],
    "mkdir": [*FULL, errno.EROFS],
    "unlink": [errno.EIO, errno.EROFS],
    "read": [errno.EIO],
    "pread": [errno.EIO],
}
ALL_ERRORS = ERRORS
MAY_GO_ON = ("open", "read", "pread", "mkdir", "unlink")  # an older checkpoint, a directory that is there, a leftover

ARM = """
import ctypes
shim = ctypes.CDLL({shim!r})
shim.arm({kind!r}.encode(), {n}, {error}, {lasting}, {run!r}.encode(), {data!r}.encode(), {log!r}.encode())
"""

# What else can happen to files under a running trainer, before it reads the rows of the n-th step.
AT_BATCH = """
read, calls = data.batch, iter(range(1, 1000))
def read_after_trouble(*args):
    if next(calls) == {n}:
        {trouble}
        open({log!r}, "w").write({kind!r} + " " + {path!r})
    return read(*args)
data.batch = read_after_trouble
"""
TROUBLE = {
    "shrink": "os.truncate({path!r}, int(os.path.getsize({path!r}) / {divisor}))",  # the data file, under its mapping
    "move": "os.rename({path!r}, {path!r} + '-moved'); os.mkdir({path!r})",  # the run directory
}


class Campaign:
    """Trainers whose file operations fail, each in a folder of its own."""

    def __init__(self, server: Server, shim: Path, corpus: Path, folder: Path, fault: str = ""):
        self.server, self.shim, self.folder, self.fault = server, shim, folder, fault
        (folder / "fresh/data").mkdir(parents=True)
        for file in corpus.parent.glob(f"{corpus.name}.*"):
            if file.is_file():
                shutil.copy(file, folder / "fresh/data")
        self.name = corpus.name
        # Two beginnings: nothing is there, or a killed process has left half of a run.
        self.calls = {"fresh": self.count("fresh")}
        half = folder / "half"
        shutil.copytree(folder / "undisturbed", half)
        for step in range(HALF + 1, STEPS + 1):
            shutil.rmtree(half / f"run/step{step}")
        (half / "run/.step9.tmp/state").mkdir(parents=True)  # left by a killed process
        (half / "run/.step9.tmp/config.json").write_text("{")
        self.calls["half"] = self.count("half")

    def start(self, folder: Path, fault: str = "", keep: int = STEPS + 1) -> Trainer:
        logs = folder / f"log{len([*folder.glob('log*')])}"
        logs.mkdir()
        flags = [*FLAGS, "--data", folder / "data" / self.name, "--out", folder / "run", "--keep-state", keep]
        return Trainer(self.server, flags, folder / "run", logs, fault)

    def arm(self, folder: Path, kind: str = "", n: int = 0, error: int = 0, lasting: int = 0) -> str:
        paths = {"run": str(folder / "run"), "data": str(folder / "data"), "log": str(folder / "calls")}
        return ARM.format(shim=str(self.shim), kind=kind, n=n, error=error, lasting=lasting, **paths)

    def count(self, beginning: str) -> Counter:
        """How many calls of each kind an undisturbed run makes. The first time, its files are kept."""
        folder = Path(shutil.copytree(self.folder / beginning, self.folder / "counted"))
        trainer = self.start(folder, self.arm(folder))
        assert trainer.end() == 0, trainer.output
        calls = Counter(line.split()[0] for line in (folder / "calls").read_text().splitlines())
        if beginning == "fresh":
            folder.rename(self.folder / "undisturbed")
        else:
            shutil.rmtree(folder)
        return calls

    def case(self, seed: int, number: int) -> tuple[str, str]:
        """One failing call. Returns its outcome."""
        rng = random.Random(f"{seed} {number}")
        folder = self.folder / f"case{number}"
        while True:  # until a call has failed: the number of calls is not always the same
            beginning = rng.choice([*self.calls])
            what, fault = self.choose(folder, self.calls[beginning], rng)
            shutil.copytree(self.folder / beginning, folder, ignore=shutil.ignore_patterns("log*", "calls"))
            trainer = self.start(folder, fault + self.fault)
            status = self.end(trainer)
            if status is None or ((folder / "calls").exists() and (folder / "calls").read_text()):
                break
            shutil.rmtree(folder)
        kind, _, path = (folder / "calls").read_text().partition("\n")[0].partition(" ")
        if (moved := folder / "run-moved").exists():
            shutil.rmtree(folder / "run")
            moved.rename(folder / "run")
        found, why = self.judge(trainer, status, kind, path)
        shutil.copytree(self.folder / "fresh/data", folder / "data", dirs_exist_ok=True)
        if found in ("refused", "harmless"):
            again = self.start(folder)
            if self.end(again) != 0 or not self.is_same(folder):
                found, why = "lost", f"{why}; the same command then: {again.output[-300:]}"
        shutil.rmtree(folder)
        return found, f"case {number}, {beginning}, {what}: {path.removeprefix(str(self.folder))}: {why}"

    def choose(self, folder: Path, calls: Counter, rng: random.Random) -> tuple[str, str]:
        """What is to fail, and the code that makes it fail."""
        kind = rng.choice(sorted(calls.keys() & ERRORS) + [*TROUBLE] * (ERRORS is ALL_ERRORS))
        if kind in TROUBLE:
            path = folder / "run" if kind == "move" else folder / "data" / f"{self.name}.bin"
            trouble = TROUBLE[kind].format(path=str(path), divisor=rng.choice([1.01, 2, 10**9]))
            n = rng.randint(1, HALF)
            fault = AT_BATCH.format(n=n, trouble=trouble, kind=kind, path=str(path), log=str(folder / "calls"))
            return f"{kind} {n}", fault
        n, error, lasting = rng.randint(1, calls[kind]), rng.choice(ERRORS[kind]), int(rng.random() < 0.3)
        fault = self.arm(folder, kind, n, error, lasting)
        return f"{kind} {n} {errno.errorcode[error]}{' lasting' * lasting}", fault

    def end(self, trainer: Trainer) -> int | None:
        """The exit status; None if the process hangs."""
        try:
            return trainer.process.wait(60)
        except subprocess.TimeoutExpired:
            trainer.process.kill()
            return None

    def judge(self, trainer: Trainer, status: int | None, kind: str, path: str) -> tuple[str, str]:
        output, expected = trainer.output, self.folder / "undisturbed/run"
        if status is None:
            return "hangs", output[-300:]
        if "Traceback" in output or status not in (0, 1):
            return "tracebacks", f"status {status}: {output[-500:]!r}"
        reported = {int(step) for step in re.findall(r"saved \S+/step(\d+)\n", output)}
        try:
            assert_whole(trainer.run, expected)
        except (AssertionError, OSError, LookupError, ValueError) as error:
            return "wrong", f"a checkpoint has other bytes: {str(error)[:200]!r}"
        if missing := reported - {*checkpoints(trainer.run)}:
            return "lost", f"steps {missing}"
        if status == 0:
            unnoticed = kind not in MAY_GO_ON and ".order-" not in path
            return ("wrong", "nobody noticed") if unnoticed else ("harmless", "")
        line = error_line(output)
        if line is None or not re.search(r"/\w|\w+\.\w+", line):
            return "wrong", f"not one line that names a file: {output[-500:]!r}"
        return "refused", line

    def is_same(self, folder: Path) -> bool:
        """Whether the run has finished with the bits of the undisturbed run."""
        run, expected = folder / "run", self.folder / "undisturbed/run"
        try:
            assert_whole(run, expected)
        except (AssertionError, OSError):
            return False
        return checkpoints(run) == [*range(STEPS + 1)] and records(run) == records(expected)


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    source, library = Path(__file__).with_name("failing_io.c"), tmp_path_factory.mktemp("shim") / "failing_io.so"
    if not (compiler := shutil.which("gcc") or shutil.which("cc")):
        pytest.skip("needs a C compiler")
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def server(shim) -> Iterator[Server]:
    server = Server(LD_PRELOAD=str(shim))
    yield server
    server.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with folder_in_memory() as folder:
        yield folder


@pytest.mark.parametrize("cases", [6, pytest.param(scaled(CASES), marks=pytest.mark.slow)])
def test_io_errors(cases, server, shim, corpus, folder):
    play("I/O errors", partial(Campaign(server, shim, corpus, folder).case, 1), cases).check()


# The harness finds what it is meant to find.


def test_all_kinds_of_calls_are_seen(server, shim, corpus, folder):
    campaign = Campaign(server, shim, corpus, folder)
    seen = campaign.calls["fresh"] + campaign.calls["half"]
    assert {"open", "create", "write", "fsync", "rename", "mkdir", "unlink", "read"} <= seen.keys()


IGNORED = """
sync = os.fsync
def ignore(descriptor):
    try:
        sync(descriptor)
    except OSError:
        pass
os.fsync = ignore
"""
NOT_CAUGHT = """
def run_command(main):
    main()
"""


@pytest.mark.parametrize(("fault", "outcome"), [(IGNORED, "wrong"), (NOT_CAUGHT, "tracebacks")], ids=["fsync", "all"])
def test_a_trainer_that_ignores_errors_is_caught(fault, outcome, server, shim, corpus, folder, monkeypatch):
    monkeypatch.setattr("test_io_errors.ERRORS", {"fsync": FULL})
    tally = play("broken", partial(Campaign(server, shim, corpus, folder, fault).case, 1), 4)
    assert tally.counts[outcome] > 0
