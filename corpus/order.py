"""The published order: the index maps of GPT-NeoX v1.0, and the rows that they select."""

import errno
import hashlib
import json
import operator
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NoReturn

import numpy as np

from corpus.edits import Edits
from corpus.indexed import (
    CHECKED_ONCE,
    TICK,
    DataFile,
    IndexedTokens,
    StoredArray,
    block_slices,
    open_npy,
    read_mark,
    sha256,
    write_mark,
)
from corpus.inverse import Inverse, as_json, sort_served
from runtime.errors import UserError, printable
from runtime.files import atomic_write, flush

MAPS = ("doc_idx", "sample_idx", "shuffle_idx")
Map = np.ndarray | StoredArray  # both give rows as array[a:b]
CHECKED = "checked.json"  # the mark in a cache

# ---- the maps --------------------------------------------------------------------------------------------------------


def layout(documents: int, tokens: int, epochs: int, seq_len: int) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return the dtype and shape of every map (see index_maps), for the number of documents and tokens of one epoch."""
    rows = (epochs * tokens - 1) // seq_len
    # int64 where later versions of GPT-NeoX have it: v1.0 fails beyond 2^31 entries.
    sample_dtype = np.dtype(np.int32 if 2 * (rows + 1) < 2**31 - 1 else np.int64)
    shuffle_dtype = np.dtype(np.uint32 if rows < 2**32 - 2 else np.int64)
    shapes = (np.dtype(np.int32), (epochs * documents,)), (sample_dtype, (rows + 1, 2)), (shuffle_dtype, (rows,))
    return dict(zip(MAPS, shapes))


def map_blocks(
    sizes: np.ndarray, tokens: int, epochs: int, seq_len: int, seed: int
) -> Iterator[tuple[str, slice, np.ndarray]]:
    """Compute the three maps of GPT-NeoX v1.0 from the document sizes [documents], whose sum is T = `tokens`.

    doc_idx      [epochs * documents]  int32   the documents of all epochs, shuffled once and together
    sample_idx   [N + 1, 2]            int32   where each row of the stream starts: (index in doc_idx, offset in tokens)
    shuffle_idx  [N]                   uint32  row as served -> row of the stream;    N = (epochs * T - 1) // seq_len

    Yields (name, which rows, their values), map after map, with at most a million rows at once.
    """
    types = layout(len(sizes), tokens, epochs, seq_len)
    rng = np.random.RandomState(seed)  # the legacy generator: its shuffle defines the published order

    def shuffled(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        rng.shuffle(values)  # of int64, which takes half the time of smaller types; the order is the same
        return values.astype(dtype)

    doc_idx = np.arange(epochs * len(sizes))
    doc_idx %= len(sizes)  # in place: for the Pile it has 1.7 GB
    doc_idx = shuffled(doc_idx, types["doc_idx"][0])
    yield from (("doc_idx", block, doc_idx[block]) for block in block_slices(len(doc_idx), "writing the order"))
    dtype, (count, _) = types["sample_idx"]
    for rows, starts in cut_stream(sizes, doc_idx, count, seq_len):
        yield "sample_idx", rows, starts.astype(dtype)
    del doc_idx
    shuffle_idx = shuffled(np.arange(count - 1), types["shuffle_idx"][0])
    for block in block_slices(len(shuffle_idx), "writing the order"):
        yield "shuffle_idx", block, shuffle_idx[block]


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


def describe(array: Map, label: str = "hashing the order") -> dict:
    digest = sha256(array[block] for block in block_slices(len(array), label))
    return {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": digest}


def load_maps(cache: Path, request: dict, data: IndexedTokens) -> tuple[dict[str, Map], dict] | None:
    """Return the maps and their descriptions, or None. Deletes a cache that does not fit the request.

    The maps are checked once, when they are first seen on this machine. Afterwards a mark in the cache tells that these
    files have been checked.
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
        if not is_checked(cache, files):
            for name in MAPS:
                if describe(maps[name]) != arrays[name]:
                    raise ValueError(f"{name}.npy has changed since it was written")
            check_maps(maps, data, request["epochs"], request["seq_len"])
            with suppress(OSError):
                write_mark(cache / CHECKED, files)
        return maps, arrays
    except Exception as error:  # whatever is wrong with a cache, building it again repairs it
        note = printable(f"note: {cache}: unusable ({error}); building the order again")
        print(note, file=sys.stderr)
        shutil.rmtree(cache, ignore_errors=True)
        return None


