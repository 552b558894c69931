"""Megatron data sets on disk: PREFIX.idx with PREFIX.bin, or with shards read in place."""

import glob
import hashlib
import re
import struct
import sys
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from runtime.errors import UserError

# The index of Megatron and GPT-NeoX (MMapIndexedDataset), little-endian: HEADER, then int32 sizes in tokens [n],
# int64 positions in the .bin in bytes [n], int64 document marks [m] (the sequence at which each document starts).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, m
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}


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
