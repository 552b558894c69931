"""A rank that hangs or dies is named in one line, a slow one is waited for. No model: a step is one small exchange."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.ranks import Dist
from runtime.watchdog import Beat, Watchdog

ROOT = Path(__file__).parents[1]

# In step 5 something happens on rank 1, which tells its process id, and after a restart on rank 0. Others find out.
SCRIPT = """
import faulthandler, os, signal, sys, time
faulthandler.dump_traceback_later(60, exit=True)
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
from runtime.errors import UserError, run_command
from runtime.ranks import Dist
from runtime.watchdog import Watchdog

what, timeout = sys.argv[2], float(sys.argv[3])

def happen(dog, step):
    if what == "slow":  # twice as slow as others have patience
        for _ in range(8):
            time.sleep(timeout / 4)
            dog.heartbeat(step, "reading rows")
    if what == "sleep":
        time.sleep(1000)
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "mistake":
        raise UserError("rows.bin is damaged")
    if what == "bug":
        raise RuntimeError("shapes do not match")

def main():
    signal.signal(signal.SIGTERM, lambda *_: None)  # as train.py, which finishes its step
    store = next(dist.rendezvous("env://"))[0]  # which torchrun keeps when it restarts us
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store = dist.PrefixStore(str(restarts), store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    ranks = Dist(rank, world, store=store)
    try:
        with Watchdog(ranks, timeout) as dog:
            for step in range(8):
                dog.heartbeat(step, "reading rows")
                if step == 5 and ranks.rank == 1 - restarts:
                    time.sleep(timeout / 4)  # until a beat has told of it
                    os.write(1, f"process {os.getpid()}\\n".encode())
                    happen(dog, step)
                dog.heartbeat(step, "exchanging gradients")
                ranks.all_reduce(torch.ones(10))
            os.write(1, b"finished\\n")
    finally:
        dist.destroy_process_group()

run_command(main)
"""


@pytest.fixture
def launch(tmp_path):
    """launch(world, what, timeout) -> the lines of all ranks, the process id told last, exit status.

    event(line, torchrun, process id) is called for every line.
    """
    (tmp_path / "loop.py").write_text(SCRIPT)

    def start(world: int, what: str, timeout: float, *flags: str, event=lambda *_: None) -> tuple[list[str], int, int]:
        line = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world, *flags]
        line = [*map(str, line), str(tmp_path / "loop.py"), str(ROOT), what, str(timeout)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        lines, pid = [], 0
        for said in torchrun.stdout:
            lines.append(said.strip())
            if match := re.fullmatch(r"process (\d+)", lines[-1]):
                pid = int(match[1])
            event(lines[-1], torchrun, pid)
        return lines, pid, torchrun.wait()

    return start


def errors(lines: list[str]) -> list[str]:
    """What the ranks have said, tracebacks included; not torchrun's own report, which has one too."""
    return [line for line in lines if line.startswith("error: ") or re.match(r"\[rank\d+\]", line)]


def end_stopped(line: str, torchrun: subprocess.Popen, pid: int) -> None:
    """Do as torchrun does to a stopped process half a minute later."""
    if line.startswith("error: "):
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_rank_is_named(launch):
    lines, pid, status = launch(3, "stop", 4, event=end_stopped)
    assert status == 1
    (error,) = errors(lines)
    assert re.fullmatch(
        rf"error: rank 1 \(\S+:{pid}\) hangs: no sign of life since step 5, reading rows; the others have waited for "
        r"[4-9] s; the same line resumes from the newest checkpoint",
        error,
    )


@pytest.mark.parametrize(("world", "restarts"), [(3, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(world, restarts, launch):
    """After a restart, too: what the first processes told each other means nothing to the next."""
    pids = []
    lines, _, status = launch(world, "kill", 4, f"--max-restarts={restarts}", event=lambda *args: pids.append(args[-1]))
    assert status == 1
    assert len(errors(lines)) == 1 + restarts
    pids = list(dict.fromkeys(filter(None, pids)))
    for rank, (error, pid) in zip((1, 0), zip(errors(lines), pids, strict=True)):
        assert re.fullmatch(
            rf"error: rank \d \(\S+:\d+\) lost contact with rank {rank} \(\S+:{pid}\) in step 5, exchanging gradients: "
            r"killed, or cut off \(.+\); the same line resumes from the newest checkpoint",
            error,
        )


@pytest.mark.slow
def test_a_rank_that_is_behind_is_named(launch):
    lines, pid, status = launch(3, "sleep", 4)
    assert status == 1
    (error,) = errors(lines)
    assert re.match(rf"error: rank 1 \(\S+:{pid}\) hangs in step 5, reading rows; the others have waited", error)


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(launch):
    lines, _, status = launch(2, "slow", 3)
    assert (errors(lines), lines.count("finished"), status) == ([], 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "last"), [("mistake", "error: rows.bin is damaged"), ("bug", "[rank1]: Runtime")])
def test_a_rank_that_fails_speaks_for_itself(what, last, launch):
    lines, _, status = launch(2, what, 4)
    assert status == 1
    assert errors(lines)[-1].startswith(last)
    assert not any(line.startswith("[rank0]") or "lost contact" in line for line in lines)


@pytest.mark.slow
def test_a_store_that_does_not_answer(launch):
    """torchrun itself is stopped, and killed when that was noticed."""

    def event(line: str, torchrun: subprocess.Popen, pid: int) -> None:
        if line.startswith("process"):
            torchrun.send_signal(signal.SIGSTOP)
        if line.startswith("error"):
            torchrun.kill()

    lines, _, _ = launch(2, "sleep", 4, event=event)
    assert len(errors(lines)) == 2
    for error in errors(lines):
        assert re.match(r"error: rank [01] \(\S+\) has waited for \d s in step 5, .+ and the store at \S+:\d+,", error)
        assert "does not answer" in error


@pytest.fixture
def judge():
    """judge(*(state, idle, silent, place of the loop, place of the saving thread) of each rank) -> what hangs"""

    def judge(*ranks: tuple) -> str | None:
        dog = Watchdog(Dist(world_size=len(ranks)), timeout=10)  # seconds, and beats
        dog.names = [f"host:{r}" for r in range(len(ranks))]
        dog.mine.idle, dog.mine.progress = 11, [LOOP, NONE]
        for r, (state, idle, silent, *places) in enumerate(ranks):
            dog.beats[r] = Beat(0, state, idle, places)
            dog.numbers[r].looks = silent
        return dog._judge()

    return judge


LOOP, SAVER, NONE = [5, 2, "updating"], [4, 0, "writing"], [-1, 0, ""]


def test_a_saving_thread_that_is_behind_is_named(judge):
    waits = ["runs", 10, 0, LOOP, [4, 1, "waiting"]]
    assert judge(waits, ["runs", 10, 0, LOOP, SAVER], waits).startswith("rank 1 (host:1) hangs in step 4, writing;")


def test_nobody_is_behind(judge):
    expected = "all ranks have waited for 11 s in step 5, updating: the network between them hangs, or a GPU"
    assert judge(*[["runs", 10, 0, LOOP, NONE]] * 3) == expected


def test_several_are_behind(judge):
    stopped = ["runs", 2, 5, [4, 0, "reading"], NONE]
    assert judge(stopped, ["runs", 10, 0, LOOP, NONE], stopped).startswith(
        "rank 0 (host:0), rank 2 (host:2) hang: no sign of life since step 4, reading; the others have waited"
    )


@pytest.mark.parametrize("other", [("runs", 3, 0, LOOP, NONE), ("runs", 0, 0, NONE, NONE)])
def test_who_moves_or_has_not_begun_is_waited_for(other, judge):
    assert judge(other, ["runs", 10, 0, LOOP, NONE], ["runs", 2, 5, LOOP, NONE]) is None


def test_who_is_done_is_not_missed(judge):
    assert judge(["is done", 1, 9, LOOP, NONE], ["runs", 10, 0, LOOP, NONE]).startswith(
        "rank 1 (host:1) hangs in step 5"
    )
