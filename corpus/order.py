"""The published order: the index maps of GPT-NeoX v1.0, and the rows that they select."""

import errno
import hashlib
import json
import operator
import os
import shutil
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from corpus.indexed import DataFile, IndexedTokens, StoredArray, block_slices, open_npy, sha256
from runtime.errors import UserError, printable
from runtime.files import atomic_write

MAPS = ("doc_idx", "sample_idx", "shuffle_idx")
Map = np.ndarray | StoredArray  # both give rows as array[a:b]
TICK = 100_000_000  # nanoseconds; the times of files have ticks of up to 10 ms

# ---- the maps --------------------------------------------------------------------------------------------------------


def layout(documents: int, tokens: int, epochs: int, seq_len: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return the dtype and shape of every map (see index_maps), for the number of documents and tokens of one epoch."""
    rows = (epochs * tokens - 1) // seq_len
    # int64 where later versions of GPT-NeoX have it: v1.0 fails beyond 2^31 entries.
    sample_dtype = np.dtype(np.int32 if 2 * (rows + 1) < 2**31 - 1 else np.int64)
    shuffle_dtype = np.dtype(np.uint32 if rows < 2**32 - 2 else np.int64)
    shapes = (np.dtype(np.int32), (epochs * documents,)), (sample_dtype, (rows + 1, 2)), (shuffle_dtype, (rows,))
    return dict(zip(MAPS, shapes))


def index_maps(sizes: np.ndarray, epochs: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """Compute the three maps of GPT-NeoX v1.0 from the document sizes [documents], whose sum is T tokens.

    doc_idx      [epochs * documents]  int32   the documents of all epochs, shuffled once and together
    sample_idx   [N + 1, 2]            int32   where each row of the stream starts: (index in doc_idx, offset in tokens)
    shuffle_idx  [N]                   uint32  row as served -> row of the stream;    N = (epochs * T - 1) // seq_len
    """
    rng = np.random.RandomState(seed)  # the legacy generator: its shuffle defines the published order
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)
    dtypes = layout(len(sizes), int(sizes.sum(dtype=np.int64)), epochs, seq_len)
    sample_dtype, sample_shape = dtypes["sample_idx"]
    sample_idx = np.empty(sample_shape, sample_dtype)
    for rows, starts in cut_stream(sizes, doc_idx, len(sample_idx), seq_len):
        sample_idx[rows] = starts
    shuffle_idx = np.arange(len(sample_idx) - 1, dtype=dtypes["shuffle_idx"][0])
    rng.shuffle(shuffle_idx)
    return dict(zip(MAPS, (doc_idx, sample_idx, shuffle_idx)))


def cut_stream(sizes: np.ndarray, doc_idx: Map, count: int, seq_len: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield sample_idx in blocks: (which entries of `count`, their values [entries, 2] int64).

    NeoX builds sample_idx in a loop over all tokens; a cumulative sum and a search give the same. Row k starts at token
    k * seq_len of the stream, which lies in the first document that ends after it. So empty documents are skipped, and
    a row that starts where a document ends starts in the next one. Only row 0 starts at (0, 0) in any case.
    """
    begin = 0  # token of the stream at which this block of documents starts
    for block in block_slices(len(doc_idx), "cutting the stream into rows"):
        lengths = sizes[doc_idx[block]].astype(np.int64)
        ends = begin + np.cumsum(lengths)
        first, stop = -(-begin // seq_len), min(count, (int(ends[-1]) - 1) // seq_len + 1)  # the rows that start here
        for part in range(first, stop, 1 << 20):
            rows = slice(part, min(part + (1 << 20), stop))
            tokens = np.arange(rows.start, rows.stop) * seq_len
            document = np.searchsorted(ends, tokens, side="right")  # of this block
            starts = np.stack([block.start + document, tokens - (ends[document] - lengths[document])], axis=1)
            if part == 0:
                starts[0] = 0
            yield rows, starts
        begin = int(ends[-1])


def check_maps(maps: dict[str, Map], data: IndexedTokens, epochs: int, seq_len: int) -> None:
    """Raise ValueError unless the maps serve every document `epochs` times, cut into rows, each row once.

    Another shuffle than the published one is not found. It has another sha256, which a run records.
    """
    for name, (dtype, shape) in layout(data.documents, data.tokens, epochs, seq_len).items():
        if (maps[name].dtype, maps[name].shape) != (dtype, shape):
            raise ValueError(f"{name} is {maps[name].dtype} {maps[name].shape}, not {dtype} {shape}")
    check_counts(maps["doc_idx"], data.documents, epochs, "doc_idx does not hold every document once per epoch")
    check_counts(maps["shuffle_idx"], len(maps["shuffle_idx"]), 1, "shuffle_idx does not hold every row once")
    sample_idx, sizes = maps["sample_idx"], np.asarray(data.sizes)
    for rows, starts in cut_stream(sizes, maps["doc_idx"], len(sample_idx), seq_len):
        if (sample_idx[rows] != starts).any():
            raise ValueError("sample_idx does not cut the documents into rows")


def check_counts(array: Map, values: int, times: int, problem: str) -> None:
    """Raise ValueError unless an array holds each of 0 .. values - 1 exactly `times` times."""
    left = np.full(values, times, np.uint8 if times == 1 else np.int32)
    for block in block_slices(len(array), "checking the order"):
        numbers = array[block]
        if numbers.min() < 0 or numbers.max() >= values:
            raise ValueError(problem)
        if times == 1:
            left[numbers] = 0  # the array has as many entries as values, so none is missing if none is left
        else:
            np.subtract.at(left, numbers, 1)
    if left.any():
        raise ValueError(problem)


def epochs_for(samples: int, seq_len: int, tokens: int) -> int:
    """The smallest number of epochs that has `samples` rows. The last token of a row is the first of the next one."""
    return -(-(samples * seq_len + 1) // tokens)


# ---- the cache -------------------------------------------------------------------------------------------------------


def describe(array: Map) -> dict:
    digest = sha256(array[block] for block in block_slices(len(array), "hashing the order"))
    return {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": digest}


def load_maps(cache: Path, request: dict, data: IndexedTokens) -> tuple[dict[str, Map], dict] | None:
    """Return the maps and their descriptions, or None. Deletes a cache that does not fit the request.

    The maps are checked once, when they are first seen on this machine. Afterwards a stamp in the cache tells that
    these files have been checked.
    """
    try:
        if not cache.exists():
            return None
        facts = DataFile(cache / "order.json")
        if facts.bytes > 1 << 16:
            raise ValueError("order.json is too large")
        stored = json.loads(facts.read(0, facts.bytes))
        if stored["facts"] != request:
            raise ValueError("built from other data or by another version")
        arrays = {name: stored["arrays"][name] for name in MAPS}
        maps = {name: open_npy(cache / f"{name}.npy") for name in MAPS}
        files = [facts, *(maps[name].file for name in MAPS)]
        if not is_stamped(cache, files):
            for name in MAPS:
                if describe(maps[name]) != arrays[name]:
                    raise ValueError(f"{name}.npy has changed since it was written")
            check_maps(maps, data, request["epochs"], request["seq_len"])
            stamp(cache, files)
        return maps, arrays
    except Exception as error:  # whatever is wrong with a cache, building it again repairs it
        note = printable(f"note: {cache}: unusable ({error}); building the order again")
        print(note, file=sys.stderr)
        shutil.rmtree(cache, ignore_errors=True)
        return None


def identity(status: os.stat_result) -> list[int]:
    """What changes when a file is written or replaced. The owner of a file cannot set its ctime."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def is_stamped(cache: Path, files: list[DataFile]) -> bool:
    """Return whether `stamp` was called for exactly these files, by this user or root."""
    try:
        mark = DataFile(cache / "checked.json")
        return (
            mark.bytes < 1 << 16
            and all(file.status.st_uid in (0, os.geteuid()) for file in files)
            and is_current(mark, json.loads(mark.read(0, mark.bytes)), files)
        )
    except (UserError, ValueError):
        return False


def is_current(mark: DataFile, identities: object, files: list[DataFile]) -> bool:
    """Return whether this user or root wrote `mark`, which has these identities, when the files were as they are now.

    A file system's clock has ticks. A file could change within the tick in which the mark was written and keep its
    times. So a mark counts only for files that were older than it.
    """
    return (
        identities == [identity(file.status) for file in files]
        and mark.status.st_uid in (0, os.geteuid())
        and max(file.status.st_ctime_ns for file in files) + TICK < mark.status.st_mtime_ns
    )


def stamp(cache: Path, files: list[DataFile]) -> None:
    """Record that these files of the cache have been checked; not where it cannot be written."""
    try:
        with atomic_write(cache / "checked.json", "w") as file:
            json.dump([identity(file.status) for file in files], file)
    except OSError:
        pass


def save_maps(
    cache: Path, request: dict, maps: dict[str, np.ndarray], data: IndexedTokens
) -> tuple[dict[str, Map], dict]:
    """Write the cache under a temporary name and rename it, so that it is complete or absent. Returns the same as
    load_maps; the maps stay in memory if the cache cannot be written."""
    arrays = {name: describe(array) for name, array in maps.items()}
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        for name, array in maps.items():
            np.save(temporary / f"{name}.npy", array, allow_pickle=False)
        (temporary / "order.json").write_text(json.dumps({"facts": request, "arrays": arrays}, indent=1))
        temporary.rename(cache)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these two: another process has written the same maps
            note = printable(f"note: {cache} cannot be written ({error.strerror}); the order stays in memory")
            print(note, file=sys.stderr)
            return maps, arrays
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_maps(cache, request, data) or (maps, arrays)


def as_array(map: Map) -> np.ndarray:
    """Return a map as an array, memory-mapped if it is in a file."""
    return map if isinstance(map, np.ndarray) else map.map()


# ---- the rows --------------------------------------------------------------------------------------------------------


class Order:
    """The rows of PREFIX in the published order, with enough epochs for `samples` rows.

    order[i] is row i as served: [seq_len + 1] tokens in the dtype of the data (Pythia: uint16). As published, the last
    entry of shuffle_idx is never served. `samples` matters only through the number of epochs, the smallest that has
    enough rows. Raises UserError for an impossible request.

    The maps are stored beside the data, in PREFIX.order-*/, and read from there if they are right. order.doc_idx,
    .sample_idx and .shuffle_idx are for users: rows are read from the files without them.
    """

    def __init__(self, prefix: str | Path | IndexedTokens, samples: int, seq_len: int = 2048, seed: int = 1234):
        if samples < 1:
            raise UserError(f"an order of {samples} samples; ask for at least 1")
        if seq_len < 1:
            raise UserError(f"--seq-len {seq_len} must be at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed} must be within 0 .. 4294967295")
        self.data = data = prefix if isinstance(prefix, IndexedTokens) else IndexedTokens(prefix)
        self.seq_len = seq_len
        index, tokens, documents = data.index_file, data.tokens, data.documents
        if tokens <= seq_len:
            raise UserError(f"{index}: {tokens} tokens make no row of {seq_len + 1}; add text or lower --seq-len")
        if data.marks == 1 and all((sizes == seq_len + 1).all() for sizes in data.sizes.blocks("looking for rows")):
            raise UserError(f"{index}: rows shuffled already; give the directory of document.idx as --data")
        self.epochs = epochs = epochs_for(samples, seq_len, tokens)
        if epochs * documents > 2**31 - 1:
            raise UserError(f"{index}: {epochs} epochs of {documents} documents are more than 2^31; lower --steps")

        digest = data.index_sha256
        request = {"format": 1, "index_sha256": digest, "epochs": epochs, "seq_len": seq_len, "seed": seed}
        cache = Path(f"{data.prefix}.order-{epochs}epochs-{seq_len}len-{seed}seed-{digest[:12]}")
        loaded = load_maps(cache, request, data)
        if loaded is None:
            if (rows := epochs * tokens // seq_len) > 10_000_000:
                note = printable(f"note: building the order of {rows:,} rows, only this time: {cache}")
                print(note, file=sys.stderr)
            try:
                maps = index_maps(np.asarray(data.sizes), epochs, seq_len, seed)
            except MemoryError:
                raise UserError(f"{index}: no memory for an order of {epochs} epochs; lower --steps") from None
            loaded = save_maps(cache, request, maps, data)
        maps, arrays = loaded
        self._maps = [maps[name] for name in MAPS]
        # A hash of three hashes, because hashing the maps again would read them again.
        self.sha256 = hashlib.sha256(b"".join(bytes.fromhex(arrays[name]["sha256"]) for name in MAPS)).hexdigest()

    doc_idx = cached_property(lambda self: as_array(self._maps[0]))
    sample_idx = cached_property(lambda self: as_array(self._maps[1]))
    shuffle_idx = cached_property(lambda self: as_array(self._maps[2]))

    def __len__(self) -> int:
        return len(self._maps[2]) - 1

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """Return the pieces of documents that row i consists of: [(document, offset in tokens, number of tokens)]."""
        return [(document, offset, count) for document, offset, count, _ in self._pieces(i)]

    def __getitem__(self, i: int) -> np.ndarray:
        row = self.data.join((position, count) for _, _, count, position in self._pieces(i))
        if len(row) != self.seq_len + 1:
            raise UserError(
                f"{self.data.index_file}: row {i} has {len(row)} tokens; another program has changed the data"
            )
        return row

    def _pieces(self, i: int) -> list[tuple[int, int, int, int]]:
        """Return [(document, offset in it, number of tokens, position in the data)] of row i."""
        if not 0 <= i < len(self):  # negative indices do not count from the end
            raise IndexError(f"row {i} of {len(self)}")
        doc_idx, sample_idx, shuffle_idx = self._maps
        row = shuffle_idx[i : i + 1].item()
        (first, offset), (last, end) = sample_idx[row : row + 2].tolist()
        pieces = []
        for document in doc_idx[first : last + 1].tolist():
            begin, stop = self.data.span(document)
            pieces.append((document, offset, stop - begin - offset, begin + offset))
            offset = 0
        document, offset, _, position = pieces[-1]
        pieces[-1] = document, offset, end + 1 - offset, position  # + 1: the target of the last token
        return [piece for piece in pieces if piece[2] > 0]


class ShuffledRows:
    """The rows of a pre-shuffled directory: document.idx with document.bin or document-00000-of-000NN.bin, in place.

    rows[i] is [seq_len + 1] tokens; all rows are served. Raises UserError if a row has another length.
    """

    def __init__(self, directory: str | Path | IndexedTokens, seq_len: int = 2048):
        self.data = directory if isinstance(directory, IndexedTokens) else IndexedTokens(Path(directory) / "document")
        self.seq_len = seq_len
        for block in block_slices(self.data.documents, "checking rows"):
            sizes = self.data.sizes[block]
            if (wrong := sizes != seq_len + 1).any():
                k = wrong.argmax()
                problem = f"row {block.start + k} has {sizes[k]} tokens, not {seq_len + 1}; change --seq-len"
                raise UserError(f"{self.data.index_file}: {problem}")
        self.sha256 = self.data.index_sha256

    def __len__(self) -> int:
        return self.data.documents

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data.read(operator.index(i) * (self.seq_len + 1), self.seq_len + 1)


Rows = Order | ShuffledRows
