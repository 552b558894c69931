"""The index of all tokens: what it finds, how it is built, and that damage to it gives no wrong answer."""

import builtins
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron import REPO, cut_into_shards, write_data

from corpus import suffix_index
from corpus.indexed import IndexedTokens
from corpus.suffix_index import build_index, open_index
from runtime.errors import UserError

pytest.importorskip("pydivsufsort")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Shards of 200 tokens of 2 bytes."""
    monkeypatch.setattr(suffix_index, "SHARD_BYTES", 400)
    monkeypatch.setattr(suffix_index, "OVERLAP", 16)


@pytest.fixture
def data(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 4, 700)
    write_data(tmp_path / "data", np.split(tokens, [100, 250, 650]))
    return IndexedTokens(tmp_path / "data")


def places(tokens: np.ndarray, span) -> list[int]:
    return [p for p in range(len(tokens) - len(span) + 1) if (tokens[p : p + len(span)] == span).all()]


def files(data) -> list[Path]:
    return sorted(Path(f"{data.prefix}.suffixes").iterdir())


@pytest.mark.parametrize(("dtype", "code"), [("<u2", 8), ("u1", 1), ("i1", 2), ("<i4", 4), ("<i8", 5)])
def test_every_span_is_found(tmp_path, dtype, code):
    """Also spans across the shards of the index, at both ends of the data, longer than OVERLAP, or absent; for tokens
    of every width, negative ones among them."""
    rng = np.random.default_rng(2)
    lowest = -2 if np.dtype(dtype).kind == "i" else 0
    tokens = write_data(tmp_path / "data", [rng.integers(lowest, lowest + 4, 700)], dtype, code)
    cut_into_shards(tmp_path / "data", [501, 777])
    data = IndexedTokens(tmp_path / "data")
    build_index(data, None)
    index = open_index(data)
    assert len(index.shards) == -(-700 * tokens.itemsize // 400)
    for length in (1, 2, 3, 5, 16, 17, 40):
        for start in [0, 190, 200, 399, 700 - length, *rng.integers(0, 700 - length, 5).tolist()]:
            span = tokens[start : start + length].copy()
            for changed in (span, np.append(span[:-1], span[-1] ^ 1)):
                expected = places(tokens, changed)
                found = list(index.find(changed))
                assert np.concatenate([[], *found]).tolist() == expected
                assert all(array.dtype == np.int64 for array in found)
                if length <= 16:
                    assert index.count(changed) == len(expected)


def test_shards_are_built_on_several_machines(data, capsys):
    whole = data.prefix.with_name("whole")
    for end in (".bin", ".idx"):
        shutil.copy(f"{data.prefix}{end}", f"{whole}{end}")
    build_index(IndexedTokens(whole), None)
    assert open_index(data) is None
    capsys.readouterr()
    build_index(data, "1/3")
    assert "00001-of-00004.i32 (2 of 4): 200 tokens" in capsys.readouterr().out
    assert open_index(data) is None
    assert "00000-of-00004.i32 is not built yet (3 of 4), so all tokens are read" in capsys.readouterr().err
    for share in ("2/3", "0/3"):
        build_index(data, share)
    assert open_index(data)
    arrays = [path.read_bytes() for path in files(data) if path.suffix == ".i32"]
    assert arrays == [path.read_bytes() for path in files(IndexedTokens(whole)) if path.suffix == ".i32"]
    for share in ("3/3", "x", "1/", "-1/3", "0/0"):
        with pytest.raises(UserError, match=f"--shard {share}: give a part"):
            build_index(data, share)


def test_building_goes_on_where_it_was_killed(data):
    """The process is killed while it writes the third shard."""
    code = f"""
import os, signal, sys
from corpus import suffix_index
from corpus.indexed import IndexedTokens
suffix_index.SHARD_BYTES, suffix_index.OVERLAP = 400, 16
rename = suffix_index.Path.rename
def killed(path, target):
    if "00002" in target.name:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(path, target)
suffix_index.Path.rename = killed
suffix_index.build_index(IndexedTokens({str(data.prefix)!r}), None)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, timeout=60)
    assert run.returncode == -signal.SIGKILL
    names = [path.name for path in files(data)]
    assert any(name.endswith(".tmp") for name in names)
    kept = {path: path.stat().st_ino for path in files(data) if path.suffix in (".i32", ".json")}
    assert len(kept) == 4
    assert open_index(data) is None
    build_index(data, None)
    assert all(path.stat().st_ino == inode for path, inode in kept.items())
    assert sorted({path.suffix for path in files(data)}) == [".i32", ".json"]
    assert open_index(data).count(np.zeros(1, "<u2")) == len(places(data.read(0, 700), [0]))


