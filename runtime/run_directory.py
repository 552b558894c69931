"""The run directory: who uses it, which run it holds, and when that run was started.

run.json     settings and data of the run, and one entry for every start
.lock        locked as long as a process uses the directory
"""

import errno
import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.ranks import Dist

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network file systems


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def refuse_other_directory(run: Path) -> None:
    """Raise UserError if `run` exists and is not a run directory. Nothing is written into such a directory."""
    if not run.exists() or (run / "run.json").exists():
        return
    # A start that was killed leaves these.
    if not run.is_dir() or any(p.name != ".lock" and not p.match(".run.json*.tmp") for p in run.iterdir()):
        raise UserError(f"{run} exists and is not a run directory: choose another --out")


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Lock a run directory for this process, and create it if it is missing. The main rank does this for all ranks.

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
        try:
            yield
        finally:
            if not file.closed:  # it is closed in a forked child
                file.truncate(0)


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


def check_same_run(run: Path, fixed: dict, fingerprint: dict) -> None:
    """Raise UserError if run.json records other values of the `fixed` settings, or other data."""
    path = run / "run.json"
    if not path.exists():
        return
    try:
        stored = json.loads(path.read_text())
        settings, order = stored["settings"], stored["data"]["order_sha256"]
        differing = [
            f"{flag(name)} ({settings.get(name)} there, {value} here)"
            for name, value in fixed.items()
            if settings.get(name) != value
        ]
        if order != fingerprint["order_sha256"]:
            here = fingerprint["order_sha256"]
            differing.append(f"the order of the data (sha256 {order[:12]}… there, {here[:12]}… here)")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): choose another --out") from None
    if differing:
        raise UserError(f"{run} is a run with other settings: {', '.join(differing)}; choose another --out")


def record_start(run: Path, settings: dict, fingerprint: dict, step: int, dist: Dist) -> None:
    """Record in run.json that the run starts, or continues, at this step: settings and data once, every start."""
    path = run / "run.json"
    stored = (
        json.loads(path.read_text()) if path.exists() else {"settings": settings, "data": fingerprint, "starts": []}
    )
    start = {
        "step": step,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
        "host": platform.node(),
        "ranks": dist.world_size,
        "device": torch.cuda.get_device_name() if dist.device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    stored["starts"].append(start)
    with atomic_write(path, "w") as file:
        file.write(json.dumps(stored, indent=1) + "\n")
