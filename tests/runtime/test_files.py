"""Writing files atomically under names that nobody can guess, and reading files that may be anything."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest

from runtime import files
from runtime.files import atomic_write, flush, naming, open_regular, read_small


def test_the_file_appears_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", ["wb", "w+b"])
def test_bytes(tmp_path, mode):
    with atomic_write(tmp_path / "a", mode) as file:
        file.write(b"\r\n\0")
    assert (tmp_path / "a").read_bytes() == b"\r\n\0"


def test_the_temporary_name_is_new_each_time_and_hidden(tmp_path):
    names = set()
    for _ in range(20):
        with atomic_write(tmp_path / "a.json"):
            (temporary,) = (p.name for p in tmp_path.iterdir() if p.name != "a.json")
        assert re.fullmatch(r"\.a\.json\.[0-9a-f]{16}\.tmp", temporary)  # clean_up finds .*.tmp
        names.add(temporary)
    assert len(names) == 20


def test_a_file_or_link_with_the_temporary_name_is_not_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "guessed")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".a.guessed.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError), atomic_write(tmp_path / "a"):
        raise AssertionError("opened")
    assert victim.read_text() == "precious"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_open(tmp_path, umask):
    before = os.umask(umask)
    try:
        with atomic_write(tmp_path / "a"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_an_error_changes_nothing(tmp_path, error):
    (tmp_path / "a").write_text("old")

    def write():
        with atomic_write(tmp_path / "a", "w") as file:
            file.write("new")
            raise error

    with pytest.raises(type(error)):
        write()
    assert (tmp_path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def failing(code):
    def call(*_, **__):
        raise OSError(code, os.strerror(code))

    return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["fsync", "rename", "unlink"])
def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch, call, code):
    """Also if the temporary file cannot be removed afterwards."""
    path = tmp_path / "a"
    path.write_text("old")

    def write():
        with monkeypatch.context() as patch, atomic_write(path, "w") as file:
            file.write("new")
            patch.setattr(*((os, "fsync") if call == "fsync" else (Path, "rename")), failing(code))
            if call == "unlink":
                patch.setattr(Path, "unlink", failing(code))

    with pytest.raises(OSError) as caught:
        write()
    assert (caught.value.errno, caught.value.filename) == (code, str(path))
    assert path.read_text() == "old"


def test_a_full_device_is_named(monkeypatch):
    """/dev/full fails at the write, which knows no name."""
    monkeypatch.setattr(Path, "with_name", lambda path, name: path)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok: None)
    real = open
    monkeypatch.setattr(files, "open", lambda path, mode: real(path, "wb", buffering=0), raising=False)
    with pytest.raises(OSError) as caught, atomic_write(Path("/dev/full")) as file:
        file.write(b"x")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/dev/full")


def test_file_and_directory_are_flushed_in_this_order(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def watched(descriptor):
        flushed.append((Path(f"/proc/self/fd/{descriptor}").readlink(), (tmp_path / "a").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    with atomic_write(tmp_path / "a"):
        pass
    (file, before), (directory, after) = flushed
    assert file.name.startswith(".a.")
    assert directory == tmp_path
    assert (before, after) == (False, True)


def test_an_error_of_the_temporary_file_names_the_file_itself(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "missing" / "a"):
        raise AssertionError("opened")
    assert caught.value.filename == str(tmp_path / "missing" / "a")


def test_errors_get_a_name(tmp_path):
    """rmtree names an entry without its directory; an error that has a path keeps it; other errors stay as they are."""
    path = tmp_path / "a"
    cases = [(None, str(path)), ("name", str(path)), ("b/name", "b/name"), ("/c", "/c")]
    for before, after in cases:
        with pytest.raises(OSError) as caught, naming(path):
            raise OSError(errno.EIO, "Input/output error", before)
        assert caught.value.filename == after
    with pytest.raises(OSError, match="only text"), naming(path):
        raise OSError("only text")
    with pytest.raises(ZeroDivisionError), naming(path):
        raise ZeroDivisionError


def test_flush_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(OSError, match=str(tmp_path)):
        flush(tmp_path)


# Reading


def test_small_files(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == read_small(path, 10**9) == b"12345"
    with pytest.raises(ValueError, match="it has 5 bytes, more than 4"):
        read_small(path, 4)
    path.write_bytes(b"")
    assert read_small(path, 0) == b""
    (tmp_path / "link").symlink_to(path)
    assert read_small(tmp_path / "link", 0) == b""


def test_a_sparse_file_of_absurd_size_is_not_read(tmp_path):
    with (tmp_path / "a").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=f"it has {2**40} bytes, more than 100"):
        read_small(tmp_path / "a", 100)


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero", "/dev/tty", "directory", "missing", "loop", "link"])
def test_what_is_no_regular_file(tmp_path, kind):
    """None of them waits, none takes memory."""
    path = tmp_path / "a"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "link":
        path.symlink_to("/dev/zero")
    elif kind != "missing":
        path = Path(kind)
    with pytest.raises((OSError, ValueError)) as caught:
        read_small(path, 10)
    assert isinstance(caught.value, OSError) or str(caught.value) == "it is not a regular file"
    with pytest.raises((OSError, ValueError)), open_regular(path):
        raise AssertionError("opened")


def test_a_file_of_proc_cannot_exceed_the_limit():
    """Its reported size is 0."""
    with pytest.raises(ValueError, match="more than 10"):
        read_small(Path("/proc/self/status"), 10)


def test_no_descriptor_is_left_open(tmp_path):
    os.mkfifo(tmp_path / "a")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(10):
        with pytest.raises(ValueError):
            read_small(tmp_path / "a", 10)
        with pytest.raises(OSError):
            read_small(tmp_path, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
