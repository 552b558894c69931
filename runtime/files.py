"""Files that appear under their names only when they are complete and on the disk; files that are safe to open."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

# Exceptions that reading a damaged or malicious file can raise.
READ_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give `path` as filename to an OSError of the block that names no file, or one without its directory.

    Errors of read, write and fsync know no name; those of shutil.rmtree lack the directory.
    """
    try:
        yield
    except OSError as error:
        if error.errno and os.sep not in str(error.filename):
            error.filename = str(path)
        raise


def reason(error: Exception) -> str:
    """The text of an error. One of the operating system names its file: "No space left on device (FILE)"."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror + (f" ({error.filename})" if error.filename else "")


@contextmanager
def atomic_write(path: Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces `path` when the block ends. After an error `path` has not changed.

    The data is written to a new file `.NAME.RANDOM.tmp` in the same directory, flushed to the disk, and renamed. An
    error of the disk that names no file gets `path` as its filename. Raises OSError.
    """
    # Nobody can guess the name, and mode x refuses a file or link that already has it: in a directory of several users
    # a link could point to a file that must not be overwritten.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with naming(path):
        try:
            with open(temporary, mode.replace("w", "x")) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.rename(path)
        except BaseException as error:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.filename == str(temporary):
                error.filename = None
            raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading. Raises OSError, or ValueError if it is a FIFO, a device, or something else.

    O_NONBLOCK: the open of a FIFO would wait for a writer.
    """
    with naming(path), open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        yield file


def read_small(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises OSError, or ValueError with a plain reason."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size <= limit:
            data = file.read(limit + 1)  # in /proc the size is 0, whatever the file contains
            size = len(data)
        if size > limit:
            raise ValueError(f"it has {size} bytes, more than {limit}")
        return data
