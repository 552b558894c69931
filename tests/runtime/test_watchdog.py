"""One line names a rank that hangs or dies; a slow rank is waited for. No model: a step is one small all_reduce."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.ranks import Dist
from runtime.watchdog import NOT_STARTED, Beat, Watchdog

ROOT = Path(__file__).parents[2]

# In step 5 rank 1 (after a restart: rank 0) prints its process id, and something happens to it.
SCRIPT = """
import faulthandler, os, signal, sys, time
faulthandler.dump_traceback_later(60, exit=True)
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as torch_dist
from runtime.errors import UserError, run_command
from runtime.ranks import Dist
from runtime.watchdog import Watchdog

what, timeout = sys.argv[2], float(sys.argv[3])

def happen(watchdog, step):
    if what == "slow":  # for twice the timeout
        for _ in range(8):
            time.sleep(timeout / 4)
            watchdog.heartbeat(step, "reading rows")
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
    signal.signal(signal.SIGTERM, lambda *_: None)  # train.py finishes its step, too
    store = next(torch_dist.rendezvous("env://"))[0]  # torchrun keeps this store when it restarts the ranks
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    store = torch_dist.PrefixStore(str(restarts), store)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch_dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    dist = Dist(rank, world, store=store)
    try:
        with Watchdog(dist, timeout) as watchdog:
            for step in range(8):
                watchdog.heartbeat(step, "reading rows")
                if step == 5 and dist.rank == 1 - restarts:
                    time.sleep(timeout / 4)  # until a beat with this step is posted
                    os.write(1, f"process {os.getpid()}\\n".encode())
                    happen(watchdog, step)
                watchdog.heartbeat(step, "exchanging gradients")
                dist.all_reduce(torch.ones(10))
            os.write(1, b"finished\\n")
    finally:
        torch_dist.destroy_process_group()

run_command(main)
"""


@pytest.fixture
def launch(tmp_path):
    """launch(world, what, timeout) -> (lines printed by all ranks, the last process id printed, exit status).

    event(line, torchrun, process id) is called for every line.
    """
    (tmp_path / "loop.py").write_text(SCRIPT)

    def start(world: int, what: str, timeout: float, *flags: str, event=lambda *_: None) -> tuple[list[str], int, int]:
        command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world, *flags]
        command = [*map(str, command), str(tmp_path / "loop.py"), str(ROOT), what, str(timeout)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        torchrun = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        lines, pid = [], 0
        for line in torchrun.stdout:
            lines.append(line.strip())
            if match := re.fullmatch(r"process (\d+)", lines[-1]):
                pid = int(match[1])
            event(lines[-1], torchrun, pid)
        return lines, pid, torchrun.wait()

    return start


def errors(lines: list[str]) -> list[str]:
    """The error lines of the ranks, tracebacks included; not those of torchrun's own report."""
    return [line for line in lines if line.startswith("error: ") or re.match(r"\[rank\d+\]", line)]


def end_stopped(line: str, torchrun: subprocess.Popen, pid: int) -> None:
    """Kill the stopped process as soon as it is named. torchrun does so after half a minute."""
    if line.startswith("error: "):
        os.kill(pid, signal.SIGKILL)


def test_a_stopped_rank_is_named(launch):
    lines, pid, status = launch(3, "stop", 4, event=end_stopped)
    assert status == 1
    (error,) = errors(lines)
    assert re.fullmatch(
        rf"error: rank 1 \(\S+:{pid}\) hangs: no sign of life since step 5, reading rows; the others have waited for "
        r"[4-9] s; the same command resumes from the newest checkpoint",
        error,
    )


