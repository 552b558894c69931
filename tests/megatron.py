"""Data sets for tests: arrays of GPT-NeoX's own code (golden/order), files written by the format's description."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests/golden/order"
MISC = json.loads((GOLDEN / "misc.json").read_text())
MAPS = ("doc_idx", "sample_idx", "shuffle_idx")


def copy_golden(directory):
    """Copy the golden data sets, because the order is cached beside the data. Returns the directory."""
    for name in ("synth500", "edgeA", "edgeB"):
        for suffix in (".bin", ".idx"):
            shutil.copy(GOLDEN / (name + suffix), directory)
    return directory


def arrays(name):
    """The golden arrays of one file: name -> array."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def write_index(prefix, sizes, code=8, itemsize=2, marks=None):
    """Write an .idx from the description of the format, independent of prepare.py. Returns its bytes."""
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    marks = range(len(sizes) + 1) if marks is None else marks
    raw = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(marks))
    raw += np.array(sizes, "<i4").tobytes() + (ends - np.array(sizes, np.int64) * itemsize).astype("<i8").tobytes()
    raw += np.array(marks, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(raw)
    return raw


def write_data(prefix, documents, dtype="<u2", code=8, marks=None):
    """Write PREFIX.bin and PREFIX.idx. Returns all tokens."""
    tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    write_index(prefix, [len(d) for d in documents], code, tokens.itemsize, marks)
    return tokens


def random_documents(rng, count, longest, vocab=60000):
    return [rng.integers(0, vocab, rng.integers(0, longest + 1)).astype("<u2") for _ in range(count)]


def cut_into_shards(prefix, cuts, last_is_count=False):
    """Replace PREFIX.bin by shards that end at the bytes `cuts`."""
    whole = Path(f"{prefix}.bin")
    raw = whole.read_bytes()
    whole.unlink()
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    total = len(parts) - (not last_is_count)
    for number, part in enumerate(parts):
        Path(f"{prefix}-{number:05d}-of-{total:05d}.bin").write_bytes(part)


def run_data(directory, *arguments):
    """Run `python data.py ARGUMENTS` in a directory, as a user does."""
    command = [sys.executable, str(REPO / "data.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)


def assert_refused(run, message):
    """A refused command prints one line, on stderr, and has exit status 1."""
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr
    assert run.stdout == ""
