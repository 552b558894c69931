"""Tokens on disk -> the batch of step t, in the order in which Pythia saw them.

How a token travels:

    file         PREFIX.bin      documents one after the other, nothing but tokens; PREFIX.idx says where each begins
      |
    document     doc_idx         every document once per epoch, all epochs shuffled together
      |
    stream       sample_idx      the documents in that order, end to end, cut every seq_len tokens
      |
    row          shuffle_idx     seq_len + 1 tokens, the cuts shuffled; neighbours in the stream share one token
      |
    step t       rows [batch_size * t, batch_size * (t + 1)): nothing to remember, so nothing to restore
      |
    micro-batch  j of rank r: the r-th of the `world` slices of micro_batch rows in the j-th part of the step

The batch of a step depends on the step alone, whatever the number of ranks. Pre-shuffled sets (a directory of
document.idx and document-*.bin, as EleutherAI publishes them) hold the rows themselves and enter at `row`.

The order is that of GPT-NeoX v1.0 (megatron/data/gpt2_dataset.py and helpers.cpp), bit for bit.
"""

import argparse
import errno
import glob
import hashlib
import json
import math
import operator
import os
import re
import shutil
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from errors import Parser, UserError, run_command

# The index of Megatron and GPT-NeoX (MMapIndexedDataset), little-endian: HEADER, then int32 sizes in tokens [n],
# int64 positions in the .bin in bytes [n], int64 document marks [m] (the sequence at which each document starts).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, m
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}

DEMO = {"data": "demo", "steps": 60, "batch_size": 16, "seq_len": 256}  # what --demo stands for, here and in train.py

CACHE_FORMAT = 1
MAPS = ("doc_idx", "sample_idx", "shuffle_idx")


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def blocks(count: int, label: str, size: int = 1 << 20) -> Iterator[slice]:
    """Slices of at most `size` that cover range(count), with a progress bar if they take long: what walks a file of
    any length in these needs the memory of one of them."""
    starts = range(0, count, size)
    if len(starts) > 1:
        from tqdm import tqdm

        starts = tqdm(starts, desc=label, delay=2, leave=False, disable=None)
    for start in starts:
        yield slice(start, min(start + size, count))


