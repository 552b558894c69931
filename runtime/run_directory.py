"""A run directory has one user at a time: two runs that save into it would ruin each other's checkpoints.

The lock is the kernel's, on the open file RUN/.lock. It is gone with the process that holds it, however that dies, so
none is ever left behind. What the file says is for people. It stays when the run ends: were it removed, a process that
has just opened it and one that creates it anew could both hold a lock.
"""

import errno
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from tqdm import tqdm

from runtime.errors import UserError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)  # of some network file systems


@contextmanager
def lock(run: Path) -> Iterator[None]:
    """Be the only process that uses a run directory, which is made if missing. Of many ranks, the first does this.

    Raises UserError, having changed nothing, when another process uses it or when it can not be written. Where the file
    system has no locks, warns and goes on.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        # no link: in a directory that somebody else made it could lead to a file that must not be overwritten
        descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise UserError(f"{error.filename} can not be written ({error.strerror}): choose another --out") from None
    with open(descriptor, "r+b", buffering=0) as file:
        os.register_at_fork(after_in_child=file.close)  # a forked process shares the lock, and might outlive us
        try:
            _lock(file, run)
            now = datetime.now().astimezone().isoformat(" ", "seconds")
            line = f"process {os.getpid()} on {platform.node()} since {now}\n{' '.join(sys.argv)}\n"
            file.truncate(0)
            file.write(line.encode(errors="replace"))
        except OSError as error:
            raise UserError(f"{run / '.lock'} can not be used ({error.strerror}): choose another --out") from None
        try:
            yield
        finally:
            if not file.closed:  # it is, in a forked process
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
            f"warning: the file system of {run} has no locks: see to it that no other run uses this directory",
            file=sys.stderr,
        )
