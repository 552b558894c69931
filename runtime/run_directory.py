"""The run directory: who uses it, which run it holds, and when that run was started.

run.json            settings and data of the run, of which every checkpoint has a copy, and one entry for every start
run.json.damaged    what a power cut or a failing disk left of run.json, which was then written again from such a copy
.lock               locked as long as a process uses the directory
"""

import errno
import fcntl
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_write, read_small

MAX_BYTES = 2**26  # of run.json: a start has about 500 bytes
DAMAGE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # what reading a damaged run.json raises
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network file systems


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """An OSError in the block, of a disk that is full, read-only or failing, becomes a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): make it writable or make room, then run the same "
            f"command again; checkpoints are as they were"
        ) from None


def refuse_other_directory(run: Path, recovered: Callable[[Path], dict | None]) -> None:
    """Raise UserError if `run` exists and is not a run directory. Nothing is written into such a directory.

    A directory without run.json is one if `recovered` finds settings and data in its checkpoints.
    """
    try:
        if not run.exists() or os.path.lexists(run / "run.json"):
            return
        # A start that was killed leaves these.
        empty = run.is_dir() and all(p.name == ".lock" or p.match(".run.json*.tmp") for p in run.iterdir())
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): choose another --out") from None
    if not empty and not _is_run(recovered(run) or {}):
        raise UserError(f"{run} exists and is not a run directory: choose another --out")


@contextmanager
def lock(run: Path) -> Iterator[Callable[[], None]]:
    """Lock a run directory for this process, and create it if it is missing. The main rank does this for all ranks.

    Yields a function that raises UserError if `run` is no longer the directory that was locked. Call it before writing.

    The kernel holds the lock on the open file RUN/.lock and releases it when the process ends, however that happens.
    The text in the file is for people. The file stays when the run ends. If it were deleted, two processes could hold
    locks on two different files of that name.

    Raises UserError, and changes nothing, if another process uses the directory or if it cannot be written. Where the
    file system has no locks, prints a warning and continues.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # O_NOFOLLOW: a link in somebody else's directory could point to a file that must not be overwritten
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}): choose another --out") from None
    with open(descriptor, "r+b", buffering=0) as file:
        os.register_at_fork(after_in_child=file.close)  # a forked child shares the lock and may outlive this process
        try:
            _lock(file, run)
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            text = f"process {os.getpid()} on {platform.node()} since {now}\n{' '.join(sys.argv)}\n"
            file.truncate(0)
            file.write(text.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"{run / '.lock'} cannot be used ({error.strerror}): choose another --out") from None
        held = os.fstat(descriptor)
        try:
            yield lambda: _check_lock(run, held)
        finally:
            with suppress(OSError, ValueError):  # ValueError: it is closed in a forked child
                file.truncate(0)


def _check_lock(run: Path, held: os.stat_result) -> None:
    try:
        same = os.path.samestat(os.lstat(run / ".lock"), held)
    except (FileNotFoundError, NotADirectoryError):
        same = False
    except OSError as error:
        raise UserError(f"{run / '.lock'} cannot be read ({error.strerror}); nothing was written there") from None
    if not same:
        raise UserError(f"{run} was moved or replaced while the run used it; nothing was written there")


def _lock(file, run: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = file.read(500).decode(errors="replace").partition("\n")[0] or "another process"
        raise UserError(f"{run} is in use by {holder}: wait for it, stop it, or choose another --out") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        tqdm.write(
            f"warning: the file system of {run} has no locks: make sure that no other run uses this directory",
            file=sys.stderr,
        )


def recover_run_file(run: Path, recovered: Callable[[Path], dict | None]) -> None:
    """If run.json is missing or damaged, write it again from settings and data that `recovered` finds in a checkpoint.

    The damaged file stays under another name. Without such a checkpoint nothing changes. Raises UserError if the file
    cannot be written.
    """
    path, kept = run / "run.json", ""
    try:
        _load(path)
        return
    except FileNotFoundError:
        problem = "is missing"
    except OSError:
        return  # read_run reports it
    except DAMAGE:
        problem = "is damaged"
    record = recovered(run) or {}
    if not _is_run(record):
        return
    if problem == "is damaged":
        names = (path.with_name(f"run.json.damaged{n}") for n in ("", *map(str, range(2, 1000))))
        aside = next(name for name in names if not os.path.lexists(name))
        with one_line_errors(path):
            path.rename(aside)
        kept = f" (it is now {aside.name})"
    _write(path, {name: record[name] for name in ("settings", "data", "parent") if name in record} | {"starts": []})
    tqdm.write(f"{path} {problem}{kept}: it is written again from the newest checkpoint; with a new list of starts")


def read_run(run: Path, advice: str = "choose another --out") -> dict:
    """The content of run.json: settings, data, starts. Raises UserError, with the advice, if it is damaged."""
    path = run / "run.json"
    try:
        return _load(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}") from None
    except DAMAGE as error:
        raise UserError(f"{path} is damaged ({error!r}): {advice}") from None


def _load(path: Path) -> dict:
    """The content of run.json. Raises OSError or one of DAMAGE."""
    stored = json.loads(read_small(path, MAX_BYTES))
    if not _is_run(stored):
        raise ValueError("settings or data are missing")
    if any(type(start["step"]) is not int for start in (*stored["starts"], stored.get("parent", {"step": 0}))):
        raise ValueError("a start has no step")
    return stored


def _is_run(content: dict) -> bool:
    return isinstance(content.get("settings"), dict) and isinstance(content.get("data"), dict)


def check_same_run(run: Path, fixed: dict, data_differences: Callable[[dict], list[str]]) -> None:
    """Raise UserError if run.json records other values of the `fixed` settings, or other data.

    data_differences(data of run.json) -> one phrase for each difference from the data of this start. A setting that is
    newer than the run was off there.
    """
    if not os.path.lexists(run / "run.json"):
        return
    stored = read_run(run)
    settings = stored["settings"]
    differing = [
        f"{flag(name)} ({settings.get(name)} there, {value} here)"
        for name, value in fixed.items()
        if settings.get(name, type(value)()) != value
    ]
    try:
        differing += data_differences(stored["data"])
    except DAMAGE as error:
        raise UserError(f"{run / 'run.json'} is damaged ({error!r}): choose another --out") from None
    if differing:
        raise UserError(f"{run} is a run with other settings: {', '.join(differing)}; choose another --out")


def recorded_settings(run: Path) -> dict:
    """The settings in run.json, or {} if it is missing or damaged (check_same_run says so)."""
    try:
        return read_run(run)["settings"]
    except UserError:
        return {}


def record_start(run: Path, new: dict, step: int, host: dict) -> dict:
    """Record in run.json that the run starts, or continues, at this step, on this host (host_facts). A new run begins
    with the content of `new`: settings, data, perhaps parent and probes. What run.json has already stays as it is.

    Returns the content of run.json. Raises UserError if it cannot be written.
    """
    path = run / "run.json"
    stored = new | (read_run(run) if path.exists() else {"starts": []})
    start = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        **host,
    }
    stored["starts"].append(start)
    _write(path, stored)
    return stored


def _write(path: Path, content: dict) -> None:
    with one_line_errors(path), atomic_write(path, "w") as file:
        file.write(json.dumps(content, indent=1) + "\n")