def sha256(arrays: list[np.ndarray], label: str) -> str:
    """Hex digest over the bytes of contiguous arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        raw = array.reshape(-1).view(np.uint8)
        for part in blocks(len(raw), label, size=1 << 24):
            digest.update(raw[part])
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Files


def map_bytes(path: Path) -> np.ndarray:
    """The bytes of a file [bytes], uint8, read-only and memory-mapped."""
    try:
        # An empty file cannot be mapped. Plain arrays, as slices of np.memmap are slow.
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def bin_files(prefix: Path) -> tuple[list[Path], str]:
    """PREFIX.bin, or its shards in order; and a hint for the case that they turn out to hold too little.

    Published sets put the number of the last shard into the names (00000-of-00020 .. 00020-of-00020), most tools the
    number of shards (.. 00019-of-00020). Both are read; only the length tells them apart when the last is missing.
    """
    whole = Path(f"{prefix}.bin")
    if whole.exists():
        return [whole], ""
    shards: dict[int, dict[int, Path]] = {}
    for path in prefix.parent.glob(f"{glob.escape(prefix.name)}-*-of-*.bin"):
        if match := re.fullmatch(r"-(\d{5})-of-(\d{5})\.bin", path.name[len(prefix.name) :]):
            shards.setdefault(int(match[2]), {})[int(match[1])] = path
    if not shards:
        raise UserError(f"{whole}: no such file, and no shards {prefix}-00000-of-000NN.bin either")
    if len(shards) > 1:
        raise UserError(f"{prefix}: shards of {len(shards)} different sets side by side; keep one of them")
    ((last, paths),) = shards.items()
    for number in range(max(last, 1)):
        if number not in paths:
            raise UserError(f"{prefix}-{number:05d}-of-{last:05d}.bin: this shard is missing; fetch it again")
    if max(paths) > last:
        raise UserError(f"{paths[max(paths)]}: a shard beyond the last one, {last}; remove or rename it")
    hint = "" if last in paths else f"; is the shard {prefix}-{last:05d}-of-{last:05d}.bin missing?"
    return [paths[number] for number in sorted(paths)], hint


class IndexedTokens:
    """A Megatron data set: PREFIX.idx with PREFIX.bin, or with shards PREFIX-00000-of-000NN.bin read in place.

    Every field of the index is checked against the others and against the files; UserError says what does not fit.

    dtype      of the tokens
    documents  how many (in GPT-NeoX "sequences"; in the Pile each document is one sequence)
    sizes      [documents] int32, tokens in each
    tokens     in all documents together
    """

    def __init__(self, prefix: str | Path):
        self.prefix = prefix = Path(prefix)
        self.index_file = index = Path(f"{prefix}.idx")
        self.index = raw = map_bytes(index)
        if len(raw) < HEADER.size:
            raise UserError(f"{index}: {len(raw)} bytes are too few for a header of {HEADER.size}; fetch it again")
        magic, version, code, count, marks = HEADER.unpack(raw[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{index}: byte 0: magic {magic!r} is not {MAGIC!r}; this is no Megatron/GPT-NeoX index")
        if version != 1:
            raise UserError(f"{index}: byte 9: version {version}; only version 1 is known")
        if code not in DTYPES:
            raise UserError(f"{index}: byte 17: dtype code {code} is not one of the integer codes {[*DTYPES]}")
        if marks < 1:
            raise UserError(f"{index}: byte 26: no document marks, there is at least one; write the index again")
        expected = HEADER.size + 12 * count + 8 * marks  # Python integers: nothing overflows
        if len(raw) != expected:
            raise UserError(
                f"{index}: {len(raw)} bytes, but counts ({count} sequences, {marks} document marks) need {expected}:"
                " truncated or damaged; fetch it again"
            )

        self.dtype, self.documents, self.marks = DTYPES[code], count, marks
        # The arrays begin at byte 34, so these views are unaligned. numpy reads them all the same.
        ends = HEADER.size + 4 * count, HEADER.size + 12 * count
        self.sizes = raw[HEADER.size : ends[0]].view("<i4")
        pointers, doc_idx = raw[ends[0] : ends[1]].view("<i8"), raw[ends[1] :].view("<i8")

        self.tokens = 0
        for part in blocks(count, "checking sizes"):
            if (negative := self.sizes[part] < 0).any():
                raise UserError(f"{index}: sequence {part.start + negative.argmax()} has a negative size; damaged")
            self.tokens += int(self.sizes[part].sum(dtype=np.int64))

        self.files, hint = bin_files(prefix)
        self._shards = [map_bytes(path) for path in self.files]
        self._starts = [0]  # byte of the data set at which each shard starts
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        excess = self._starts[-1] - self.tokens * self.dtype.itemsize
        if excess:
            what = f"{excess} bytes too long" if excess > 0 else f"truncated, {-excess} bytes are missing{hint}"
            name = self.files[0] if len(self.files) == 1 else f"{prefix}-*.bin"
            raise UserError(f"{name}: {what} ({index} says {self.tokens} tokens of {self.dtype.itemsize} bytes)")

        begin = 0  # byte; no overflow below, as the sizes sum up to the length of a file
        for part in blocks(count, "checking positions"):
            steps = self.sizes[part].astype(np.int64) * self.dtype.itemsize
            if (wrong := pointers[part] != begin + np.cumsum(steps) - steps).any():
                raise UserError(f"{index}: position of sequence {part.start + wrong.argmax()} is not the sum of sizes")
            begin += int(steps.sum())
        self._pointers = pointers

        # Pre-shuffled sets were written without ending a document: their only mark is the first.
        if doc_idx[0] != 0 or (marks > 1 and doc_idx[-1] != count):
            raise UserError(f"{index}: document marks do not run from 0 to {count}; damaged, fetch it again")
        for part in blocks(marks, "checking documents"):
            seen = doc_idx[max(part.start - 1, 0) : part.stop]
            if (seen[1:] < seen[:-1]).any():
                raise UserError(f"{index}: document marks go backwards near {part.start}; damaged, fetch it again")

    def read(self, position: int, count: int) -> np.ndarray:
        """Tokens [count] from `position` of all documents end to end, across shards. IndexError outside the data."""
        if position < 0 or count < 0 or position + count > self.tokens:
            raise IndexError(f"tokens {position} to {position + count} of {self.tokens}")
        # In bytes, as a shard may end within a token (published ones end within rows).
        begin, end = position * self.dtype.itemsize, (position + count) * self.dtype.itemsize
        out = np.empty(end - begin, np.uint8)
        shard, filled = bisect_right(self._starts, begin) - 1, 0
        while filled < len(out):
            part = self._shards[shard][begin + filled - self._starts[shard] :][: len(out) - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1
        return out.view(self.dtype)

    def start(self, document: int) -> int:
        """The position, in tokens, at which a document starts."""
        return int(self._pointers[document]) // self.dtype.itemsize

    def index_sha256(self) -> str:
        return sha256([self.index], "hashing the index")

    def tokens_sha256(self) -> str:
        return sha256(self._shards, "hashing the tokens")


# ---------------------------------------------------------------------------------------------------------------------
# The published order


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


def fingerprint(array: np.ndarray) -> dict:
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
            if fingerprint(maps[name]) != written:
                raise ValueError(f"{name}.npy has changed since it was written")
        return {name: maps[name] for name in MAPS}, stored["arrays"]
    except Exception as error:  # whatever is wrong with a cache, the cure is the same
        note(f"{cache}: of no use ({error}); building the order again")
        shutil.rmtree(cache, ignore_errors=True)
        return None


def save_maps(cache: Path, facts: dict, maps: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict]:
    """Write the cache under another name and rename it, so that it is whole or absent. Returns what load_maps would,
    memory-mapped if the cache could be written."""
    prints = {name: fingerprint(array) for name, array in maps.items()}
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


def locate(data: str | Path) -> Path:
    """The prefix or directory that --data means; builds the demo corpus where it is asked for."""
    if str(data) == "demo":
        from prepare import demo

        return demo()
    return Path(data)


def open_rows(data: str | Path, samples: int, seq_len: int = 2048, seed: int = 1234) -> Rows:
    """Rows of --data: a Megatron prefix, a pre-shuffled directory, or "demo". UserError if it is none of these."""
    path = locate(data)
    if (path / "document.idx").exists():
        return ShuffledRows(path, seq_len)
    if Path(f"{path}.idx").exists():
        return Order(path, samples, seq_len, seed)
    raise UserError(
        f"--data {data}: neither {path}.idx (a prefix) nor {path}/document.idx (a pre-shuffled directory) exists;"
        " make a prefix with `python data.py prepare`"
    )


def find_tokenizer(data: str | Path) -> Path | None:
    """The tokenizer.json that belongs to --data, if one lies where `prepare` or a download puts it."""
    path = locate(data)
    directory = path if path.is_dir() else path.parent
    files = [Path(f"{path}.tokenizer.json"), directory / "tokenizer.json"]
    return next((file for file in files if file.is_file()), None)


def data_facts(rows: Rows) -> dict:
    """What a run records about its data. The tokens themselves are hashed where that takes no more than seconds."""
    data, order = rows.data, isinstance(rows, Order)
    return {
        "kind": "shuffled by seed" if order else "pre-shuffled rows",
        "files": [str(file) for file in [data.index_file, *data.files]],
        "dtype": data.dtype.name,
        "tokens": data.tokens,
        "documents": data.documents if order else None,
        "epochs": rows.epochs if order else None,
        "rows": len(rows),
        "order_sha256": rows.sha256,
        "bin_sha256": data.tokens_sha256() if data.tokens * data.dtype.itemsize < 10**9 else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def requested_samples(steps: int, batch_size: int) -> int:
    """Rows asked of the order: half a per cent more than are used, as GPT-NeoX does for a list of paths. In the same
    floating-point arithmetic, as one sample more can be one epoch more and so another order. UserError below 1."""
    if steps < 1 or batch_size < 1:
        raise UserError(f"--steps {steps} and --batch-size {batch_size} must be at least 1")
    return math.ceil(steps * batch_size * 1.005)


def row_numbers(step: int, batch_size: int, micro_batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Which rows a rank sees in a step: int64 [micro_steps, micro_batch]. Dealt as by GPT-NeoX: one micro-step takes
    micro_batch * world consecutive rows, of which rank r has the r-th part. UserError if batch_size does not divide."""
    if batch_size < 1 or batch_size % world:
        near = max(batch_size // world, 1) * world
        raise UserError(
            f"--batch-size {batch_size} does not divide among {world} ranks; {near} or {near + world} would"
        )
    share = batch_size // world
    if micro_batch < 1 or share % micro_batch:
        below = [n for n in range(1, min(micro_batch, share) + 1) if share % n == 0][-1:]
        above = [n for n in range(max(micro_batch, 1), share + 1) if share % n == 0][:1]
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {share} rows of a rank"
            f" (--batch-size {batch_size}, {world} ranks); {' or '.join(map(str, below + above))} would"
        )
    first = step * batch_size + rank * micro_batch
    return first + np.arange(0, batch_size, micro_batch * world)[:, None] + np.arange(micro_batch)


