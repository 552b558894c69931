"""Real faults of the real trainer: its processes are killed, stopped, or told to end; a disk is full; a loss is NaN.

After every fault, the checkpoints are byte for byte equal to those of a run without faults, one line says what went
wrong, and the same command continues the run to the same final bytes.
"""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import records

ROOT = Path(__file__).parents[1]
STEPS = 20
START = rf"step (\d+) to {STEPS} of {STEPS}, each"

# train.py with a small Pythia, as a script. FAULT makes something go wrong. The script prints whatever is unpickled.
SCRIPT = """
import os, pickle, resource, sys, threading, time, traceback
from dataclasses import replace
import torch.distributed.distributed_c10d as c10d
sys.path.insert(0, sys.argv.pop(1))
import data, train
from checkpoints.save import Saver
from runtime.errors import run_command
from model import SIZES

SIZES["14m"] = replace(SIZES["14m"], layers=2, hidden=32, vocab=384)
train.is_published_step = lambda step, last: True
rank = int(os.environ.get("RANK", 0))

def say(line):
    os.write(1, f"{line}\\n".encode())

def print_unpickled(event, args):
    if event == "pickle.find_class":
        say(f"unpickled {args} in {traceback.format_stack(limit=20)}")

FAULT

say(f"rank {rank} is process {os.getpid()}")
sys.addaudithook(print_unpickled)
c10d._pickler = c10d._unpickler = None  # makes torch's collectives of objects fail
run_command(train.main)
pickle.loads(pickle.dumps(os.getpid))  # proves that unpickling is printed
"""

# Every file operation of the saving thread is slow, so that most of the time a checkpoint is incomplete.
SLOW_DISK = """
def wait(event, args):
    if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and threading.current_thread().daemon:
        time.sleep(0.003)
sys.addaudithook(wait)
"""

SLOW_STEPS = """
read = data.batch
def read_slowly(*args):
    time.sleep(0.1)
    return read(*args)
data.batch = read_slowly
"""


def is_alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


