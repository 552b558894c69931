"""100,000 damaged data sets. Each is refused in one line, or every row that it serves is the row that is stored.

The truth is computed here from the bytes in the files, by the description of the format and of the published order:
it shares no code with the reader. If the rows differ from those of the data set before it was damaged, it is another
data set: then a run that was started with the first one must refuse it.
"""

import json
import random
import resource
import signal
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from harness import Tally, folder_in_memory, remove, replace, scaled
from megatron import cut_into_shards, write_data

import data
from corpus.indexed import IndexedTokens
from corpus.order import Order, describe
from runtime.errors import UserError

CASES = 100_000
REPLACEMENTS = ["nothing", "directory", "fifo", "/dev/zero", "/dev/tty", "/proc/self/mem", "itself", "1 TB"]
SEQ_LEN, SAMPLES, SEED = 8, 16, 1234
HEADER = 34  # bytes
TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
EXTREMES = [0, 1, -1, 7, 8, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32, 2**61, 3 * 2**60, 2**63 - 1, -(2**63)]


class Hang(BaseException):
    """A case took longer than a few seconds."""


# The truth


def stored_documents(index: bytes, tokens: bytes) -> list[np.ndarray] | None:
    """The documents of a data set, one by one as its index describes them. None if the index is inconsistent."""
    if len(index) < HEADER:
        return None
    magic, version, code, n, marks = struct.unpack_from("<9sQBQQ", index)
    if (magic, version) != (b"MMIDIDX\0\0", 1) or code not in TYPES or len(index) != HEADER + 12 * n + 8 * marks:
        return None
    dtype, documents, end = np.dtype(TYPES[code]), [], 0
    for i in range(n):
        (size,) = struct.unpack_from("<i", index, HEADER + 4 * i)
        (start,) = struct.unpack_from("<q", index, HEADER + 4 * n + 8 * i)
        if size < 0 or start != end:
            return None
        end = start + size * dtype.itemsize
        documents.append(np.frombuffer(tokens[start:end].ljust(end - start, b"?"), dtype))
    return documents if end == len(tokens) else None


