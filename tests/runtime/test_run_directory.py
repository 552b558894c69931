"""One process at a time uses a run directory, until it ends, however it ends."""

import errno
import fcntl
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.run_directory import lock

ROOT = Path(__file__).parents[2]

HOLD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from runtime.run_directory import lock
with lock(Path(sys.argv[2])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path) -> Iterator[Callable[[], subprocess.Popen]]:
    """hold() -> another process, which has the lock of tmp_path / "run"."""
    started = []

    def start() -> subprocess.Popen:
        line = [sys.executable, "-c", HOLD, ROOT, tmp_path / "run"]
        process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in directory.iterdir()}


def refused(run: Path) -> str:
    with pytest.raises(UserError) as error:
        with lock(run):
            pass
    return str(error.value)


def test_another_process_is_named(hold, tmp_path):
    holder, run = hold(), tmp_path / "run"
    (run / "step1").write_text("precious")
    (tmp_path / "link").symlink_to(run)
    before = contents(run)
    for name in ("run", "link"):  # of one directory
        assert re.fullmatch(
            rf"{tmp_path / name} is in use by process {holder.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\S+: "
            r"wait for it, stop it, or choose another --out",
            refused(tmp_path / name),
        )
    assert contents(run) == before
    with lock(tmp_path / "other"):
        pass


@pytest.mark.parametrize("end", ["kill", "return"])
def test_free_when_its_holder_ends(end, hold, tmp_path):
    holder, run = hold(), tmp_path / "run"
    os.kill(holder.pid, signal.SIGSTOP)
    refused(run)  # stopped is not ended
    os.kill(holder.pid, signal.SIGCONT)
    if end == "kill":
        holder.kill()
    holder.communicate()
    with lock(run):
        assert f"process {os.getpid()} on" in (run / ".lock").read_text()
    assert (run / ".lock").read_text() == ""


def test_free_after_an_error(tmp_path):
    with suppress(ZeroDivisionError), lock(tmp_path):
        refused(tmp_path)  # within one process, too
        1 / 0  # noqa: B018
    with lock(tmp_path):
        pass


def test_a_forked_child_does_not_keep_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    there, asked = fork.Event(), fork.Event()

    def wait():
        there.set()
        asked.wait()

    with lock(tmp_path):
        child = fork.Process(target=wait, daemon=True)
        child.start()
        assert there.wait(60)  # it closes its copy before anything else
        refused(tmp_path)  # the child has closed its copy, not unlocked the file
    with lock(tmp_path):  # the child is still there
        pass
    asked.set()
    child.join()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "file")
    for path in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "run", Path("/proc/run")):
        assert re.fullmatch(r"\S+ cannot be written \([\w ]+\): choose another --out", refused(path))
    assert (tmp_path / "file").read_text() == "precious"


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def flock(file, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock(tmp_path):
        assert capsys.readouterr().err.startswith(f"warning: the file system of {tmp_path} has no locks")