def is_checked(cache: Path, files: list[DataFile]) -> bool:
    """Return whether exactly these files have been checked, and whether this user or root owns them."""
    try:
        read_mark(cache / CHECKED, files)
    except (UserError, ValueError, RecursionError):
        return False
    return all(file.status.st_uid in (0, os.geteuid()) for file in files)


def build_maps(cache: Path, request: dict, data: IndexedTokens) -> tuple[dict[str, Map], dict]:
    """Compute the maps into a cache that is complete or absent. Returns the same as load_maps; the maps stay in memory
    if the cache cannot be written. Processes may do so at the same time: the first one wins."""
    temporary, sizes = cache.with_name(f"{cache.name}.{secrets.token_hex(8)}.tmp"), np.asarray(data.sizes)
    arguments = sizes, data.tokens, request["epochs"], request["seq_len"], request["seed"]
    shapes = layout(data.documents, *arguments[1:4])
    try:
        temporary.mkdir()
        arrays = write_maps(temporary, shapes, map_blocks(*arguments))
        with atomic_write(temporary / "order.json", "w") as file:
            json.dump({"facts": request, "arrays": arrays}, file, indent=1)
        if data.documents >= CHECKED_ONCE:  # otherwise the second start checks, which takes no time
            time.sleep(2 * TICK / 1e9)
            write_mark(
                temporary / CHECKED, [DataFile(temporary / n) for n in ("order.json", *map("{}.npy".format, MAPS))]
            )
        temporary.rename(cache)
        flush(cache.parent)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these two: another process has written the same maps
            note = printable(f"note: {cache} cannot be written ({error.strerror}); the order stays in memory")
            print(note, file=sys.stderr)
            return maps_in_memory(shapes, map_blocks(*arguments))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_maps(cache, request, data) or maps_in_memory(shapes, map_blocks(*arguments))


def write_maps(directory: Path, shapes: dict, blocks: Iterator[tuple[str, slice, np.ndarray]]) -> dict:
    """Write blocks, map after map, as .npy files, and hash them on their way. Returns the descriptions of the maps."""
    arrays = {}
    for name, part in groupby(blocks, lambda block: block[0]):
        digest, (dtype, shape) = hashlib.sha256(), shapes[name]
        head = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        with atomic_write(directory / f"{name}.npy") as file:
            np.lib.format.write_array_header_1_0(file, head)
            for _, _, values in part:
                digest.update(values)
                file.write(values)
        arrays[name] = {"dtype": dtype.str, "shape": [*shape], "sha256": digest.hexdigest()}
    return arrays


def maps_in_memory(shapes: dict, blocks: Iterator[tuple[str, slice, np.ndarray]]) -> tuple[dict[str, Map], dict]:
    maps = {name: np.empty(shape, dtype) for name, (dtype, shape) in shapes.items()}
    for name, rows, values in blocks:
        maps[name][rows] = values
    return maps, {name: describe(array) for name, array in maps.items()}


def as_array(map: Map) -> np.ndarray:
    """Return a map as an array, memory-mapped if it is in a file."""
    return map if isinstance(map, np.ndarray) else map.map()


