"""The published order: index maps of GPT-NeoX v1.0, and the rows that they serve."""

import errno
import hashlib
import json
import operator
import os
import shutil
from pathlib import Path

import numpy as np

from corpus.indexed import IndexedTokens, blocks, note, sha256
from runtime.errors import UserError

CACHE_FORMAT = 1
MAPS = ("doc_idx", "sample_idx", "shuffle_idx")


def index_maps(sizes: np.ndarray, epochs: int, seq_len: int, seed: int) -> dict[str, np.ndarray]:
    """The three maps of GPT-NeoX v1.0 over documents of these sizes [documents], of T tokens in all.

    doc_idx      [epochs * documents]  int32   the documents of all epochs, shuffled once and together
    sample_idx   [N + 1, 2]            int32   where each row of the stream starts: (place in doc_idx, offset in tokens)
    shuffle_idx  [N]                   uint32  row as served -> row of the stream;    N = (epochs * T - 1) // seq_len

    NeoX builds sample_idx in a loop over all tokens. Row k starts at token k * seq_len of the stream, thus in the first
    document that ends beyond it: a cumulative sum and a search. Empty documents are skipped by the search (the first
    row starts at (0, 0) even so), and a row which starts where a document ends starts the next one.
    """
    rng = np.random.RandomState(seed)  # the legacy generator; its shuffle is part of the published order
    doc_idx = np.tile(np.arange(len(sizes), dtype=np.int32), epochs)
    rng.shuffle(doc_idx)

    rows = (epochs * int(sizes.sum(dtype=np.int64)) - 1) // seq_len
    # int64 where gpt-neox has it: beyond 2^31 entries, which v1.0 could not do.
    sample_idx = np.zeros((rows + 1, 2), np.int32 if 2 * (rows + 1) < 2**31 - 1 else np.int64)
    begin = 0  # token of the stream at which this block of documents starts
    for part in blocks(len(doc_idx), "cutting the stream into rows"):
        size = sizes[doc_idx[part]].astype(np.int64)
        ends = begin + np.cumsum(size)
        first, beyond = -(-begin // seq_len), min(rows, (int(ends[-1]) - 1) // seq_len) + 1  # the rows starting here
        starts = np.arange(first, beyond) * seq_len
        place = np.searchsorted(ends, starts, side="right")
        sample_idx[first:beyond, 0] = part.start + place
        sample_idx[first:beyond, 1] = starts - (ends[place] - size[place])
        begin = int(ends[-1])
    sample_idx[0] = 0

    shuffle_idx = np.arange(rows, dtype=np.uint32 if rows < 2**32 - 2 else np.int64)
    rng.shuffle(shuffle_idx)
    return dict(zip(MAPS, (doc_idx, sample_idx, shuffle_idx)))


def array_fingerprint(array: np.ndarray) -> dict:
    return {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": sha256([array], "hashing the order")}


def load_maps(cache: Path, facts: dict) -> tuple[dict[str, np.ndarray], dict] | None:
    """Maps [memory-mapped] and their fingerprints, if the cache is whole and was built from these facts. Else None, and
    nothing is left in the way of a new one."""
    try:
        if not cache.exists():
            return None
        stored = json.loads((cache / "order.json").read_text())
        if stored["facts"] != facts:
            raise ValueError("built from other data or by another version")
        maps = {}
        for name, written in stored["arrays"].items():
            maps[name] = np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if array_fingerprint(maps[name]) != written:
                raise ValueError(f"{name}.npy has changed since it was written")
        return {name: maps[name] for name in MAPS}, stored["arrays"]
    except Exception as error:  # whatever is wrong with a cache, the cure is the same
        note(f"{cache}: of no use ({error}); building the order again")
        shutil.rmtree(cache, ignore_errors=True)
        return None


def save_maps(cache: Path, facts: dict, maps: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict]:
    """Write the cache under another name and rename it, so that it is whole or absent. Returns what load_maps would,
    memory-mapped if the cache could be written."""
    prints = {name: array_fingerprint(array) for name, array in maps.items()}
    building = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        building.mkdir()
        for name, array in maps.items():
            np.save(building / f"{name}.npy", array, allow_pickle=False)
        (building / "order.json").write_text(json.dumps({"facts": facts, "arrays": prints}, indent=1))
        building.rename(cache)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # these: another process was faster, with the same maps
            note(f"the order stays in memory, as {cache} cannot be written ({error.strerror})")
            return maps, prints
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return load_maps(cache, facts) or (maps, prints)


class Order:
    """The rows of PREFIX in the published order, with enough epochs for `samples` rows.

    order[i] is row i as served, [seq_len + 1] tokens in the data's dtype (Pythia: uint16). As published, the set is one
    short: the last entry of shuffle_idx is never served. The number of samples matters only through that of epochs:
    the smallest that holds them. UserError for a request that cannot be met.

    The maps are kept beside the data, in PREFIX.order-*/, and read back if their checksums are right.
    """

    def __init__(self, prefix: str | Path, samples: int, seq_len: int = 2048, seed: int = 1234):
        if samples < 1:
            raise UserError(f"an order of {samples} samples; ask for at least 1")
        if seq_len < 1:
            raise UserError(f"--seq-len {seq_len} must be at least 1")
        if not 0 <= seed < 2**32:
            raise UserError(f"--seed {seed} must be within 0 .. 4294967295")
        self.data, self.seq_len, self.seed = IndexedTokens(prefix), seq_len, seed
        index, tokens, documents = self.data.index_file, self.data.tokens, self.data.documents
        if tokens <= seq_len:
            raise UserError(f"{index}: {tokens} tokens make no row of {seq_len + 1}; add text or lower --seq-len")
        if self.data.marks == 1 and (self.data.sizes == seq_len + 1).all():
            raise UserError(f"{index}: rows shuffled already; give the directory of document.idx as --data")
        self.epochs = -(-(samples * seq_len + 1) // tokens)
        if self.epochs * documents > 2**31 - 1:
            raise UserError(f"{index}: {self.epochs} epochs of {documents} documents are more than 2^31; lower --steps")

        digest = self.data.index_sha256()
        facts = {"format": CACHE_FORMAT, "index_sha256": digest, "epochs": self.epochs}
        facts |= {"seq_len": seq_len, "seed": seed}
        key = f"{self.epochs}epochs-{seq_len}len-{seed}seed-{digest[:12]}"
        cache = index.with_name(f"{self.data.prefix.name}.order-{key}")
        loaded = load_maps(cache, facts)
        if loaded is None:
            if (rows := self.epochs * tokens // seq_len) > 10_000_000:
                note(f"building an order of {rows:,} rows, once: {cache}")
            try:
                maps = index_maps(self.data.sizes, self.epochs, seq_len, seed)
            except MemoryError:
                raise UserError(f"{index}: no memory for an order of {self.epochs} epochs; lower --steps") from None
            loaded = save_maps(cache, facts, maps)
        maps, prints = loaded
        self.doc_idx, self.sample_idx, self.shuffle_idx = (maps[name] for name in MAPS)
        # Of the three digests in this order, so that each array is read only once.
        self.sha256 = hashlib.sha256(b"".join(bytes.fromhex(prints[name]["sha256"]) for name in MAPS)).hexdigest()

    def __len__(self) -> int:
        return len(self.shuffle_idx) - 1

    def pieces(self, i: int) -> list[tuple[int, int, int]]:
        """What row i is made of: (document, offset of the first token in it, tokens), in the order of reading."""
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        row = int(self.shuffle_idx[i])
        (first, offset), (last, end) = self.sample_idx[row : row + 2].tolist()
        pieces = []
        for place in range(first, last + 1):
            document = int(self.doc_idx[place])
            stop = end + 1 if place == last else int(self.data.sizes[document])  # + 1: the target of the last token
            if stop > offset:
                pieces.append((document, offset, stop - offset))
            offset = 0
        return pieces

    def __getitem__(self, i: int) -> np.ndarray:
        pieces = self.pieces(i)
        return np.concatenate([self.data.read(self.data.start(doc) + offset, count) for doc, offset, count in pieces])


class ShuffledRows:
    """The rows of a pre-shuffled directory: document.idx with document.bin or document-00000-of-000NN.bin, in place.

    rows[i] is [seq_len + 1] tokens; all rows are served. UserError if the rows have another length.
    """

    def __init__(self, directory: str | Path, seq_len: int = 2048):
        self.data, self.seq_len = IndexedTokens(Path(directory) / "document"), seq_len
        sizes = self.data.sizes
        for part in blocks(len(sizes), "checking rows"):
            if (wrong := sizes[part] != seq_len + 1).any():
                row = part.start + int(wrong.argmax())
                raise UserError(
                    f"{self.data.index_file}: row {row} has {sizes[row]} tokens, not {seq_len + 1};"
                    f" these are no rows of --seq-len {seq_len}"
                )
        self.sha256 = self.data.index_sha256()

    def __len__(self) -> int:
        return self.data.documents

    def __getitem__(self, i: int) -> np.ndarray:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return self.data.read(i * (self.seq_len + 1), self.seq_len + 1)


Rows = Order | ShuffledRows