def batch(
    rows: Rows, step: int, batch_size: int, micro_batch: int | None = None, rank: int = 0, world: int = 1
) -> np.ndarray:
    """What a rank sees in a step (0-based): [micro_steps, micro_batch, seq_len + 1] tokens in the data's dtype.

    Inputs are [..., :-1], targets [..., 1:]. A pure function of its arguments. micro_batch None: all of the rank's rows
    at once. UserError if batch_size does not divide or if the data ends before the step.
    """
    numbers = row_numbers(step, batch_size, batch_size // world if micro_batch is None else micro_batch, rank, world)
    steps = len(rows) // batch_size
    if not 0 <= step < steps:
        raise UserError(f"step {step}: the data has {steps} steps of {batch_size} rows ({len(rows)} rows); first is 0")
    return np.stack([rows[i] for i in numbers.flat]).reshape(*numbers.shape, rows.seq_len + 1)


def check_vocab(batch: np.ndarray, vocab: int, step: int, rank: int = 0, world: int = 1) -> None:
    """UserError if a token of this rank's batch [micro_steps, micro_batch, seq_len + 1] is no id of the vocabulary."""
    wrong = (batch < 0) | (batch >= vocab)
    if wrong.any():
        j, k, position = (int(at[0]) for at in wrong.nonzero())
        row = row_numbers(step, batch.shape[0] * batch.shape[1] * world, batch.shape[1], rank, world)[j, k]
        raise UserError(
            f"step {step}, row {row}, position {position}: token id {batch[j, k, position]} is outside the vocabulary"
            f" of {vocab}; was the data made with another tokenizer?"
        )


def row_digests(batch: np.ndarray) -> np.ndarray:
    """sha256 of every row of [..., seq_len + 1] tokens as stored, little-endian: uint8 [..., 32]."""
    rows = batch.astype(batch.dtype.newbyteorder("<"), copy=False).reshape(-1, batch.shape[-1])
    digests = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
    return np.frombuffer(digests, dtype=np.uint8).reshape(*batch.shape[:-1], 32).copy()


def digest(row_digests: np.ndarray) -> str:
    """Hex digest of a batch, of the digests of its rows in their order: each rank can hash what it has."""
    return hashlib.sha256(row_digests.tobytes()).hexdigest()


def batch_sha256(batch: np.ndarray) -> str:
    """Hex digest of a whole batch [..., seq_len + 1]."""
    return digest(row_digests(batch))


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run_prepare(args: argparse.Namespace) -> None:
    from prepare import prepare

    data = prepare(args.input, args.out, args.tokenizer, args.workers)
    print(f"{args.out}: {data.documents:,} documents, {data.tokens:,} tokens of {data.dtype.name}")


def run_info(args: argparse.Namespace) -> None:
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    facts = data_facts(rows)
    facts["files"] = "\n             ".join(facts["files"])
    facts["tokenizer"] = find_tokenizer(args.data)
    facts["steps"] = f"{len(rows) // args.batch_size:,} of {args.batch_size:,} rows of {args.seq_len + 1:,} tokens"
    for name, fact in facts.items():
        if fact is not None:
            print(f"{name:<12} {fact:,}" if isinstance(fact, int) else f"{name:<12} {fact}")


def run_view(args: argparse.Namespace) -> None:
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    seen = batch(rows, args.step, args.batch_size)[0]  # [batch, seq_len + 1]
    if args.row is not None and not 0 <= args.row < args.batch_size:
        raise UserError(f"--row {args.row}: a step has rows 0 .. {args.batch_size - 1}")
    chosen = range(args.batch_size) if args.row is None else [args.row]
    if args.export:
        export(seen[list(chosen)], Path(args.export))
        return
    file = Path(args.tokenizer) if args.tokenizer else find_tokenizer(args.data)
    if file:
        from prepare import load_tokenizer

        tokenizer = load_tokenizer(file)
    for k in chosen:
        number = args.step * args.batch_size + k
        origin = ""
        if isinstance(rows, Order):
            origin = ": " + ", ".join(f"document {d} from {offset} ({n})" for d, offset, n in rows.pieces(number))
        print(f"--- step {args.step}, row {k} of {args.batch_size} (row {number} of the order){origin}")
        print(tokenizer.decode(seen[k].tolist(), skip_special_tokens=False) if file else " ".join(map(str, seen[k])))


def export(array: np.ndarray, path: Path) -> None:
    """Write an .npy that is whole or absent. UserError if something is there already."""
    if path.exists():
        raise UserError(f"{path} exists; choose another name or delete it")
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(building, "wb") as file:
            np.save(file, array, allow_pickle=False)
        building.rename(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    finally:
        building.unlink(missing_ok=True)
    print(f"{path}: {array.dtype.name} {[*array.shape]}")


def main() -> None:
    parser = Parser(prog="data.py", description="Make, describe and look at training data.")
    commands = parser.add_subparsers(required=True, metavar="prepare | info | view")

    def command(run, name, description, example):
        example = f"example: python data.py {name} {example}"
        sub = commands.add_parser(name, help=description, description=description, epilog=example)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        run_prepare,
        "prepare",
        "Text to PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json. A .jsonl or .jsonl.zst has one document a line,"
        ' {"text": "..."}; any other file is one document of UTF-8 text.',
        "--input wiki.jsonl.zst notes.txt --out corpora/mine",
    )
    sub.add_argument("--input", nargs="+", required=True, metavar="FILE", help="in the order of the documents")
    sub.add_argument("--out", required=True, metavar="PREFIX", help="must not exist yet")
    sub.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json; its id 0 is <|endoftext|> (default: bytes)")
    sub.add_argument("--workers", type=int, metavar="N", help="threads that encode (default: one per core)")

    info = command(run_info, "info", "Counts, epochs, steps, the order's sha256.", "--data corpora/mine --steps 1000")
    view = command(
        run_view,
        "view",
        "What the model saw in a step, as text if a tokenizer is there, and the documents it came from.",
        "--data corpora/mine --steps 1000 --step 10 --row 3",
    )
    for sub in (info, view):
        sub.add_argument("--demo", action="store_true", help="the rows of `train.py --demo`")
        sub.add_argument("--data", default="demo", help="prefix, pre-shuffled directory, or demo (default)")
        sub.add_argument("--seed", type=int, default=1234, help="as given to train.py (default 1234)")
        sub.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens (default 2048)")
        sub.add_argument("--batch-size", type=int, default=1024, metavar="N", help="rows a step (default 1024)")
        sub.add_argument("--steps", type=int, default=143000, metavar="N", help="of the whole run (default 143000)")
        if "--demo" in sys.argv:
            sub.set_defaults(**DEMO)
    view.add_argument("--step", type=int, required=True, metavar="T", help="counted from 0")
    view.add_argument("--row", type=int, metavar="R", help="only this row of the step, counted from 0")
    view.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    view.add_argument("--export", metavar="FILE.npy", help="write tokens [rows, seq_len + 1] instead (Pythia: uint16)")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