def gather(map: Map, starts: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
    """Return entries start .. start + count - 1 of a map for every start, one after the other, as int64."""
    if isinstance(map, np.ndarray):
        counts = np.broadcast_to(counts, starts.shape)
        firsts = np.cumsum(counts) - counts
        return map[np.repeat(starts - firsts, counts) + np.arange(counts.sum())].astype(np.int64)
    return map.gather(starts, counts).astype(np.int64)


# ---- the rows --------------------------------------------------------------------------------------------------------


class Served:
    """Rows as served: what `_take` of a subclass reads, then the edits."""

    edits: Edits | None = None

    def __getitem__(self, i: int) -> np.ndarray:
        return self.take(np.array([operator.index(i)]))[0]

    def take(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows [n] as served: [n, seq_len + 1]. Raises UserError if the edits do not fit them."""
        tokens = self._take(numbers)
        if self.edits:
            self.edits.apply(numbers, tokens)
        return tokens

    def weights(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the weights of the losses of rows [n], float32 [n, seq_len], or None if all are 1."""
        return self.edits.weights(numbers) if self.edits else None


class Order(Served):
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
        if data.marks == 1 and data.shortest == data.longest == seq_len + 1:
            raise UserError(f"{index}: rows shuffled already; give the directory of document.idx as --data")
        self.epochs = epochs = epochs_for(samples, seq_len, tokens)
        if epochs * documents > 2**31 - 1:
            raise UserError(f"{index}: {epochs} epochs of {documents} documents are more than 2^31; lower --steps")

        digest = data.index_sha256
        request = {"format": 1, "index_sha256": digest, "epochs": epochs, "seq_len": seq_len, "seed": seed}
        self.cache = cache = Path(f"{data.prefix}.order-{epochs}epochs-{seq_len}len-{seed}seed-{digest[:12]}")
        loaded = load_maps(cache, request, data)
        if loaded is None:
            if (rows := epochs * tokens // seq_len) > 10_000_000:
                note = printable(f"note: building the order of {rows:,} rows, only this time: {cache}")
                print(note, file=sys.stderr)
            try:
                loaded = build_maps(cache, request, data)
            except MemoryError:
                raise UserError(f"{index}: no memory for an order of {epochs} epochs; lower --steps") from None
        maps, arrays = loaded
        self._maps, self._described = [maps[name] for name in MAPS], arrays
        # A hash of three hashes, because hashing the maps again would read them again.
        self.sha256 = hashlib.sha256(b"".join(bytes.fromhex(arrays[name]["sha256"]) for name in MAPS)).hexdigest()

    doc_idx = cached_property(lambda self: as_array(self._maps[0]))
    sample_idx = cached_property(lambda self: as_array(self._maps[1]))
    shuffle_idx = cached_property(lambda self: as_array(self._maps[2]))
    inverse = cached_property(
        lambda self: Inverse(self.doc_idx, self.sample_idx, self.shuffle_idx, self.data, self.seq_len, self.cache)
    )

    def __len__(self) -> int:
        return len(self._maps[2]) - 1

    def verify(self, label: str = "") -> None:
        """Read the index and the maps, and raise UserError if one is not as it was when it was checked."""
        self.data.verify_index(label)
        for name, array in zip(MAPS, self._maps):
            if isinstance(array, StoredArray) and describe(array, label) != self._described[name]:
                raise UserError(
                    f"{array.file.path} is not as it was when it was checked: remove {array.file.path.parent}"
                )

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """Return the pieces of documents that row i consists of: [(document, offset in tokens, number of tokens)]."""
        _, documents, offsets, counts, _ = self._pieces(np.array([i]))
        return list(zip(documents.tolist(), offsets.tolist(), counts.tolist()))

    def find(
        self, document: int, batch_size: int = 1024, steps: int | None = None, unserved: bool = False
    ) -> list[dict]:
        """Return the pieces of a document in the rows, as `data.py find --json` prints them, in the order of training.

        steps is the length of the run, None for as many as the order has. unserved=True adds the pieces that such a
        run never serves. Raises UserError if there is no such document.
        """
        rows = served_rows(self, batch_size, steps)
        pieces = sort_served(self.document_pieces(document), rows)
        return [piece for piece in as_json(pieces, batch_size, rows) if unserved or piece["step"] is not None]

    def document_pieces(self, document: int) -> np.ndarray:
        """Return the pieces (inverse.PIECE) of all copies of a document. Raises UserError if there is none."""
        if not 0 <= document < self.data.documents:
            raise UserError(f"document {document}: the data has the documents 0 .. {self.data.documents - 1}")
        (places,) = self.inverse.places(np.array([document]))
        begin, end = self.data.span(document)
        return self.inverse.pieces(places, np.zeros_like(places), np.full_like(places, end - begin))

    def _take(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows [n] without edits: [n, seq_len + 1]."""
        rows, _, _, counts, positions = self._pieces(numbers)
        lengths = np.bincount(rows, counts, len(numbers))
        if (wrong := lengths != self.seq_len + 1).any():
            k = wrong.argmax()
            problem = f"row {numbers[k]} has {lengths[k]:.0f} tokens; another program has changed the data"
            raise UserError(f"{self.data.index_file}: {problem}")
        return self.data.gather(positions, counts).reshape(len(numbers), -1)

    def _pieces(self, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the pieces of documents that rows consist of, as five int64 arrays: the index in `numbers` of their
        row, the document, the offset in it, the number of tokens, the position in the data."""
        if (wrong := (numbers < 0) | (numbers >= len(self))).any():  # negative numbers do not count from the end
            raise IndexError(f"row {numbers[wrong.argmax()]} of {len(self)}")
        doc_idx, sample_idx, shuffle_idx = self._maps
        bounds = gather(sample_idx, gather(shuffle_idx, numbers, 1), 2).reshape(-1, 2, 2)
        (first, begin), (last, end) = bounds[:, 0].T, bounds[:, 1].T  # [n] each
        lengths = last - first + 1  # in pieces
        documents = gather(doc_idx, first, lengths)
        begins, ends = self.data.spans(documents)
        offsets, lasts = np.zeros_like(begins), np.cumsum(lengths) - 1
        offsets[lasts - lengths + 1] = begin
        counts = ends - begins - offsets
        counts[lasts] = end + 1 - offsets[lasts]  # + 1: the target of the last token
        pieces = np.repeat(np.arange(len(numbers)), lengths), documents, offsets, counts, begins + offsets
        return tuple(x[counts > 0] for x in pieces)


class ShuffledRows(Served):
    """The rows of a pre-shuffled directory: document.idx with document.bin or document-00000-of-000NN.bin, in place.

    rows[i] is [seq_len + 1] tokens; all rows are served. Raises UserError if a row has another length.
    """

    def __init__(self, directory: str | Path | IndexedTokens, seq_len: int = 2048):
        self.data = directory if isinstance(directory, IndexedTokens) else IndexedTokens(Path(directory) / "document")
        self.seq_len = seq_len
        if self.data.documents and not self.data.shortest == self.data.longest == seq_len + 1:
            for block in block_slices(self.data.documents, "checking rows"):
                sizes = self.data.sizes[block]
                if (wrong := sizes != seq_len + 1).any():
                    k = wrong.argmax()
                    problem = f"row {block.start + k} has {sizes[k]} tokens, not {seq_len + 1}; change --seq-len"
                    raise UserError(f"{self.data.index_file}: {problem}")
        self.sha256 = self.data.index_sha256

    def __len__(self) -> int:
        return self.data.documents

    def verify(self, label: str = "") -> None:
        """Read the index, and raise UserError if it is not as it was when it was checked."""
        self.data.verify_index(label)

    def find(self, document: int, *_, **__) -> NoReturn:
        """Raise UserError: the rows are stored without the documents that they were made of."""
        raise UserError(
            f"{self.data.prefix}: pre-shuffled rows do not say which documents they were made of; --text and --tokens"
            " search them. --document needs the documents: `python data.py fetch standard-documents`"
        )

    document_pieces = find

    def _take(self, numbers: np.ndarray) -> np.ndarray:
        """Return rows [n] without edits: [n, seq_len + 1]."""
        width = self.seq_len + 1
        return self.data.gather(numbers * width, np.full(len(numbers), width)).reshape(-1, width)


Rows = Order | ShuffledRows


def row_digests(batch: np.ndarray) -> np.ndarray:
    """Return the sha256 of every row of [..., seq_len + 1] tokens, as stored (little-endian): uint8 [..., 32]."""
    rows = batch.astype(batch.dtype.newbyteorder("<"), copy=False).reshape(-1, batch.shape[-1])
    digests = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
    return np.frombuffer(digests, dtype=np.uint8).reshape(*batch.shape[:-1], 32).copy()


def digest(row_digests: np.ndarray) -> str:
    """Return the hex sha256 of a batch, from its row digests, so that each rank hashes only its own rows."""
    return hashlib.sha256(row_digests.tobytes()).hexdigest()


def served_rows(rows: Rows, batch_size: int, steps: int | None = None) -> int:
    """Return how many rows a run of `steps` steps serves; at most whole steps of those that there are."""
    most = len(rows) // batch_size
    return batch_size * (most if steps is None else min(steps, most))