@pytest.mark.parametrize(("world", "restarts"), [(3, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(world, restarts, launch):
    """Also after a restart: beats of the first processes must not confuse the next ones."""
    pids = []
    lines, _, status = launch(world, "kill", 4, f"--max-restarts={restarts}", event=lambda *args: pids.append(args[-1]))
    assert status == 1
    assert len(errors(lines)) == 1 + restarts
    pids = list(dict.fromkeys(filter(None, pids)))
    for rank, (error, pid) in zip((1, 0), zip(errors(lines), pids, strict=True)):
        assert re.fullmatch(
            rf"error: rank \d \(\S+:\d+\) lost contact with rank {rank} \(\S+:{pid}\) in step 5, exchanging gradients: "
            r"killed, or cut off \(.+\); the same command resumes from the newest checkpoint",
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
def test_a_run_that_was_suspended_as_a_whole_goes_on(launch):
    """All processes stop for longer than the timeout: beats do not count this time."""

    def event(line: str, torchrun: subprocess.Popen, pid: int) -> None:
        if line.startswith("process"):
            children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
            assert str(pid) in children
            for number, pause in ((signal.SIGSTOP, 6), (signal.SIGCONT, 0)):
                for process in (torchrun.pid, *map(int, children)):
                    os.kill(process, number)
                time.sleep(pause)

    lines, _, status = launch(2, "nothing", 4, event=event)
    assert (errors(lines), lines.count("finished"), status) == ([], 2, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "last"), [("mistake", "error: rows.bin is damaged"), ("bug", "[rank1]: Runtime")])
def test_a_failing_rank_reports_its_own_error(what, last, launch):
    lines, _, status = launch(2, what, 4)
    assert status == 1
    assert errors(lines)[-1].startswith(last)
    assert not any(line.startswith("[rank0]") or "lost contact" in line for line in lines)


@pytest.mark.slow
def test_a_store_that_does_not_answer(launch):
    """torchrun itself is stopped, and killed after both ranks noticed it."""

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
def verdict():
    """verdict(*ranks) -> the message. A rank is (running, stalled, silence, loop, saving thread)."""

    def verdict(*ranks: tuple) -> str | None:
        watchdog = Watchdog(Dist(world_size=len(ranks)), timeout=10)  # seconds, and beats
        watchdog.names = [f"rank {r} (host:{r})" for r in range(len(ranks))]
        watchdog.waited, watchdog.mine.places = "waited for 11 s", [LOOP[1], NONE[1]]
        for r, (running, stalled, silence, *threads) in enumerate(ranks):
            watchdog.beats[r] = Beat(0, stalled, running, *zip(*threads))
            watchdog.silence[r] = silence
        return watchdog._verdict()

    return verdict


LOOP, SAVER, NONE = ([5, 2], "step 5, updating"), ([4, 0], "step 4, writing"), (NOT_STARTED, "its start")
WAITS = (True, 10, 0, LOOP, NONE)


def test_a_saving_thread_that_is_behind_is_named(verdict):
    waits = (True, 10, 0, LOOP, ([4, 1], "step 4, waiting"))
    assert verdict(waits, (True, 10, 0, LOOP, SAVER), waits).startswith("rank 1 (host:1) hangs in step 4, writing;")


def test_no_rank_is_behind(verdict):
    expected = "all ranks have waited for 11 s in step 5, updating: the network between them hangs, or a GPU"
    assert verdict(WAITS, WAITS, WAITS) == expected


def test_several_ranks_are_stopped(verdict):
    stopped = (True, 2, 5, ([4, 0], "step 4, reading"), NONE)
    assert verdict(stopped, WAITS, stopped).startswith(
        "rank 0 (host:0), rank 2 (host:2) hang: no sign of life since step 4, reading; the others have waited"
    )


@pytest.mark.parametrize("other", [(True, 3, 0, LOOP, NONE), (True, 0, 0, NONE, NONE)])
def test_a_rank_that_moves_or_has_not_started_is_waited_for(other, verdict):
    assert verdict(other, WAITS, (True, 2, 5, LOOP, NONE)) is None


def test_a_rank_that_is_done_is_not_called_silent(verdict):
    assert verdict((False, 1, 9, LOOP, NONE), WAITS).startswith("rank 1 (host:1) hangs in step 5")