def true_rows(documents: list[np.ndarray]) -> list[bytes]:
    """The rows of these documents in the published order, from its definition; the last one is never served."""
    count = sum(map(len, documents))
    epochs = next(e for e in range(1, 10**6) if (e * count - 1) // SEQ_LEN >= SAMPLES)
    rng, stream = np.random.RandomState(SEED), []
    order = np.array([*range(len(documents))] * epochs, np.int32)
    rng.shuffle(order)
    for document in order:
        stream += documents[document].tolist()
    rows = np.arange((len(stream) - 1) // SEQ_LEN)
    rng.shuffle(rows)
    dtype = documents[0].dtype
    return [np.array(stream[row * SEQ_LEN :][: SEQ_LEN + 1], dtype).tobytes() for row in rows]


# Data sets


@dataclass
class DataSet:
    """A data set on disk, and how it was before a case changed it."""

    path: Path  # --data
    prefix: Path
    files: dict[Path, bytes]
    documents: int
    rows: list[bytes]
    fingerprint: dict  # what run.json says of it

    @property
    def index(self) -> Path:
        return Path(f"{self.prefix}.idx")

    def restore(self) -> None:
        """Put the files back, and remove what a case or the reader has left."""
        for path in self.prefix.parent.iterdir():
            if path not in self.files or not path.is_file() or path.is_symlink():
                remove(path)
        for path, content in self.files.items():
            path.write_bytes(content)


def open_rows(path: Path) -> data.Rows:
    return data.open_rows(path, SAMPLES, SEQ_LEN, SEED)


def make(folder: Path, name: str, rng: np.random.Generator) -> DataSet:
    folder = folder / name
    folder.mkdir()
    prefix, sizes = folder / "text", (0, 1, 7, 0, 30, 2, 64, 1, 0)
    path, dtype, code = prefix, "<u2", 8
    if name == "int32":
        dtype, code = "<i4", 4
    if name == "shuffled":
        path, prefix, sizes = folder, folder / "document", [SEQ_LEN + 1] * 20
    documents = [rng.integers(0, 50304, size) for size in sizes]
    write_data(prefix, documents, dtype, code, marks=[0] if name == "shuffled" else None)
    if name == "shards":
        cut_into_shards(prefix, [41, 90, 151])
    files = {p: p.read_bytes() for p in sorted(folder.iterdir())}
    rows = open_rows(path)
    fingerprint = json.loads(json.dumps(data.fingerprint(rows)))
    return DataSet(path, prefix, files, len(documents), [rows[i].tobytes() for i in range(len(rows))], fingerprint)


@pytest.fixture(scope="module")
def data_sets() -> Iterator[list[DataSet]]:
    with folder_in_memory() as folder:
        rng = np.random.default_rng(4)
        yield [make(folder, name, rng) for name in ("uint16", "int32", "shards", "shuffled")]


# Damage


def flip(raw: bytes, rng: random.Random, first: int = 0, last: int | None = None) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(first, last or len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def resize(raw: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return raw[: rng.randrange(len(raw))]
    return raw + rng.choice([rng.randbytes(rng.randint(1, 40)), bytes(rng.randint(1, 5000)), raw])


def set_field(raw: bytes, n: int, rng: random.Random) -> bytes:
    """Write an extreme number into a field of the header, a size, a position or a mark."""
    pointer, mark = HEADER + 4 * n + 8 * rng.randrange(n), HEADER + 12 * n
    at, width = rng.choice(
        [(9, 8), (17, 1), (18, 8), (26, 8), (HEADER + 4 * rng.randrange(n), 4), (pointer, 8), (mark, 8)]
    )
    value = rng.choice([*EXTREMES, n - 1, n + 1]) % 2 ** (8 * width)
    return raw[:at] + value.to_bytes(width, "little") + raw[at + width :]


def set_counts(raw: bytes, n: int, rng: random.Random) -> bytes:
    """Other counts for which the length of the file still fits: 12 dn + 8 dm = 0."""
    marks, change = struct.unpack_from("<Q", raw, 26)[0], 2 * rng.randint(-(n // 2), n)
    return raw[:18] + struct.pack("<QQ", (n + change) % 2**64, (marks - change * 3 // 2) % 2**64) + raw[HEADER:]


def swap_arrays(raw: bytes, n: int, rng: random.Random) -> bytes:
    """Sizes, positions and marks in another order, or two pieces of the file exchanged."""
    sizes, pointers, marks = raw[HEADER:][: 4 * n], raw[HEADER + 4 * n :][: 8 * n], raw[HEADER + 12 * n :]
    if rng.random() < 0.5:
        return raw[:HEADER] + b"".join(rng.sample([sizes, pointers, marks], 3))
    a, b = sorted(rng.sample(range(HEADER, len(raw) - 7), 2))
    return raw[:a] + raw[b : b + 8] + raw[a + 8 : b] + raw[a : a + 8] + raw[b + 8 :] if b >= a + 8 else raw[::-1]


def move_border(raw: bytes, n: int, rng: random.Random) -> bytes:
    """Two neighbouring sizes with the same sum, with or without the position between them: other documents."""
    i, change, raw = rng.randrange(n - 1), rng.randint(-9, 9), bytearray(raw)
    sizes = struct.unpack_from("<2i", raw, HEADER + 4 * i)
    struct.pack_into("<2i", raw, HEADER + 4 * i, sizes[0] + change, sizes[1] - change)
    if rng.random() < 0.7:
        at, width = HEADER + 4 * n + 8 * (i + 1), np.dtype(TYPES.get(raw[17], "u1")).itemsize
        struct.pack_into("<q", raw, at, struct.unpack_from("<q", raw, at)[0] + change * width)
    return bytes(raw)


def big_endian(raw: bytes, n: int, rng: random.Random) -> bytes:
    header = struct.pack(">9sQBQQ", *struct.unpack_from("<9sQBQQ", raw))
    arrays = np.frombuffer(raw[HEADER:][: 4 * n], "<i4").byteswap().tobytes()
    return header + arrays + np.frombuffer(raw[HEADER + 4 * n :], "<i8").byteswap().tobytes()


def damage_cache(s: DataSet, rng: random.Random) -> None:
    """The stored order, as another user or a failing disk could leave it."""
    open_rows(s.path)
    for cache in s.prefix.parent.glob("*.order-*"):
        name = rng.choice(["doc_idx", "sample_idx", "shuffle_idx"])
        path = cache / f"{name}.npy"
        if rng.random() < 0.5:
            path = rng.choice([path, cache / "order.json"])
            change = rng.choice([flip, resize])
            path.write_bytes(change(path.read_bytes(), rng))
            return
        array = np.load(path)  # a consistent lie: other values, and a description with their checksums
        lies = [np.zeros_like(array), array - 1, array[::-1].copy(), array.astype(np.float64), array[:-1], array[None]]
        lies += [np.zeros(len(array), np.uint32), np.full_like(array, 2**31 - 1), array.astype(np.int64)]
        np.save(path, rng.choice(lies))
        stored = json.loads((cache / "order.json").read_text())
        if "arrays" in stored:
            stored["arrays"][name] = describe(np.load(path))
        (cache / "order.json").write_text(json.dumps(stored))


def damage(s: DataSet, rng: random.Random) -> str:
    """Damage the files. Returns what was done."""
    n, index = s.documents, s.files[s.index]
    of_index = [set_field, set_counts, swap_arrays, move_border, big_endian]
    kind = rng.choices(["flip", "header", "resize", "fields", "tokens", "replace", "cache"], [20, 15, 12, 40, 8, 2, 3])[
        0
    ]
    if kind == "flip":
        s.index.write_bytes(flip(index, rng))
    elif kind == "header":
        s.index.write_bytes(flip(index, rng, 0, HEADER))
    elif kind == "resize":
        path = rng.choice([*s.files])
        path.write_bytes(resize(s.files[path] or b"?", rng))
    elif kind == "fields":
        change = rng.choice(of_index)
        kind, index = change.__name__, change(index, n, rng)
        s.index.write_bytes(index)
        if rng.random() < 0.1:
            s.index.write_bytes(flip(index, rng))
    elif kind == "tokens":
        path = rng.choice([path for path, content in s.files.items() if path != s.index and content])
        path.write_bytes(flip(s.files[path], rng))
    elif kind == "replace":
        replace(rng.choice([*s.files]), rng.choice(REPLACEMENTS))
    else:
        damage_cache(s, rng)
    return kind


# One case


def outcome(s: DataSet) -> tuple[str, str]:
    """What the reader makes of the files as they are: an outcome of Tally, and why."""
    try:
        rows = open_rows(s.path)
        served = [rows[i].tobytes() for i in range(len(rows))]
        noticed = bool(data.fingerprint_differences(s.fingerprint, data.fingerprint(rows)))
    except UserError as error:
        line = str(error)
        one_line = line.isprintable() and str(s.prefix.parent) in line
        return ("refused", line) if one_line else ("wrong", f"refused with {line!r}")
    except Exception as error:
        return "tracebacks", repr(error)
    tokens = b"".join(path.read_bytes() for path in sorted(s.prefix.parent.glob("*.bin")))
    documents = stored_documents(s.index.read_bytes(), tokens)
    if documents is None:
        return "wrong", "an inconsistent index is accepted"
    truth = [document.tobytes() for document in documents] if s.path != s.prefix else true_rows(documents)
    if served != (truth if s.path != s.prefix else truth[:-1]):
        # A new run cannot know a stored shuffle, with checksums that fit, from the published one.
        reordered = len(served) == len(truth) - 1 and not Counter(served) - Counter(truth)
        return ("harmless", "") if noticed and reordered else ("wrong", "rows differ from what is stored")
    if served != s.rows and not noticed:
        return "wrong", "other rows, and a run that was started before does not notice"
    return "harmless", ""


def campaign(data_sets: list[DataSet], cases: int, seed: int, part: str) -> Tally:
    def hang(*args) -> None:
        raise Hang

    tally, limits = Tally(part), resource.getrlimit(resource.RLIMIT_AS)
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, hang)
    resource.setrlimit(resource.RLIMIT_AS, (memory + 2**30, limits[1]))  # a case that takes all memory ends in an error
    try:
        for case in range(cases):
            s, rng = data_sets[case % len(data_sets)], random.Random(f"{seed} {case}")
            kind = damage(s, rng)
            try:
                signal.setitimer(signal.ITIMER_REAL, 5)
                found, why = outcome(s)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Hang:
                found, why = "hangs", ""
            tally.add(found, f"case {case}, {s.path.name}, {kind}: {why}")
            s.restore()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return tally


@pytest.mark.parametrize("cases", [1000, pytest.param(scaled(CASES), marks=pytest.mark.slow)])
def test_damaged_data_sets(cases, data_sets):
    tally = campaign(data_sets, cases, 1, "data sets")
    tally.check()
    assert tally.counts["harmless"] > cases / 100


# The harness finds what it is meant to find.


def test_the_truth_equals_the_undamaged_reader(data_sets):
    for s in data_sets:
        assert outcome(s) == ("harmless", "")
        assert len(s.rows) >= SAMPLES


def test_a_reader_that_does_not_check_positions_is_caught(data_sets, monkeypatch):
    monkeypatch.setattr(IndexedTokens, "_check_positions", lambda *_: None)
    assert campaign(data_sets, 300, 2, "broken").counts["wrong"] > 0


def test_a_reader_of_wrong_tokens_is_caught(data_sets, monkeypatch):
    """Once in a while it serves the row before."""
    read = Order.__getitem__
    monkeypatch.setattr(Order, "__getitem__", lambda self, i: read(self, i - (i == 5)))
    assert campaign(data_sets, 300, 2, "broken").counts["wrong"] > 0


def test_a_run_that_does_not_compare_tokens_is_caught(data_sets, monkeypatch):
    monkeypatch.setattr(data, "fingerprint_differences", lambda *args: [])
    assert campaign(data_sets, 300, 3, "broken").counts["wrong"] > 0
