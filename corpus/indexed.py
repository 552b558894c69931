"""Megatron data sets on disk: PREFIX.idx with PREFIX.bin, or with shards that are read in place."""

import glob
import hashlib
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError

# The index of Megatron and GPT-NeoX (MMapIndexedDataset), little-endian: HEADER, then int32 sizes in tokens [n],
# int64 positions in the .bin in bytes [n], int64 document marks [m] (the sequence at which each document starts).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, m
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}


def block_slices(count: int, label: str, size: int = 1 << 20) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count). A progress bar appears after two seconds."""
    for start in tqdm(range(0, count, size), desc=label, delay=2, leave=False, disable=None):
        yield slice(start, min(start + size, count))


def sha256(arrays: list[np.ndarray], label: str) -> str:
    """Return the hex digest of the bytes of contiguous arrays, one after the other."""
    digest = hashlib.sha256()
    for array in arrays:
        raw = array.reshape(-1).view(np.uint8)
        for block in block_slices(len(raw), label, size=1 << 24):
            digest.update(raw[block])
    return digest.hexdigest()


def map_bytes(path: Path) -> np.ndarray:
    """Memory-map a file, read-only: uint8 [bytes]. Raises UserError if it cannot be read."""
    try:
        # An empty file cannot be mapped. A plain array, because slicing an np.memmap is slow.
        return np.asarray(np.memmap(path, np.uint8, "r")) if path.stat().st_size else np.empty(0, np.uint8)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def bin_files(prefix: Path) -> tuple[list[Path], str]:
    """Return [PREFIX.bin] or its shards in order, and a hint for the error if they hold too few bytes.

    Published data sets put the number of the last shard into the names (00000-of-00020 .. 00020-of-00020), most tools
    the number of shards (.. 00019-of-00020). Both are read. If the last shard is missing, only the length shows it.
    """
    whole = Path(f"{prefix}.bin")
    if whole.exists():
        return [whole], ""
    digits = "[0-9]" * 5
    paths = sorted(prefix.parent.glob(f"{glob.escape(prefix.name)}-{digits}-of-{digits}.bin"))
    if not paths:
        raise UserError(f"{whole}: no such file, and no shards {prefix}-00000-of-000NN.bin either")
    numbers, lasts = zip(*(map(int, path.stem[-14:].split("-of-")) for path in paths))
    if len(sets := {*lasts}) > 1:
        raise UserError(f"{prefix}: shards of {len(sets)} different sets side by side; keep one of them")
    last = lasts[0]
    for number in range(last):
        if number not in numbers:
            raise UserError(f"{prefix}-{number:05d}-of-{last:05d}.bin: this shard is missing; fetch it again")
    if numbers[-1] > last:
        raise UserError(f"{paths[-1]}: a shard beyond the last one, {last}; remove or rename it")
    return paths, "" if last in numbers else f"; is the shard {prefix}-{last:05d}-of-{last:05d}.bin missing?"


class IndexedTokens:
    """A Megatron data set: PREFIX.idx with PREFIX.bin, or with shards PREFIX-00000-of-000NN.bin read in place.

    Every field of the index is checked against the others and against the files. UserError names what does not fit.

    dtype      of the tokens
    documents  their number (GPT-NeoX calls them sequences; in the Pile each document is one sequence)
    marks      number of document marks; 1 in pre-shuffled data sets
    sizes      [documents] int32, tokens of each document
    tokens     their number, in all documents together
    """

    def __init__(self, prefix: str | Path):
        self.prefix, self.index_file = Path(prefix), Path(f"{prefix}.idx")
        raw = map_bytes(self.index_file)
        self._read_index(raw)
        self.files, hint = bin_files(self.prefix)
        self._shards = [map_bytes(path) for path in self.files]
        self._starts = [0, *accumulate(map(len, self._shards))]  # first byte of each shard in the data set, and the end
        width = self.dtype.itemsize
        if excess := self._starts[-1] - self.tokens * width:
            problem = f"{excess} bytes too long" if excess > 0 else f"truncated, {-excess} bytes are missing{hint}"
            name = self.files[0] if len(self.files) == 1 else f"{self.prefix}-*.bin"
            raise UserError(f"{name}: {problem} ({self.index_file} says {self.tokens} tokens of {width} bytes)")
        self._check_positions()
        self.index_sha256 = sha256([raw], "hashing the index")

    def _read_index(self, raw: np.ndarray) -> None:
        index = self.index_file
        if len(raw) < HEADER.size:
            raise UserError(f"{index}: {len(raw)} bytes are too few for a header of {HEADER.size}; fetch it again")
        magic, version, code, self.documents, self.marks = HEADER.unpack(raw[: HEADER.size].tobytes())
        if magic != MAGIC:
            raise UserError(f"{index}: byte 0: magic {magic!r} is not {MAGIC!r}; not a Megatron/GPT-NeoX index")
        if version != 1:
            raise UserError(f"{index}: byte 9: version {version}; only version 1 is known")
        if code not in DTYPES:
            raise UserError(f"{index}: byte 17: dtype code {code} is not one of the integer codes {[*DTYPES]}")
        self.dtype = DTYPES[code]
        if self.marks < 1:
            raise UserError(f"{index}: byte 26: no document marks, at least one is needed; write the index again")
        expected = HEADER.size + 12 * self.documents + 8 * self.marks  # Python integers do not overflow
        if len(raw) != expected:
            raise UserError(
                f"{index}: {len(raw)} bytes, but counts ({self.documents} sequences, {self.marks} document marks)"
                f" need {expected}: truncated or damaged; fetch it again"
            )
        # The arrays start at byte 34, so these views are unaligned; numpy reads them correctly.
        pointers_at, marks_at = HEADER.size + 4 * self.documents, HEADER.size + 12 * self.documents
        self.sizes = raw[HEADER.size : pointers_at].view("<i4")
        self._pointers, self._marks = raw[pointers_at:marks_at].view("<i8"), raw[marks_at:].view("<i8")
        if self.sizes.min(initial=0) < 0:
            sequence = (self.sizes < 0).argmax()
            raise UserError(f"{index}: sequence {sequence} has a negative size; damaged, fetch it again")
        self.tokens = int(self.sizes.sum(dtype=np.int64))

    def _check_positions(self) -> None:
        index, begin = self.index_file, 0  # begin: byte of the data set; the sizes fit the files, so nothing overflows
        for block in block_slices(self.documents, "checking positions"):
            lengths = self.sizes[block].astype(np.int64) * self.dtype.itemsize
            if (wrong := self._pointers[block] != begin + np.cumsum(lengths) - lengths).any():
                sequence = block.start + wrong.argmax()
                raise UserError(f"{index}: position of sequence {sequence} is not the sum of the sizes before it")
            begin += int(lengths.sum())
        # The writer of the pre-shuffled data sets never ended a document, so they have only the first mark.
        if self._marks[0] != 0 or (self.marks > 1 and self._marks[-1] != self.documents):
            raise UserError(f"{index}: document marks do not run from 0 to {self.documents}; damaged, fetch it again")
        if (wrong := self._marks[1:] < self._marks[:-1]).any():
            raise UserError(f"{index}: document marks go backwards after {wrong.argmax()}; damaged, fetch it again")

    def read(self, position: int, count: int) -> np.ndarray:
        """Return tokens [count] from `position` in the tokens of all documents. Raises IndexError outside the data."""
        if position < 0 or count < 0 or position + count > self.tokens:
            raise IndexError(f"tokens {position} to {position + count} of {self.tokens}")
        # Count bytes, because a shard can end within a token (published shards end within rows).
        begin, end = position * self.dtype.itemsize, (position + count) * self.dtype.itemsize
        first, stop = bisect_right(self._starts, begin) - 1, bisect_left(self._starts, end)  # the shards to read
        parts = [self._shards[k][max(begin - self._starts[k], 0) : end - self._starts[k]] for k in range(first, stop)]
        return np.concatenate([np.empty(0, np.uint8), *parts]).view(self.dtype)

    def start(self, document: int) -> int:
        """Return the position, in tokens, at which a document starts."""
        return int(self._pointers[document]) // self.dtype.itemsize

    def tokens_sha256(self) -> str:
        return sha256(self._shards, "hashing the tokens")
