"""Safetensors files: written like the library writes them, and read in pieces."""

import errno
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.tensors import DTYPES, read_header, read_pieces, write_tensors


@pytest.mark.parametrize("dtype", DTYPES)
def test_files_equal_those_of_the_library(tmp_path, dtype):
    """The bytes are the same, whatever the pieces, and the returned checksums are right."""
    generator = torch.Generator().manual_seed(0)
    names = {"b": (5, 3), "a.weight": (7,), 'ä "quoted"': (2, 2, 2), "c": (1, 64), "B": (4,)}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in names.items()}
    tensors["c"][0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    entry = write_tensors(tmp_path / "ours", dtype, names, lambda name: tensors[name].split(2), {"note": "ü"})
    header = (tmp_path / "ours").read_bytes()
    header = header[: 8 + int.from_bytes(header[:8], "little")]
    assert json.loads(header[8:])["__metadata__"] == {"format": "pt", "note": "ü"}
    assert entry == {
        "bytes": (tmp_path / "ours").stat().st_size,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "tensors": {
            name: hashlib.sha256(t.view(torch.uint8).numpy().tobytes()).hexdigest() for name, t in tensors.items()
        },
    }
    read = load_file(tmp_path / "ours")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name].view(torch.uint8), t.view(torch.uint8)) for name, t in tensors.items())

    write_tensors(tmp_path / "ours", dtype, names, lambda name: [tensors[name]])
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("piece", [1, 3, 100, 10**6])
def test_pieces(tmp_path, piece):
    data = np.random.default_rng(0).bytes(1000)
    (tmp_path / "a").write_bytes(data)
    for offset, size in ((0, 1000), (17, 200), (999, 1), (5, 0)):
        found = list(read_pieces(tmp_path / "a", offset, size, piece))
        assert b"".join(p.numpy().tobytes() for p in found) == data[offset : offset + size]
        assert [len(p) for p in found[:-1]] == [piece] * (len(found) - 1)
        assert all(0 < len(p) <= piece for p in found)


def test_a_file_that_becomes_shorter(tmp_path):
    """Under a memory map, the second piece would be a SIGBUS."""
    (tmp_path / "a").write_bytes(bytes(100_000))
    pieces = read_pieces(tmp_path / "a", 0, 100_000, 50_000)
    next(pieces)
    os.truncate(tmp_path / "a", 60_000)
    with pytest.raises(OSError, match=f"{tmp_path / 'a'} is shorter"):
        next(pieces)


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:
        write_tensors(tmp_path / "a", torch.float32, {"x": (2,)}, lambda _: [torch.zeros(2)])
    assert (caught.value.errno, caught.value.filename) == (errno.EDQUOT, str(tmp_path / "a"))


def test_files_that_are_not_files(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, "/dev/zero"):
        for read in (read_header, lambda path: next(read_pieces(path, 0, 10))):
            with pytest.raises((OSError, ValueError)):
                read(path)


def test_header(tmp_path):
    tensors = {"b": torch.zeros(3), "a": torch.ones(2, 2, dtype=torch.float16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"k": "v"})
    header, entries, metadata = read_header(tmp_path / "x.safetensors")
    offsets = [entry["data_offsets"] for entry in entries.values()]
    assert offsets == sorted(offsets)
    assert {name: entry["shape"] for name, entry in entries.items()} == {"b": [3], "a": [2, 2]}
    assert metadata == {"k": "v"}
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data.startswith(header)
    assert len(header) + offsets[-1][1] == len(data)
