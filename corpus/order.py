"""The published order: the index maps of GPT-NeoX v1.0, and the rows that they select."""

import errno
import hashlib
import json
import operator
import os
import shutil
import sys
from pathlib import Path

import numpy as np

from corpus.indexed import IndexedTokens, block_slices, sha256
from runtime.errors import UserError

MAPS = ("doc_idx", "sample_idx", "shuffle_idx")


def index_maps(sizes: np.ndarray, epochs: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """Compute the three maps of GPT-NeoX v1.0 from the document sizes [documents], whose sum is T tokens.

    doc_idx      [epochs * documents]  int32   the documents of all epochs, shuffled once and together
    sample_idx   [N + 1, 2]            int32   where each row of the stream starts: (index in doc_idx, offset in tokens)
    shuffle_idx  [N]                   uint32  row as served -> row of the stream;    N = (epochs * T - 1) // seq_len

    NeoX builds sample_idx in a loop over all tokens; a cumulative sum and a search give the same. Row k starts at token
    k * seq_len of the stream, which lies in the first document that ends after it. So empty documents are skipped, and
    a row that starts where a document ends starts in the next one. Only row 0 starts at (0, 0) in any case.
    """
    rng = np.random.RandomState(seed)  # the legacy generator: its shuffle defines the published order
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)

    rows = (epochs * int(sizes.sum(dtype=np.int64)) - 1) // seq_len
    # int64 where later versions of GPT-NeoX have it: v1.0 fails beyond 2^31 entries.
    sample_idx = np.zeros((rows + 1, 2), np.int32 if 2 * (rows + 1) < 2**31 - 1 else np.int64)
    begin = 0  # token of the stream at which this block of documents starts
    for block in block_slices(len(doc_idx), "cutting the stream into rows"):
        lengths = sizes[doc_idx[block]].astype(np.int64)
        ends = begin + np.cumsum(lengths)
        first, stop = -(-begin // seq_len), min(rows, (int(ends[-1]) - 1) // seq_len) + 1  # the rows that start here
        starts = np.arange(first, stop) * seq_len
        document = np.searchsorted(ends, starts, side="right")  # of this block
        sample_idx[first:stop, 0] = block.start + document
        sample_idx[first:stop, 1] = starts - (ends[document] - lengths[document])
        begin = int(ends[-1])
    sample_idx[0] = 0

    shuffle_idx = np.arange(rows, dtype=np.uint32 if rows < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return dict(zip(MAPS, (doc_idx, sample_idx, shuffle_idx)))


def describe(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": sha256([array], "hashing the order")}


def load_maps(cache: Path, request: dict) -> tuple[dict[str, np.ndarray], dict] | None:
    """Return the memory-mapped maps and their descriptions, or None. Deletes a cache that does not fit the request."""
    try:
        if not cache.exists():
            return None
        stored = json.loads((cache / "order.json").read_text())
        if stored["facts"] != request:
            raise ValueError("built from other data or by another version")
        maps = {name: np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in MAPS}
        for name in MAPS:
            if describe(maps[name]) != stored["arrays"][name]:
                raise ValueError(f"{name}.npy has changed since it was written")
        return maps, stored["arrays"]
    except Exception as error:  # whatever is wrong with a cache, building it again repairs it
        print(f"note: {cache}: unusable ({error}); building the order again", file=sys.stderr)
        shutil.rmtree(cache, ignore_errors=True)
        return None


def save_maps(cache: Path, request: dict, maps: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict]:
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
            print(f"note: {cache} cannot be written ({error.strerror}); the order stays in memory", file=sys.stderr)
            return maps, arrays
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_maps(cache, request) or (maps, arrays)


class Order:
    """The rows of PREFIX in the published order, with enough epochs for `samples` rows.

    order[i] is row i as served: [seq_len + 1] tokens in the dtype of the data (Pythia: uint16). As published, the last
    entry of shuffle_idx is never served. `samples` matters only through the number of epochs, the smallest that has
    enough rows. Raises UserError for an impossible request.

    The maps are stored beside the data, in PREFIX.order-*/, and read from there if their checksums are right.
    """

    def __init__(self, prefix: str | Path, samples: int, seq_len: int = 2048, seed: int = 1234):
        if samples < 1:
            raise UserError(f"an order of {samples} samples; ask for at least 1")
        if seq_len < 1:
            raise UserError(f"--seq-len {seq_len} must be at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed} must be within 0 .. 4294967295")
        self.data, self.seq_len = IndexedTokens(prefix), seq_len
        index, tokens, documents = self.data.index_file, self.data.tokens, self.data.documents
        if tokens <= seq_len:
            raise UserError(f"{index}: {tokens} tokens make no row of {seq_len + 1}; add text or lower --seq-len")
        if self.data.marks == 1 and (self.data.sizes == seq_len + 1).all():
            raise UserError(f"{index}: rows shuffled already; give the directory of document.idx as --data")
        self.epochs = epochs = -(-(samples * seq_len + 1) // tokens)
        if epochs * documents > 2**31 - 1:
            raise UserError(f"{index}: {epochs} epochs of {documents} documents are more than 2^31; lower --steps")

        digest = self.data.index_sha256
        request = {"format": 1, "index_sha256": digest, "epochs": epochs, "seq_len": seq_len, "seed": seed}
        cache = Path(f"{prefix}.order-{epochs}epochs-{seq_len}len-{seed}seed-{digest[:12]}")
        loaded = load_maps(cache, request)
        if loaded is None:
            if (rows := epochs * tokens // seq_len) > 10_000_000:
                print(f"note: building the order of {rows:,} rows, only this time: {cache}", file=sys.stderr)
            try:
                maps = index_maps(self.data.sizes, epochs, seq_len, seed)
            except MemoryError:
                raise UserError(f"{index}: no memory for an order of {epochs} epochs; lower --steps") from None
            loaded = save_maps(cache, request, maps)
        maps, arrays = loaded
        self.doc_idx, self.sample_idx, self.shuffle_idx = (maps[name] for name in MAPS)
        # A hash of three hashes, because hashing the maps again would read them again.
        self.sha256 = hashlib.sha256(b"".join(bytes.fromhex(arrays[name]["sha256"]) for name in MAPS)).hexdigest()

    def __len__(self) -> int:
        return len(self.shuffle_idx) - 1

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """Return the pieces of documents that row i consists of: [(document, offset in tokens, number of tokens)]."""
        if not 0 <= i < len(self):  # negative indices do not count from the end
            raise IndexError(f"row {i} of {len(self)}")
        row = int(self.shuffle_idx[i])
        (first, offset), (last, end) = self.sample_idx[row : row + 2].tolist()
        documents = self.doc_idx[first : last + 1].tolist()
        starts = [offset] + [0] * (last - first)
        stops = [*self.data.sizes[documents[:-1]].tolist(), end + 1]  # + 1: the target of the last token
        return [(d, start, stop - start) for d, start, stop in zip(documents, starts, stops) if stop > start]

    def __getitem__(self, i: int) -> np.ndarray:
        pieces = self.pieces(i)
        return np.concatenate([self.data.read(self.data.start(doc) + offset, count) for doc, offset, count in pieces])


class ShuffledRows:
    """The rows of a pre-shuffled directory: document.idx with document.bin or document-00000-of-000NN.bin, in place.

    rows[i] is [seq_len + 1] tokens; all rows are served. Raises UserError if a row has another length.
    """

    def __init__(self, directory: str | Path, seq_len: int = 2048):
        self.data, self.seq_len = IndexedTokens(Path(directory) / "document"), seq_len
        index, sizes = self.data.index_file, self.data.sizes
        if (wrong := sizes != seq_len + 1).any():
            row = wrong.argmax()
            raise UserError(f"{index}: row {row} has {sizes[row]} tokens, not {seq_len + 1}; change --seq-len")
        self.sha256 = self.data.index_sha256

    def __len__(self) -> int:
        return self.data.documents

    def __getitem__(self, i: int) -> np.ndarray:
        return self.data.read(operator.index(i) * (self.seq_len + 1), self.seq_len + 1)


Rows = Order | ShuffledRows
