"""What the parts of the campaign share: how many cases, what came out of them, and trainers that start quickly.

TRIPOD_CAMPAIGN=0.05 runs a twentieth of the cases. TRIPOD_CAMPAIGN_TABLE=docs/reliability.md writes the figures of
every part that ends into the table of that page.
"""

import atexit
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import test_faults
import torch

FRACTION = float(os.environ.get("TRIPOD_CAMPAIGN", 1))
ROOT = Path(__file__).parents[2]
GOOD, BAD = ("refused", "harmless"), ("wrong", "lost", "tracebacks", "hangs")


def scaled(cases: int) -> int:
    return max(round(cases * FRACTION), 1)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A temporary folder, in memory where that exists: on a disk, many small files take several times as long."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


class Tally:
    """Counts outcomes. A bad one is kept with a line that says how to see it again."""

    def __init__(self, part: str):
        self.part, self.counts, self.failures, self.began = part, Counter(), [], time.monotonic()

    def add(self, outcome: str, case: str = "") -> None:
        assert outcome in GOOD + BAD
        self.counts[outcome] += 1
        if outcome in BAD:
            self.failures.append(f"{outcome}: {case}")

    def report(self) -> str:
        """One row of the table in docs/reliability.md. It is printed, and written there on request."""
        machine = f"{os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__.split('+')[0]}"
        figures = [self.counts.total(), *(self.counts[outcome] for outcome in GOOD + BAD)]
        cells = [self.part, *(f"{n:,}" for n in figures), f"{time.monotonic() - self.began:.0f}", machine]
        row = f"| {' | '.join(cells)} |"
        print(row)
        if table := os.environ.get("TRIPOD_CAMPAIGN_TABLE"):
            before = rf"\| {re.escape(self.part)} \| [\d,]+ \|"  # a row of an earlier campaign
            lines = [line for line in Path(table).read_text().splitlines() if not re.match(before, line)]
            end = next(i for i, line in enumerate(lines) if line.startswith("| part | cases |"))
            while lines[end].startswith("|"):
                end += 1
            Path(table).write_text("\n".join([*lines[:end], row, *lines[end:]]) + "\n")
        return row

    def check(self) -> None:
        """Report, and fail if there was a bad outcome."""
        self.report()
        assert not self.failures, "\n".join([f"{len(self.failures)} failures", *self.failures[:40]])


def play(part: str, case: Callable[[int], tuple[str, str]], cases: int) -> Tally:
    """The outcomes of case(0), case(1), ..., two at a time."""
    tally = Tally(part)
    with ThreadPoolExecutor(2) as threads:
        for found, why in threads.map(case, range(cases)):
            tally.add(found, why)
    return tally


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, kind: str) -> None:
    """Put something else in the place of a file: "nothing", "directory", "fifo", "itself" (a link), "1 TB" of zeros, or
    a link to a path such as /dev/zero."""
    remove(path)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "1 TB":
        path.touch()
        os.truncate(path, 10**12)
    elif kind != "nothing":
        path.symlink_to(path if kind == "itself" else kind)


def error_line(output: str) -> str | None:
    """The line of a refusal if it is as it must be: printable, short, and the only one that begins with "error: "."""
    errors = re.findall(r"^error: (.*)", output, re.MULTILINE)
    good = len(errors) == 1 and errors[0].isprintable() and len(errors[0]) < 2000 and "Traceback" not in output
    return errors[0] if good else None


class Process:
    """A forked process, or one for each rank, with the methods of subprocess.Popen that test_faults.Trainer uses."""

    def __init__(self, server: "Server", pids: list[int]):
        self.server, self.pids, self.statuses = server, pids, {}

    def poll(self) -> int | None:
        for pid in self.pids:
            if pid not in self.statuses and not test_faults.is_alive(pid):
                self.statuses[pid] = self.server.ask({"wait": pid})
        done = len(self.statuses) == len(self.pids)
        return next(filter(None, self.statuses.values()), 0) if done else None  # the first that is not 0

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float) -> int:
        give_up = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > give_up:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            time.sleep(0.003)
        return status

    def send_signal(self, number: int, pids: list[int] | None = None) -> None:
        for pid in self.pids if pids is None else pids:
            if pid not in self.statuses:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The other end of server.py. Several threads may use it."""

    def __init__(self, **environment: str):
        command = [sys.executable, str(Path(__file__).with_name("server.py"))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
        environment["CUDA_VISIBLE_DEVICES"] = ""
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)
        self.started, self.lock, ready = [], threading.Lock(), self.process.stdout.readline()
        assert ready == "ready\n", ready

    def ask(self, request: dict) -> int:
        with self.lock:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            return int(self.process.stdout.readline())

    def start(self, script: str, arguments: list, log: Path, ranks: int = 1) -> Process:
        """Run a script in a new process, or in one for each rank; all print into one file."""
        argv, pids = ["script.py", *map(str, arguments)], []
        environment = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        with socket.create_server(("127.0.0.1", 0)) as free:
            environment["MASTER_PORT"] = str(free.getsockname()[1])
        for rank in range(ranks):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            pids.append(self.ask({"script": script, "argv": argv, "log": str(log), "environment": own}))
        self.started.append(Process(self, pids))
        return self.started[-1]

    def close(self) -> None:
        for process in self.started:  # those of a test that failed may still run
            if process.poll() is None:
                process.kill()
        self.process.stdin.close()
        self.process.wait(60)


@cache
def shared_server() -> Server:
    """One server for all parts of the campaign."""
    server = Server()
    atexit.register(server.close)
    return server


class Trainer(test_faults.Trainer):
    """The trainer of test_faults, forked by a server."""

    hangs = False

    def __init__(self, server: Server, arguments: list, run: Path, logs: Path, fault: str = "", ranks: int = 1):
        self.run, self.logs = run, logs
        script = test_faults.SCRIPT.replace("FAULT", fault)
        self.process = server.start(script, [ROOT, *arguments], logs / "std.log", ranks)


def kill(trainer: Trainer, saving: bool, rng: random.Random, victims: list[int] | None = None) -> bool:
    """Kill a trainer at a random moment, with `saving` while it writes a checkpoint. Returns False if it ended before.

    `victims` are the process ids to kill (default: all ranks). The other ranks notice it, or are told to end after some
    seconds, as torchrun does. trainer.hangs tells whether that did not help.
    """
    if saving:
        trainer.until(f"{test_faults.START}|is finished")
    time.sleep(rng.uniform(0, 1.5 if saving else 3))
    while trainer.process.poll() is None:
        trainer.process.send_signal(signal.SIGSTOP)  # so that nothing changes while we look
        if not saving or any(trainer.run.glob(".step*.tmp")):
            trainer.process.send_signal(signal.SIGKILL, victims)
            trainer.process.send_signal(signal.SIGCONT)
            for number, patience in ((signal.SIGTERM, 20), (signal.SIGKILL, 60)):
                with suppress(subprocess.TimeoutExpired):
                    return trainer.process.wait(patience) != 0
                trainer.hangs = number == signal.SIGKILL
                trainer.process.send_signal(number)
            return trainer.end() != 0
        trainer.process.send_signal(signal.SIGCONT)
        time.sleep(rng.uniform(0, 0.05))
    return False