def test_an_index_is_hashed_only_if_files_may_have_changed(data, monkeypatch):
    build_index(data, None)
    hashed = []
    real = suffix_index.sha256
    monkeypatch.setattr(suffix_index, "sha256", lambda blocks: hashed.append(1) or real(blocks))
    open_index(IndexedTokens(data.prefix))
    assert hashed == []
    time.sleep(0.15)  # longer than a tick of the clock of the file system
    os.utime(files(data)[0])  # what a copy to another machine changes, too
    time.sleep(0.15)
    open_index(IndexedTokens(data.prefix))
    assert len(hashed) == 2  # this file and its tokens
    open_index(IndexedTokens(data.prefix))
    assert len(hashed) == 2


def test_other_tokens_or_a_changed_file_are_named(data, capsys):
    build_index(data, None)
    raw = bytearray(Path(f"{data.prefix}.bin").read_bytes())
    raw[900] ^= 1  # token 450, of the third shard
    Path(f"{data.prefix}.bin").write_bytes(raw)
    with pytest.raises(UserError, match=r"00002-of-00004.i32: the tokens have changed since it was made; delete this"):
        open_index(IndexedTokens(data.prefix))
    capsys.readouterr()
    build_index(IndexedTokens(data.prefix), None)  # builds what is not right
    assert [("is there" in line) for line in capsys.readouterr().out.splitlines()] == [True, True, False, True]
    assert open_index(IndexedTokens(data.prefix))
    path = files(data)[0]
    path.write_bytes(path.read_bytes()[:-4] + bytes(4))
    with pytest.raises(UserError, match=r"00000-of-00004.i32: it has changed since it was written; delete this file"):
        open_index(IndexedTokens(data.prefix))


def test_without_the_library(data, monkeypatch):
    build_index(data, "0/4")
    real = builtins.__import__

    def absent(name, *arguments):
        if name == "pydivsufsort":
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(UserError, match=r"needs pydivsufsort: pip install -e '.\[data\]'"):
        build_index(data, None)


def test_a_full_disk_is_one_line(data, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(suffix_index, "atomic_write", full)
    with pytest.raises(UserError, match=r"00000-of-00004.i32 cannot be written: No space left on device"):
        build_index(data, None)


def describe_again(path: Path) -> None:
    """Let the record describe a changed file, so that its hash is right."""
    record = path.with_suffix(".json")
    stored = json.loads(record.read_text())
    record.write_text(json.dumps({**stored, "suffixes_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}))


def mutate(rng, raw: bytes) -> bytes:
    """Change, insert, remove or cut bytes, or write a number of 4 bytes that is extreme."""
    changed, at = bytearray(raw), int(rng.integers(len(raw)))
    kind = rng.integers(5)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        start, number = at // 4 * 4, [0, 1, -1, 199, 200, 2**31 - 1, -(2**31)][rng.integers(7)]
        changed[start : start + 4] = number.to_bytes(4, "little", signed=True)
    elif kind == 2:
        other = int(rng.integers(len(raw)))
        changed[at : at + 4], changed[other : other + 4] = changed[other : other + 4], changed[at : at + 4]
    elif kind == 3:
        del changed[at : at + int(rng.integers(1, 9))]
    else:
        changed[at:at] = rng.integers(0, 256, int(rng.integers(1, 9)), np.uint8).tobytes()
    return bytes(changed)


def fuzz(data, count: int, seed: int) -> tuple[int, int]:
    """Open and ask mutated indexes. Returns how many were refused, and how many were asked and gave true places only.

    A record that does not describe the file is always refused. A forged one can hide places, but not invent any.
    """
    rng, tokens = np.random.default_rng(seed), data.read(0, data.tokens)
    build_index(data, None)
    originals, refused, asked = {path: path.read_bytes() for path in files(data)}, 0, 0
    suffixes = [path for path in originals if path.suffix == ".i32"]
    for trial in range(count):
        is_forged, path = trial % 2, [*originals][rng.integers(len(originals))]
        path = suffixes[rng.integers(len(suffixes))] if is_forged else path
        raw = mutate(rng, originals[path])
        path.write_bytes(raw)
        if is_forged:
            describe_again(path)
        try:
            index = open_index(data)
            for _ in range(3):
                span = rng.integers(0, 4, rng.integers(1, 7)).astype("<u2")
                found = np.concatenate([np.zeros(0, np.int64), *index.find(span)]).tolist()
                expected = places(tokens, span)
                assert set(found) <= set(expected)
                if not is_forged:  # a record that reads the same: nothing is lost
                    assert found == expected
            asked += 1
        except UserError as error:
            refused += str(path.parent) in str(error)
        path.write_bytes(originals[path])
        record = path.with_suffix(".json")
        record.write_bytes(originals[record])
    return refused, asked


def test_mutated_indexes_give_no_wrong_token(data):
    refused, asked = fuzz(data, 300, seed=3)
    assert refused + asked == 300
    assert min(refused - 130, asked) > 20


@pytest.mark.slow
def test_20000_mutated_indexes_give_no_wrong_token(data):
    refused, asked = fuzz(data, 20_000, seed=4)
    assert refused + asked == 20_000
    assert min(refused - 9_000, asked) > 1_000
