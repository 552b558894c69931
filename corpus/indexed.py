"""Megatron data sets on disk: PREFIX.idx with PREFIX.bin, or with shards that are read in place."""

import glob
import hashlib
import io
import json
import math
import os
import stat
import struct
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_write, read_small

# The index of Megatron and GPT-NeoX (MMapIndexedDataset), little-endian: HEADER, then int32 sizes in tokens [n],
# int64 positions in the .bin in bytes [n], int64 document marks [m] (the sequence at which each document starts).
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, n, m
TICK = 100_000_000  # nanoseconds; the times of files have ticks of up to 10 ms
CHECKED_ONCE = 1_000_000  # documents; a smaller index is checked at every start, in milliseconds
DTYPES = {code: np.dtype(name) for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()}


def block_slices(count: int, label: str, size: int = 1 << 20) -> Iterator[slice]:
    """Yield slices of at most `size` that cover range(count). A progress bar appears after two seconds, if it has a
    label."""
    for start in tqdm(range(0, count, size), desc=label, delay=2, leave=False, disable=None if label else True):
        yield slice(start, min(start + size, count))


def sha256(blocks: Iterable[bytes | np.ndarray]) -> str:
    """Return the hex digest of blocks of bytes, or of contiguous arrays, one after the other."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


class DataFile:
    """A regular file that is read by pread. Raises UserError if it cannot be opened or read.

    It is never mapped, because a mapping kills the process without a message (SIGBUS) when the file shrinks or the disk
    fails. Threads and forked processes can share it.

    bytes   its size when it was opened
    status  its os.stat_result from then
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # O_NONBLOCK: the open of a FIFO would wait for a writer
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            self.status = os.fstat(self._descriptor)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        if not stat.S_ISREG(self.status.st_mode):
            raise UserError(f"{path}: not a regular file")
        self.bytes = self.status.st_size

    def read(self, begin: int, count: int) -> bytes:
        """Return `count` bytes from byte `begin`."""
        try:
            raw = os.pread(self._descriptor, count, begin)
            while len(raw) < count:  # at the end of the file; Linux also reads at most 2 GB at once
                more = os.pread(self._descriptor, count - len(raw), begin + len(raw))
                if not more:
                    raise UserError(
                        f"{self.path}: byte {begin + len(raw)}: the file ends here, it had {self.bytes} bytes when it"
                        " was opened; another program has changed it"
                    )
                raw += more
        except OSError as error:
            raise UserError(f"{self.path}: byte {begin} cannot be read ({error.strerror}); check the disk") from None
        return raw

    def blocks(self, label: str) -> Iterator[bytes]:
        """Yield the file in blocks. A progress bar appears after two seconds."""
        for block in block_slices(self.bytes, label, size=1 << 24):
            yield self.read(block.start, block.stop - block.start)

    def map(self, begin: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.memmap:
        """Memory-map an array, read-only."""
        with open(self._descriptor, "rb", closefd=False) as file:
            return np.memmap(file, dtype, "r", begin, shape)

    def read_all(self, places: list[tuple[int, int]]) -> list[bytes]:
        """Return `count` bytes from byte `begin` for every (begin, count)."""
        pread, file = os.pread, self._descriptor  # a batch has thousands of small places
        try:
            found = [pread(file, count, begin) for begin, count in places]
        except OSError:
            found = [b""]
        if sum(map(len, found)) < sum(count for _, count in places):
            return [self.read(begin, count) for begin, count in places]  # reads the rest, or finds out what is wrong
        return found

    def expect_random_reads(self) -> None:
        """Tell the system not to read ahead: in a large file that would read megabytes for every row."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)


class AbsentShard:
    """A shard of known size that `data.py fetch --shards` did not fetch. Reading it raises UserError."""

    def __init__(self, path: Path, size: int):
        self.path, self.bytes, self.status = path, size, None

    def read(self, begin: int, count: int) -> bytes:
        number = int(self.path.stem[-14:-9])
        raise UserError(f"{self.path} is not here: get it with `python data.py fetch NAME --shards {number} --out DIR`")

    def read_all(self, places: list[tuple[int, int]]) -> list[bytes]:
        return [self.read(begin, count) for begin, count in places]

    def blocks(self, label: str) -> Iterator[bytes]:
        yield self.read(0, self.bytes)

    def expect_random_reads(self) -> None:
        pass


class StoredArray:
    """An array in a DataFile: array[a:b] reads these rows (0 <= a <= b), np.asarray(array) all of them."""

    def __init__(self, file: DataFile, begin: int, dtype: np.dtype | str, shape: tuple[int, ...]):
        self.file, self.begin, self.dtype, self.shape = file, begin, np.dtype(dtype), shape
        self.row_bytes = self.dtype.itemsize * math.prod(shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        raw = self.file.read(self.begin + rows.start * self.row_bytes, (rows.stop - rows.start) * self.row_bytes)
        array = np.frombuffer(raw, self.dtype)
        return array if len(self.shape) == 1 else array.reshape(-1, *self.shape[1:])

    def gather(self, starts: np.ndarray, counts: np.ndarray | int) -> np.ndarray:
        """Return rows start .. start + count - 1 for every start, one after the other."""
        if np.isscalar(counts) and len(starts) > 1 and (np.diff(starts) == counts).all():  # neighbours: one read
            return self[starts[0] : starts[-1] + counts]
        begins, sizes = self.begin + starts * self.row_bytes, np.broadcast_to(counts, starts.shape) * self.row_bytes
        raw = b"".join(self.file.read_all(list(zip(begins.tolist(), sizes.tolist()))))
        return np.frombuffer(raw, self.dtype).reshape(-1, *self.shape[1:])

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[0 : len(self)].astype(dtype or self.dtype, copy=False)

    def blocks(self, label: str) -> Iterator[np.ndarray]:
        """Yield all rows in blocks. A progress bar appears after two seconds."""
        for block in block_slices(len(self), label):
            yield self[block]

    def map(self) -> np.memmap:
        """Memory-map the array, read-only."""
        return self.file.map(self.begin, self.dtype, self.shape)


def open_npy(path: Path) -> StoredArray:
    """Open an array in a .npy file. Raises UserError if it cannot be read, ValueError if it is not such a file."""
    file = DataFile(path)
    head = io.BytesIO(file.read(0, min(file.bytes, 1 << 12)))
    if np.lib.format.read_magic(head) != (1, 0):
        raise ValueError(f"{path.name} has another version of the format")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(head)
    if fortran_order or dtype.hasobject or head.tell() + math.prod(shape) * dtype.itemsize != file.bytes:
        raise ValueError(f"{path.name} does not have the size that its header says")
    return StoredArray(file, head.tell(), dtype, shape)


# A mark is a small file beside others that records that they were checked, or their hash. It counts until one of them
# changes.


def identity(status: os.stat_result | None) -> list[int]:
    """What changes when a file is written or replaced (None: an absent shard). Its owner cannot set its ctime."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] if status else []


def write_mark(path: Path, files: list[DataFile], **facts: object) -> None:
    """Record facts about files as they were when they were opened. Raises OSError."""
    with atomic_write(path, "w") as file:
        json.dump({"files": [identity(x.status) for x in files], **facts}, file)


def read_mark(path: Path, files: list[DataFile]) -> dict:
    """Return what `write_mark` recorded about files that are as they were then. Raises UserError or ValueError if there
    is no such mark.

    A file system's clock has ticks. A file could change within the tick in which the mark was written and keep its
    times. So a mark counts only for files that were older than it, and only if this user or root wrote it.
    """
    mark = DataFile(path)
    if mark.bytes > 1 << 20:
        raise ValueError(f"{path.name} is too large")
    stored = json.loads(mark.read(0, mark.bytes))
    if not isinstance(stored, dict) or stored.get("files") != [identity(x.status) for x in files]:
        raise ValueError(f"{path.name} is about other files")
    newest = max((file.status.st_ctime_ns for file in files if file.status), default=0)
    if mark.status.st_uid not in (0, os.geteuid()) or newest + TICK >= mark.status.st_mtime_ns:
        raise ValueError(f"{path.name} cannot be trusted")
    return stored


def recorded_shards(prefix: Path) -> dict[Path, int]:
    """The shards and their sizes in bytes, in order, as `data.py fetch` recorded them; {} if it did not."""
    record = Path(f"{prefix}.shards.json")
    try:
        shards = json.loads(read_small(record, 1 << 24))["shards"]
        return {prefix.with_name(name): int(shards[name]["bytes"]) for name in sorted(shards)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{record} is damaged ({error!r:.200}): fetch the data again") from None


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

    A large index is checked once. PREFIX.idx.json keeps what was found, until the index changes.

    dtype      of the tokens
    documents  their number (GPT-NeoX calls them sequences; in the Pile each document is one sequence)
    marks      number of document marks; 1 in pre-shuffled data sets
    sizes      [documents] int32, tokens of each document, in the file
    shortest   of these sizes, and longest
    tokens     their number, in all documents together
    files      paths of PREFIX.bin or its shards
    """

    def __init__(self, prefix: str | Path, with_tokens: bool = True):
        """with_tokens=False: only the index is needed. Then no token can be read."""
        self.prefix, self.index_file = Path(prefix), Path(f"{prefix}.idx")
        index = DataFile(self.index_file)
        self._read_header(index)
        sizes = recorded_shards(self.prefix)
        self.files, self._hint = ([*sizes], "") if sizes or not with_tokens else bin_files(self.prefix)
        absent = {path for path in sizes if not os.path.lexists(path)}
        self.shards = [AbsentShard(path, sizes[path]) if path in absent else DataFile(path) for path in self.files]
        # first byte of each shard in the data set, and the end
        self._starts = [0, *accumulate(shard.bytes for shard in self.shards)]
        facts = self._checked(index) or self._check(index)
        self.tokens, self.shortest, self.longest, self.index_sha256 = facts
        self._check_length(self.tokens)
        for shard in self.shards:
            shard.expect_random_reads()

    def _read_header(self, file: DataFile) -> None:
        index = self.index_file
        if file.bytes < HEADER.size:
            raise UserError(f"{index}: {file.bytes} bytes are too few for a header of {HEADER.size}; fetch it again")
        magic, version, code, self.documents, self.marks = HEADER.unpack(file.read(0, HEADER.size))
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
        if file.bytes != expected:
            raise UserError(
                f"{index}: {file.bytes} bytes, but counts ({self.documents} sequences, {self.marks} document marks)"
                f" need {expected}: truncated or damaged; fetch it again"
            )
        pointers_at, marks_at = HEADER.size + 4 * self.documents, HEADER.size + 12 * self.documents
        self.sizes = StoredArray(file, HEADER.size, "<i4", (self.documents,))
        self._pointers = StoredArray(file, pointers_at, "<i8", (self.documents,))
        self._marks = StoredArray(file, marks_at, "<i8", (self.marks,))

    def _check_length(self, tokens: int) -> None:
        width = self.dtype.itemsize
        if self.files and (excess := self._starts[-1] - tokens * width):
            problem = (
                f"{excess} bytes too long" if excess > 0 else f"truncated, {-excess} bytes are missing{self._hint}"
            )
            name = self.files[0] if len(self.files) == 1 else f"{self.prefix}-*.bin"
            raise UserError(f"{name}: {problem} ({self.index_file} says {tokens} tokens of {width} bytes)")

    def _check(self, file: DataFile) -> tuple[int, int, int, str]:
        """Check every field in one pass, and store what was found. Returns tokens, shortest, longest and the sha256."""
        digest = hashlib.sha256(file.read(0, HEADER.size))
        sizes = self._check_sizes(digest)
        tokens = int(sizes.sum(dtype=np.int64))
        self._check_length(tokens)
        self._check_positions(sizes, digest)
        self._check_marks(digest)
        facts = tokens, int(sizes.min(initial=2**31 - 1)), int(sizes.max(initial=0)), digest.hexdigest()
        if self.documents >= CHECKED_ONCE:
            with suppress(OSError):
                write_mark(Path(f"{self.index_file}.json"), [file], facts=facts)
        return facts

    def _check_sizes(self, digest) -> np.ndarray:
        sizes = np.empty(self.documents, "<i4")
        for block in block_slices(self.documents, "checking sizes"):
            sizes[block] = part = self.sizes[block]
            digest.update(part)
            if part.min() < 0:
                sequence = block.start + (part < 0).argmax()
                raise UserError(f"{self.index_file}: sequence {sequence} has a negative size; damaged, fetch it again")
        return sizes

    def _check_positions(self, sizes: np.ndarray, digest) -> None:
        begin = 0  # byte of the data set; the sizes fit the files, so nothing overflows
        for block in block_slices(self.documents, "checking positions"):
            lengths, positions = sizes[block].astype(np.int64) * self.dtype.itemsize, self._pointers[block]
            digest.update(positions)
            if (wrong := positions != begin + np.cumsum(lengths) - lengths).any():
                problem = f"position of sequence {block.start + wrong.argmax()} is not the sum of the sizes before it"
                raise UserError(f"{self.index_file}: {problem}")
            begin += int(lengths.sum())

    def _check_marks(self, digest) -> None:
        # The writer of the pre-shuffled data sets never ended a document, so they have only the first mark.
        index, last = self.index_file, 0
        for block in block_slices(self.marks, "checking document marks"):
            marks = self._marks[block]
            digest.update(marks)
            if (block.start == 0 and marks[0] != 0) or (block.stop == self.marks > 1 and marks[-1] != self.documents):
                raise UserError(
                    f"{index}: document marks do not run from 0 to {self.documents}; damaged, fetch it again"
                )
            if (wrong := np.diff(marks, prepend=last) < 0).any():
                mark = block.start + wrong.argmax()
                raise UserError(f"{index}: document marks go backwards after {mark - 1}; damaged, fetch it again")
            last = marks[-1]

    def _checked(self, file: DataFile) -> tuple[int, int, int, str] | None:
        """What `_check` returned when it was called for exactly this file, or None if it was not."""
        try:
            tokens, shortest, longest, digest = read_mark(Path(f"{self.index_file}.json"), [file])["facts"]
            return int(tokens), int(shortest), int(longest), str(digest)
        except (UserError, ValueError, LookupError, TypeError, RecursionError):
            return None

    def verify_index(self, label: str) -> None:
        """Raise UserError if the index is not as it was when it was checked."""
        if sha256(self.sizes.file.blocks(label)) != self.index_sha256:
            raise UserError(f"{self.index_file} is not as it was when it was checked: fetch it again")

    def read(self, position: int, count: int) -> np.ndarray:
        """Return tokens [count] from `position` in the tokens of all documents. Raises IndexError outside the data."""
        return self.gather(np.array([position]), np.array([count]))

    def gather(self, positions: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the tokens of all pieces (position, count) as one array. Raises IndexError outside the data."""
        if (wrong := (positions < 0) | (counts < 0) | (positions + counts > self.tokens)).any():
            k = wrong.argmax()
            raise IndexError(f"tokens {positions[k]} to {positions[k] + counts[k]} of {self.tokens}")
        # Count bytes, because a shard can end within a token (published shards end within rows).
        width = self.dtype.itemsize
        return np.frombuffer(bytearray().join(self._bytes(positions * width, counts * width)), self.dtype)

    def _bytes(self, begins: np.ndarray, sizes: np.ndarray) -> list[bytes]:
        starts, parts = np.array(self._starts), [b""] * len(begins)
        shards = np.minimum(np.searchsorted(starts, begins, side="right"), len(self.shards)) - 1  # of the first byte
        here = np.minimum(sizes, starts[shards + 1] - begins)  # bytes in that shard
        for k in np.unique(shards).tolist():
            chosen = np.flatnonzero(shards == k)
            places = list(zip((begins[chosen] - starts[k]).tolist(), here[chosen].tolist()))
            for i, raw in zip(chosen.tolist(), self.shards[k].read_all(places)):
                parts[i] = raw
        if len(cut := np.flatnonzero(here < sizes)):
            for i, rest in zip(cut.tolist(), self._bytes((begins + here)[cut], (sizes - here)[cut])):
                parts[i] += rest
        return parts

    def spans(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions, in tokens, at which documents start and end: two int64 arrays."""
        # Behind the last position is the first document mark, so there are always 16 bytes to read.
        begins, ends = self._pointers.gather(documents, 2).reshape(-1, 2).T // self.dtype.itemsize
        return begins, np.where(documents == self.documents - 1, self.tokens, ends)

    def span(self, document: int) -> tuple[int, int]:
        """Return the positions, in tokens, at which a document starts and ends."""
        begin, end = self.spans(np.array([document]))
        return begin.item(), end.item()

    def starts(self) -> np.ndarray:
        """Return the bytes of the data set at which the documents start: int64 [documents], memory-mapped."""
        return self._pointers.map()

    def start(self, document: int) -> int:
        """Return the position, in tokens, at which a document starts."""
        return self.span(document)[0]

    def tokens_sha256(self) -> str:
        return sha256(block for shard in self.shards for block in shard.blocks("hashing the tokens"))
