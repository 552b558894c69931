"""One process at a time uses a run directory, until it ends, however it ends. run.json is recovered."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from runtime.errors import UserError
from runtime.run_directory import (
    check_same_run,
    lock,
    read_run,
    record_start,
    recover_run_file,
    refuse_other_directory,
)

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


# The directory is moved away while it is locked


@pytest.mark.parametrize("then", ["nothing", "another directory", "a copy", "a file", "a link to another"])
def test_a_directory_that_was_moved_or_replaced(then, tmp_path):
    run, moved = tmp_path / "run", tmp_path / "moved"
    with lock(run) as check:
        check()
        run.rename(moved)
        if then == "another directory":
            run.mkdir()
            (run / ".lock").touch()
        elif then == "a copy":
            shutil.copytree(moved, run)
        elif then == "a file":
            run.write_text("precious")
        elif then == "a link to another":
            (tmp_path / "other").mkdir()
            run.symlink_to(tmp_path / "other")
        with pytest.raises(UserError) as error:
            check()
        assert str(error.value) == f"{run} was moved or replaced while the run used it; nothing was written there"
        if then == "nothing":
            moved.rename(run)
            check()


# run.json

RECORD = {"settings": {"size": "14m", "seed": 1234}, "data": {"order_sha256": "abc"}}


def there(run: Path) -> dict:
    return RECORD


def nowhere(run: Path) -> None:
    return None


@pytest.fixture
def recorded(tmp_path) -> Path:
    """A run directory with a run.json."""
    record_start(tmp_path, RECORD, 0, {})
    return tmp_path


DAMAGE = [b"", b"\0" * 300, b'{"settings": {', b"[]", b"{}", b"3", b"\xff\xfe", b"[" * 100_000, b"null"]
DAMAGE += [b'{"settings": {}, "data": {}, "starts": 5}', b'{"settings": {}, "data": {}, "starts": [{"step": "1"}]}']


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_file_is_made_anew_from_a_checkpoint(damage, recorded, capsys):
    path = recorded / "run.json"
    for n in ("", "2"):  # it happens twice: nothing is lost
        path.write_bytes(damage)
        recover_run_file(recorded, there)
        assert read_run(recorded) == {**RECORD, "starts": []}
        assert (recorded / f"run.json.damaged{n}").read_bytes() == damage
        said = f"{path} is damaged (it is now run.json.damaged{n}): it is written again from the newest checkpoint"
        assert said in capsys.readouterr().out
    assert {p.name for p in recorded.iterdir()} == {"run.json", "run.json.damaged", "run.json.damaged2"}


@pytest.mark.parametrize("damage", DAMAGE, ids=range(len(DAMAGE)))
def test_a_damaged_file_without_checkpoints(damage, recorded):
    """Or with checkpoints whose copies are of no use."""
    path = recorded / "run.json"
    path.write_bytes(damage)
    for useless in (None, {}, {"settings": {}}, {"settings": [], "data": {}}):
        recover_run_file(recorded, lambda run, useless=useless: useless)
    for use in (
        lambda: check_same_run(recorded, {}, lambda data: []),
        lambda: record_start(recorded, {}, 1, {}),
    ):
        with pytest.raises(UserError, match=r"run\.json is damaged \(.*\): choose another --out"):
            use()
    assert path.read_bytes() == damage


def test_a_fifo_in_place_of_the_file(recorded):
    (recorded / "run.json").unlink()
    os.mkfifo(recorded / "run.json")
    with pytest.raises(UserError, match=r"run\.json is damaged \(.*not a regular file.*\): choose another --out"):
        check_same_run(recorded, {}, lambda data: [])


def test_a_missing_file(recorded, capsys):
    """It is recovered in a run directory; in another directory nothing is written."""
    (recorded / "run.json").unlink()
    (recorded / "step4").mkdir()
    for foreign in (nowhere, lambda run: {}, lambda run: {"settings": 1, "data": {}}):
        with pytest.raises(UserError, match="exists and is not a run directory: choose another --out"):
            refuse_other_directory(recorded, foreign)
    recover_run_file(recorded, nowhere)
    assert [p.name for p in recorded.iterdir()] == ["step4"]
    refuse_other_directory(recorded, there)
    recover_run_file(recorded, there)
    assert read_run(recorded) == {**RECORD, "starts": []}
    assert "run.json is missing: it is written again" in capsys.readouterr().out


def test_a_whole_file_is_left_alone(recorded):
    before = contents(recorded)
    recover_run_file(recorded, lambda run: {"settings": {}, "data": {}})
    check_same_run(recorded, RECORD["settings"], lambda data: [] if data == RECORD["data"] else ["the data"])
    assert contents(recorded) == before


def test_every_difference_is_listed(recorded):
    with pytest.raises(UserError) as error:
        check_same_run(recorded, {"size": "14m", "seed": 5, "lr": 0.1}, lambda data: ["the first", "the second"])
    assert str(error.value) == (
        f"{recorded} is a run with other settings: --seed (1234 there, 5 here), --lr (None there, 0.1 here), "
        "the first, the second; choose another --out"
    )
    with pytest.raises(UserError, match=r"run\.json is damaged \(KeyError"):
        check_same_run(recorded, {}, lambda data: [data["nothing"]])


def test_a_setting_that_is_newer_than_the_run_was_off(recorded):
    check_same_run(recorded, {"document_mask": False}, lambda data: [])
    with pytest.raises(UserError, match=r"--document-mask \(None there, True here\)"):
        check_same_run(recorded, {"document_mask": True}, lambda data: [])


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_disk_that_cannot_be_written(number, recorded, monkeypatch):
    """Each write is one line that names the file, and the file is as it was."""
    before = contents(recorded)

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    expected = rf"run\.json cannot be written \({os.strerror(number)}\): make it writable or make room"
    with pytest.raises(UserError, match=expected):
        record_start(recorded, RECORD, 4, {})
    assert contents(recorded) == before
    assert json.loads((recorded / "run.json").read_text())["starts"][0]["step"] == 0
