"""Data sets on disk: shards, and broken or hostile files."""

import errno
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron import GOLDEN, REPO, copy_golden, cut_into_shards, random_documents, write_data

import data
from corpus.indexed import IndexedTokens
from corpus.order import Order
from data import check_vocab
from runtime.errors import UserError


@pytest.fixture
def golden(tmp_path):
    return copy_golden(tmp_path)


def test_shards_cut_anywhere_hold_the_same_rows(tmp_path):
    rng = np.random.default_rng(1)
    for trial in range(30):
        prefix = tmp_path / f"{trial}"
        tokens = write_data(prefix, random_documents(rng, 12, 40))
        # Any byte: within a token, twice the same (an empty shard), at both ends.
        cuts = sorted(rng.integers(0, 2 * len(tokens) + 1, int(rng.integers(1, 8))).tolist())
        cut_into_shards(prefix, cuts, last_is_count=bool(trial % 2))
        read = IndexedTokens(prefix)
        assert len(read.files) == len(cuts) + 1
        np.testing.assert_array_equal(read.read(0, len(tokens)), tokens)
        for _ in range(50):
            position = int(rng.integers(0, len(tokens) + 1))
            count = int(rng.integers(0, len(tokens) + 1 - position))
            np.testing.assert_array_equal(read.read(position, count), tokens[position : position + count])
        for position, count in ((-1, 2), (0, len(tokens) + 1), (len(tokens), 1), (3, -1)):
            with pytest.raises(IndexError):
                read.read(position, count)
        order, stream = Order(prefix, 40, 7), []
        documents = np.split(tokens, np.cumsum(np.asarray(read.sizes))[:-1])
        stream = np.concatenate([documents[d] for d in order.doc_idx])
        for i in range(len(order)):
            np.testing.assert_array_equal(order[i], stream[order.shuffle_idx[i] * 7 :][:8])


def test_shards_equal_the_whole_file(golden):
    whole = Order(golden / "synth500", 100, 64)
    expected, sha = [whole[i] for i in range(100)], data.fingerprint(whole)["bin_sha256"]
    cut_into_shards(golden / "synth500", [500_001, 1_000_000, 1_777_777])
    sharded = Order(golden / "synth500", 100, 64)
    np.testing.assert_array_equal([sharded[i] for i in range(100)], expected)
    assert (
        data.fingerprint(sharded)["bin_sha256"]
        == sha
        == hashlib.sha256((GOLDEN / "synth500.bin").read_bytes()).hexdigest()
    )


def test_missing_and_extra_shards(golden):
    prefix = golden / "synth500"
    cut_into_shards(prefix, [500_001, 1_000_000, 1_777_777])

    def refused(message):
        with pytest.raises(UserError, match=message):
            IndexedTokens(prefix)

    (golden / "synth500-00001-of-00003.bin").rename(golden / "aside")
    refused("synth500-00001-of-00003.bin: this shard is missing")
    (golden / "aside").rename(golden / "synth500-00001-of-00003.bin")
    IndexedTokens(prefix)

    (golden / "synth500-00003-of-00003.bin").rename(golden / "aside")
    refused("709169 bytes are missing; is the shard .*synth500-00003-of-00003.bin missing")
    shutil.copy(golden / "aside", golden / "synth500-00004-of-00003.bin")
    refused("synth500-00004-of-00003.bin: a shard beyond the last one")
    (golden / "synth500-00004-of-00003.bin").unlink()
    (golden / "aside").rename(golden / "synth500-00003-of-00003.bin")

    shutil.copy(golden / "synth500-00000-of-00003.bin", golden / "synth500-00000-of-00005.bin")
    refused("shards of 2 different sets")


def test_empty_data_set_has_no_rows(tmp_path):
    for marks in ([0], [0, 0]):
        write_data(tmp_path / "empty", [], marks=[0])
        assert (IndexedTokens(tmp_path / "empty").tokens, IndexedTokens(tmp_path / "empty").documents) == (0, 0)
        assert len(IndexedTokens(tmp_path / "empty").read(0, 0)) == 0
        write_data(tmp_path / "hollow", [[], []], marks=[*marks, 2] if len(marks) > 1 else marks)
        assert IndexedTokens(tmp_path / "hollow").tokens == 0
    with pytest.raises(UserError, match="0 tokens make no row"):
        Order(tmp_path / "empty", 1)


def corrupt(field, value):
    """The .idx of edgeA with one field overwritten. The sizes of its n sequences start at byte 34."""
    raw = bytearray((GOLDEN / "edgeA.idx").read_bytes())
    n = struct.unpack_from("<Q", raw, 18)[0]
    offsets = {"magic": 0, "version": 9, "code": 17, "count": 18, "marks": 26, "size": 34, "pointer": 34 + 4 * n + 8}
    offsets |= {"first mark": 34 + 12 * n, "mark": 34 + 12 * n + 8 * 7, "last mark": 34 + 20 * n}
    raw[offsets[field] : offsets[field] + len(value)] = value
    return bytes(raw)