class Trainer:
    """A trainer, alone or under torchrun. Each of its processes prints into its own file."""

    def __init__(self, command: list, run: Path, logs: Path):
        self.run, self.logs = run, logs
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # there may be only one GPU
        with (logs / "stdout.log").open("w") as out, (logs / "stderr.log").open("w") as err:
            self.process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=err, env=environment)

    @property
    def output(self) -> str:
        """What the ranks have printed, without torchrun."""
        ranks = sorted(self.logs.glob("*/attempt_0/*/std*.log")) or sorted(self.logs.glob("std*.log"))
        return "".join(log.read_text() for log in ranks)

    def until(self, pattern: str) -> re.Match:
        """Wait until the ranks have printed a pattern. Returns the match."""
        give_up = time.monotonic() + 120
        while not (found := re.search(pattern, self.output)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < give_up, self.output
            time.sleep(0.01)
        return found

    def pid(self, rank: int) -> int:
        return int(self.until(rf"rank {rank} is process (\d+)\n")[1])

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are alive."""
        return [pid for pid in map(int, re.findall(r"is process (\d+)\n", self.output)) if is_alive(pid)]

    def end(self) -> int:
        """Wait until the process and its ranks have ended: ranks can outlive torchrun. Returns the exit status."""
        status, give_up = self.process.wait(120), time.monotonic() + 120
        while self.ranks():
            assert time.monotonic() < give_up, self.output
            time.sleep(0.05)
        return status

    def kill(self) -> None:
        """Kill the process and its ranks if they still run."""
        if self.process.poll() is None:
            for pid in [self.process.pid, *self.ranks()]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.end()

    def errors(self) -> list[str]:
        """The error lines. There must be no traceback."""
        assert "Traceback" not in self.output, self.output
        return re.findall(r"^error: .*", self.output, re.MULTILINE)


Launch = Callable[..., Trainer]


@pytest.fixture(scope="module")
def launch(corpus, tmp_path_factory) -> Iterator[Launch]:
    """launch("out", *flags, world=1, fault="", torchrun=[]) starts a Trainer: four rows of 32 tokens a step."""
    trainers = []

    def start(out: str, *flags, world: int = 1, fault: str = "", torchrun: list = ()) -> Trainer:
        logs, run = tmp_path_factory.mktemp("logs"), tmp_path_factory.getbasetemp() / "faults" / out
        (logs / "script.py").write_text(SCRIPT.replace("FAULT", fault))
        command = [sys.executable, "-u"]
        if world > 1:
            command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world]
            command += ["--log-dir", logs, "--redirects", 3, *torchrun]
        command += [logs / "script.py", ROOT, "--size", "14m", "--data", corpus, "--out", run, "--steps", STEPS]
        command += ["--batch-size", 4, "--seq-len", 32, "--lr", 1e-2, "--keep-state", STEPS + 1, *flags]
        trainers.append(Trainer(command, run, logs))
        return trainers[-1]

    yield start
    for trainer in trainers:
        trainer.kill()


@pytest.fixture(scope="module")
def undisturbed(launch) -> Callable[[int], Path]:
    """undisturbed(world) -> the directory of a run without faults. All of its checkpoints have state."""
    runs = {}

    def train(world: int) -> Path:
        if world not in runs:
            trainer = launch(f"undisturbed-{world}", world=world)
            assert trainer.end() == 0, trainer.output
            assert_nothing_unpickled(trainer)
            runs[world] = trainer.run
        return runs[world]

    return train


def checkpoints(run: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step")) for path in run.glob("step*"))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_whole(run: Path, undisturbed: Path) -> None:
    """Every checkpoint equals the one of the run without faults. Its state may have been dropped."""
    for step in checkpoints(run):
        ours, theirs = contents(run / f"step{step}"), contents(undisturbed / f"step{step}")
        listed = set(json.loads(ours["manifest.json"])["files"])
        missing = theirs.keys() - listed - {"manifest.json"}
        assert missing in (set(), {name for name in theirs if name.startswith("state/")}), step
        assert {name: theirs.get(name) for name in listed}.items() <= ours.items(), step


def assert_same(trainer: Trainer, undisturbed: Path) -> None:
    """The trainer has finished, and its run equals the run without faults."""
    assert trainer.end() == 0, trainer.output
    assert_nothing_unpickled(trainer)
    assert_whole(trainer.run, undisturbed)
    assert checkpoints(trainer.run) == list(range(STEPS + 1))
    assert {path.name for path in trainer.run.iterdir()} == {path.name for path in undisturbed.iterdir()}
    assert records(trainer.run) == records(undisturbed)
    assert [record["step"] for record in records(trainer.run)] == list(range(STEPS))


def assert_nothing_unpickled(trainer: Trainer) -> None:
    """A finished run has unpickled nothing. Only at its end every rank unpickles os.getpid."""
    ranks = len(re.findall("is process", trainer.output))
    assert re.findall(r"unpickled \((.*)\) in ", trainer.output) == ["'posix', 'getpid'"] * ranks, trainer.output


# Killed (at random moments: campaign/test_kills.py)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_killed_at_any_call_of_a_start(resumed, launch, undisturbed):
    """Killed before each call of the main thread that changes the run directory."""
    for n in itertools.count(1):
        fault = f"""
out, calls = sys.argv[sys.argv.index("--out") + 1], iter(range(1, 1000))
def die(event, args):
    changes = event in ("os.mkdir", "os.rename") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
    if changes and str(args[0]).startswith(out) and threading.current_thread() is threading.main_thread():
        if next(calls) == {n}:
            os.kill(os.getpid(), 9)
sys.addaudithook(die)
"""
        out = f"start-{n}-{resumed}"
        if resumed:  # from step 1; metrics.jsonl has records of later steps
            run = shutil.copytree(undisturbed(1), undisturbed(1).with_name(out))
            for step in range(2, STEPS + 1):
                shutil.rmtree(run / f"step{step}")
        trainer = launch(out, fault=fault)
        if trainer.end() == 0:
            assert n > 5
            break
        assert trainer.process.returncode == -signal.SIGKILL, trainer.output
        assert_same(launch(out), undisturbed(1))


# Many ranks


def test_torchrun_is_killed(launch, undisturbed):
    """The ranks save and end; then the same command continues the run."""
    trainer = launch("orphans", world=2, fault=SLOW_STEPS)
    trainer.until(r"saved \S+/step4\n")
    trainer.process.kill()
    trainer.end()
    assert trainer.errors() == []
    paused = int(re.search(rf"paused at step (\d+) of {STEPS}", trainer.output)[1])
    assert checkpoints(trainer.run)[-1] == paused
    trainer = launch("orphans", world=2)
    assert_same(trainer, undisturbed(2))
    assert int(re.search(START, trainer.output)[1]) == paused


@pytest.mark.slow
def test_killed_while_ranks_save(launch, undisturbed):
    """One rank, all ranks, or torchrun, and combinations of them, are killed at random moments."""
    rng, expected = random.Random(2), undisturbed(2)
    for victims in ([0], [1], [0, 1], ["torchrun"], ["torchrun", 0], ["torchrun", 0, 1]):
        trainer = launch("saving", world=2, fault=SLOW_DISK)
        before = checkpoints(trainer.run)
        assert int(trainer.until(START)[1]) == max(before, default=0)
        time.sleep(rng.uniform(0, 0.5))
        while not any(trainer.run.glob(".step*.tmp")):
            assert trainer.process.poll() is None, trainer.output
        pids = {"torchrun": trainer.process.pid, 0: trainer.pid(0), 1: trainer.pid(1)}
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        assert trainer.end() != 0
        errors = trainer.errors()
        assert len(errors) == (victims in ([0], [1], ["torchrun", 0])), trainer.output
        if errors and "torchrun" not in victims:
            assert re.search(rf"lost contact with rank {victims[0]} \(\S+:{pids[victims[0]]}\)", errors[0])
        assert_whole(trainer.run, expected)
    assert_same(launch("saving", world=2), expected)


# Faults of one rank


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_loss_of_one_rank_is_not_finite(rank, launch, undisturbed):
    """All ranks stop at the same step before the update, and one of them reports it."""
    fault = f"""
forward, calls = train.Pythia.forward, iter(range(1000))
def broken(*args):
    loss, losses = forward(*args)
    return (loss * float("nan") if next(calls) == 3 and rank == {rank} else loss), losses
train.Pythia.forward = broken
"""
    trainer = launch(f"nan-{rank}", world=2, fault=fault)
    assert trainer.end() == 1
    (error,) = trainer.errors()
    assert "step 3, rows 12 to 15: loss nan" in error
    assert f"the weights after 3 steps (checkpoint {trainer.run}/step3) are bad, or these rows are; with " in error
    assert error.endswith(f"with {trainer.run}/step2 the loss was finite")
    assert checkpoints(trainer.run) == [0, 1, 2, 3]
    assert_whole(trainer.run, undisturbed(2))
    assert [record["step"] for record in records(trainer.run)] == [0, 1, 2]


AT_STEP_4 = """
save = Saver.save
def save_with_trouble(self, step, counters):
    if step == 4 and rank == 1:
        self.wait()
        TROUBLE
    save(self, step, counters)
Saver.save = save_with_trouble
"""


def test_the_disk_of_one_rank_is_full(launch, undisturbed):
    trouble = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))"
    trainer = launch("full", world=2, fault=AT_STEP_4.replace("TROUBLE", trouble))
    assert trainer.end() == 1
    (error,) = trainer.errors()
    assert "step4 could not be saved, earlier checkpoints are whole: rank 1: File too large" in error
    assert checkpoints(trainer.run) == [0, 1, 2, 3]
    assert not list(trainer.run.glob(".step*"))
    assert_whole(trainer.run, undisturbed(2))


def test_the_records_cannot_be_written(launch, undisturbed):
    """metrics.jsonl, which one rank writes, is on a full disk: all ranks end, and one of them reports it."""
    fault = """
from runtime.metrics import Metrics
record = Metrics.record
def on_a_full_disk(self, **values):
    if values["step"] == 5:
        old, self.file = self.file, open("/dev/full", "ab")
        self.file.fileno = old.fileno  # what was written before can still be flushed
    record(self, **values)
Metrics.record = on_a_full_disk
"""
    trainer = launch("records", world=2, fault=fault)
    assert trainer.end() == 1
    (error,) = trainer.errors()
    assert f"{trainer.run}/metrics.jsonl cannot be written (No space left on device)" in error
    assert checkpoints(trainer.run)[-1] in (4, 5)  # step 5 may still be on its way to the disk, and is given up
    assert_whole(trainer.run, undisturbed(2))
    assert_same(launch("records", world=2), undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_a_file_system_that_is_gone_for_a_while(world, launch, undisturbed):
    """As when a file server is down."""
    trouble = "os.rename(out, out + '-gone')"
    fault = f"out = sys.argv[sys.argv.index('--out') + 1]\n{AT_STEP_4}"
    fault = fault.replace("rank == 1", f"rank == {world - 1}").replace("TROUBLE", trouble)
    trainer = launch(f"gone-{world}", world=world, fault=fault)
    assert trainer.end() == 1
    (error,) = trainer.errors()
    assert f"{trainer.run} was moved or replaced while the run used it; nothing was written there" in error
    trainer.run.with_name(f"gone-{world}-gone").rename(trainer.run)
    assert_whole(trainer.run, undisturbed(world))
    trainer = launch(f"gone-{world}", world=world)
    assert_same(trainer, undisturbed(world))
    assert int(re.search(START, trainer.output)[1]) == 3


# Two runs, one directory


def test_two_runs_in_one_directory(launch, undisturbed):
    """The second run is refused. The first run is not disturbed."""
    first = launch("shared", fault=SLOW_STEPS)
    first.until(r"saved \S+/step4\n")
    first.process.send_signal(signal.SIGSTOP)  # so that it does not end before the second starts
    second = launch("shared")
    assert second.end() == 1
    first.process.send_signal(signal.SIGCONT)
    (error,) = second.errors()
    assert re.match(rf"error: \S+shared is in use by process {first.process.pid} on ", error)
    assert_same(first, undisturbed(1))


# Told to end, or stopped


@pytest.mark.slow
def test_a_save_that_takes_longer_than_torchrun_waits(launch, undisturbed):
    """torchrun kills ranks after 30 seconds, but not with a longer --shutdown-timeout."""
    fault = """
from checkpoints import save as saving
handle, flush = train.StopSignal.handle, saving.flush
def handle_and_slow_down(*args):
    global delay
    delay = 40
    handle(*args)
def flush_slowly(path):
    global delay
    time.sleep(delay)
    delay = 0
    flush(path)
delay = 0
train.StopSignal.handle, saving.flush = handle_and_slow_down, flush_slowly
"""
    trainer = launch("patient", world=2, fault=fault + SLOW_STEPS, torchrun=["--shutdown-timeout", 90])
    trainer.until(r"saved \S+/step4\n")
    trainer.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    trainer.end()
    assert time.monotonic() - began > 35  # otherwise nothing was tested
    assert trainer.errors() == []
    assert checkpoints(trainer.run)[-1] == int(re.search(f"paused at step (\\d+) of {STEPS}", trainer.output)[1])
    assert_same(launch("patient", world=2), undisturbed(2))


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_stopped(rank, launch, undisturbed):
    trainer = launch(f"stopped-{rank}", "--timeout", 5, world=2, fault=SLOW_STEPS)
    trainer.until(r"saved \S+/step4\n")
    os.kill(trainer.pid(rank), signal.SIGSTOP)
    pattern = rf"error: rank {rank} \(\S+:{trainer.pid(rank)}\) hangs: no sign of life since step \d+, "
    trainer.until(pattern)
    os.kill(trainer.pid(rank), signal.SIGKILL)  # torchrun does so after half a minute
    assert trainer.end() == 1
    assert len(trainer.errors()) == 1
    assert_whole(trainer.run, undisturbed(2))
    assert_same(launch(f"stopped-{rank}", world=2), undisturbed(2))