BAD_INDEX = {  # name: (bytes of the .idx, what the message says)
    "no file": (None, "edgeA.idx"),
    "empty": (b"", "too few for a header"),
    "short header": (b"MMIDIDX\0\0" + bytes(10), "too few for a header"),
    "magic": (corrupt("magic", b"TNTIDX\0\0"), "magic"),
    "version": (corrupt("version", struct.pack("<Q", 2)), "version 2"),
    "float32": (corrupt("code", b"\6"), "dtype code 6"),
    "float64": (corrupt("code", b"\7"), "dtype code 7"),
    "unknown dtype": (corrupt("code", b"\xff"), "dtype code 255"),
    "wider dtype": (corrupt("code", b"\4"), "truncated, 3714 bytes are missing"),
    "narrower dtype": (corrupt("code", b"\1"), "1857 bytes too long"),
    "sizes overrun the file": (corrupt("count", struct.pack("<Q", 1000)), "truncated or damaged"),
    "negative count": (corrupt("count", struct.pack("<q", -1)), "truncated or damaged"),
    "overflowing count": (corrupt("count", struct.pack("<Q", 2**64 // 12 + 1)), "truncated or damaged"),
    "overflowing marks": (corrupt("marks", struct.pack("<Q", 2**61)), "truncated or damaged"),
    "no marks": (corrupt("marks", struct.pack("<Q", 0)), "no document marks"),
    "negative size": (corrupt("size", struct.pack("<i", -5)), "sequence 0 has a negative size"),
    "enormous size": (corrupt("size", struct.pack("<i", 2**31 - 1)), "truncated"),
    "wrong position": (corrupt("pointer", struct.pack("<q", 3)), "position of sequence 1"),
    "first mark": (corrupt("first mark", struct.pack("<q", 1)), "document marks do not run"),
    "mark past the end": (corrupt("mark", struct.pack("<q", 10**6)), "document marks go backwards"),
    "negative mark": (corrupt("mark", struct.pack("<q", -(2**63))), "document marks go backwards"),
    "last mark past the end": (corrupt("last mark", struct.pack("<q", 10**6)), "document marks do not run"),
    "truncated": ((GOLDEN / "edgeA.idx").read_bytes()[:-1], "truncated or damaged"),
}


@pytest.mark.parametrize("name", BAD_INDEX)
def test_bad_index(golden, name):
    raw, message = BAD_INDEX[name]
    (golden / "edgeA.idx").unlink() if raw is None else (golden / "edgeA.idx").write_bytes(raw)
    before = sorted(golden.iterdir())
    with pytest.raises(UserError) as error:
        IndexedTokens(golden / "edgeA")
    assert "edgeA" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        data.open_rows(golden / "edgeA", 1, 64)
    assert sorted(golden.iterdir()) == before


def test_bad_bin(golden):
    whole = (golden / "edgeA.bin").read_bytes()
    for raw, message in (
        (whole[:-3], "edgeA.bin: truncated, 3 bytes are missing"),
        (whole + b"x", "edgeA.bin: 1 bytes too long"),
        (b"", "edgeA.bin: truncated, 3714 bytes are missing"),
    ):
        (golden / "edgeA.bin").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            IndexedTokens(golden / "edgeA")
    (golden / "edgeA.bin").unlink()
    with pytest.raises(UserError, match=r"edgeA\.bin: no such file, and no shards"):
        IndexedTokens(golden / "edgeA")
    (golden / "edgeA.bin").mkdir()
    with pytest.raises(UserError, match=r"edgeA\.bin: "):
        IndexedTokens(golden / "edgeA")


def mutate(rng, raw, n):
    """Return a hostile .idx: flipped bytes, another length, extreme fields, wrong sizes or counts with right sums."""
    raw = bytearray(raw)
    extremes = [0, 1, -1, n - 1, n + 1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**63 - 1, -(2**63), 2**61, 3 * 2**60]
    kind = rng.integers(7)
    if kind == 0:  # flip some bytes
        for at in rng.integers(0, len(raw), rng.integers(1, 5)):
            raw[at] ^= int(rng.integers(1, 256))
    elif kind == 1:  # flip a bit in the header
        raw[rng.integers(0, 34)] ^= 1 << int(rng.integers(8))
    elif kind == 2:  # cut or lengthen
        end = int(rng.integers(0, len(raw)))
        raw = raw[:end] if rng.integers(2) else raw + bytes(rng.integers(0, 256, end % 40 + 1).tolist())
    elif kind == 3:  # an 8-byte field, anywhere
        at = int(rng.choice([9, 18, 26, 34 + 4 * n + 8 * rng.integers(n), 34 + 12 * n + 8 * rng.integers(n + 1)]))
        raw[at : at + 8] = struct.pack("<Q", int(rng.choice(extremes)) % 2**64)
    elif kind == 4:  # a size
        at = 34 + 4 * int(rng.integers(n))
        raw[at : at + 4] = struct.pack("<I", int(rng.choice(extremes)) % 2**32)
    elif kind == 5:  # both counts, so that the length of the file still fits: 12 dn + 8 dm = 0
        change = 2 * int(rng.integers(-(n // 2), n))
        raw[18:34] = struct.pack("<QQ", (n + change) % 2**64, (n + 1 - change * 3 // 2) % 2**64)
    else:  # two sizes with the same sum, with or without the position between them
        i = int(rng.integers(n - 1))
        sizes = list(struct.unpack_from("<2i", raw, 34 + 4 * i))
        change = int(rng.integers(1, 9))
        struct.pack_into("<2i", raw, 34 + 4 * i, sizes[0] - change, sizes[1] + change)
        if rng.integers(2):
            at = 34 + 4 * n + 8 * (i + 1)
            struct.pack_into("<q", raw, at, struct.unpack_from("<q", raw, at)[0] - 2 * change)
    return bytes(raw)


def test_ten_thousand_hostile_indexes(tmp_path):
    """Each is refused or serves the right tokens: no crash, no other exception, never a wrong token."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(30000, 50304, size) for size in (0, 1, 7, 0, 30, 2, 64, 1, 0)]
    tokens = write_data(tmp_path / "hostile", documents)
    whole = (tmp_path / "hostile.idx").read_bytes()
    accepted = 0
    for _ in range(10_000):
        (tmp_path / "hostile.idx").write_bytes(mutate(rng, whole, len(documents)))
        try:
            read = IndexedTokens(tmp_path / "hostile")
            served = read.read(0, read.tokens)
            # int16 instead of uint16 passes all checks. It makes large token ids negative, which check_vocab refuses.
            check_vocab(served[None, None], 50304, step=0)
        except UserError:
            continue
        accepted += 1
        np.testing.assert_array_equal(served, tokens)
        for document, start in enumerate(np.cumsum(np.asarray(read.sizes)) - np.asarray(read.sizes)):
            assert read.start(document) == start
    assert 0 < accepted < 2000  # most are refused; but moved marks are harmless, and some cuts change nothing


# --- Files that change or fail while they are in use ------------------------------------------------------------------


def test_files_that_shrink_do_not_kill(golden):
    """A mapping would end the process by SIGBUS. So this runs in a process of its own."""
    code = "import os, sys, data\norder = data.Order('edgeA', 1, 64)\n"
    code += (
        "def main():\n  os.truncate(sys.argv[1], int(sys.argv[2]))\n  data.batch(order, 0, 16)\ndata.run_command(main)"
    )
    whole = {name: (golden / name).read_bytes() for name in ("edgeA.bin", "edgeA.idx")}
    for name, left in (("edgeA.bin", 500), ("edgeA.bin", 0), ("edgeA.idx", 40), ("edgeA.idx", 0)):
        command, paths = [sys.executable, "-c", code, name, str(left)], {"PYTHONPATH": str(REPO)}
        run = subprocess.run(command, cwd=golden, env=os.environ | paths, capture_output=True, text=True, timeout=60)
        assert (run.returncode, run.stderr.count("\n")) == (1, 1), run.stderr
        assert run.stderr.startswith(f"error: {name}: byte ")
        assert f"it had {len(whole[name])} bytes" in run.stderr
        for file, raw in whole.items():
            (golden / file).write_bytes(raw)


def test_a_disk_error_is_named(golden, monkeypatch):
    order = Order(golden / "edgeA", 1, 64)

    def fail(descriptor, count, begin):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"edgeA\S*: byte \d+ cannot be read \(Input/output error\)"):
        order[3]


@pytest.mark.parametrize("name", ["edgeA.idx", "edgeA.bin"])
@pytest.mark.parametrize("kind", ["fifo", "device", "proc", "directory"])
def test_only_regular_files_are_opened(golden, name, kind):
    path = golden / name
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "proc": "/proc/self/cwd"}[kind])
    with pytest.raises(UserError, match=f"{name}: not a regular file"):
        IndexedTokens(golden / "edgeA")


def test_reading_opens_no_mapping(golden):
    order = Order(golden / "edgeA", 1, 64)
    order = Order(golden / "edgeA", 1, 64)
    for i in range(len(order)):
        order[i]
    assert str(golden) not in Path("/proc/self/maps").read_text()
    assert order.doc_idx[0] >= 0  # the arrays for users are mappings
    assert str(golden) in Path("/proc/self/maps").read_text()
