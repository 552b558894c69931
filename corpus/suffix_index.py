"""An index of all tokens, by which a span is found without reading them: suffix arrays, 4 bytes per token.

A suffix array lists where tokens start, in the alphabetic order of the text from there on. So all places of a span are
neighbours in it, and bisection finds the first and the last. pydivsufsort builds it over the bytes of the tokens, the
high byte first, so that the order of bytes is that of tokens; starts within a token are left out.

PREFIX.suffixes/ has a file for every 1 GiB of tokens, int32 [tokens], and beside it a record with the sha256 of the
file and of the tokens. A file is built alone, in 5 times the memory of its tokens. Each also sorts the first OVERLAP
tokens behind its own, so that a span that crosses its end is found.
"""

import argparse
import hashlib
import json
import re
import sys
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from corpus.indexed import (
    TICK,
    DataFile,
    IndexedTokens,
    StoredArray,
    block_slices,
    read_mark,
    sha256,
    write_mark,
)
from runtime.errors import UserError, printable
from runtime.files import atomic_write, reason

SHARD_BYTES = 1 << 30  # of tokens; the suffix array of their bytes must have fewer than 2^31 entries
OVERLAP = 1 << 12  # tokens
AT_ONCE = 1 << 16  # hits that are verified by one read


class Shard:
    """The part of the index with the starts begin .. begin + count - 1. Raises UserError unless it is right."""

    def __init__(self, data: IndexedTokens, number: int):
        self.data, self.number = data, number
        size = SHARD_BYTES // data.dtype.itemsize
        self.begin = number * size
        self.count = min(size, data.tokens - self.begin)
        self.end = min(self.begin + size + OVERLAP, data.tokens)  # of the tokens that are sorted
        name = f"{number:05d}-of-{-(-data.tokens // size):05d}"
        self.path = Path(f"{data.prefix}.suffixes") / f"{name}.i32"
        self.record = self.path.with_suffix(".json")

    def facts(self) -> dict:
        """What the record says besides the hashes."""
        facts = {"format": 1, "begin": self.begin, "count": self.count, "end": self.end}
        return {**facts, "dtype": self.data.dtype.str}

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the tokens that are sorted, in blocks."""
        for block in block_slices(self.end - self.begin, f"reading the tokens of {self.path.name}"):
            yield self.data.read(self.begin + block.start, block.stop - block.start)

    def open(self) -> None:
        """Open the files for `find`. They are hashed if they or the tokens may have changed since that was done.

        Raises UserError if they are absent, damaged, or made from other tokens.
        """
        file = DataFile(self.path)
        try:
            record = DataFile(self.record)
            stored = json.loads(record.read(0, min(record.bytes, 1 << 20)))
            if {name: stored[name] for name in self.facts()} != self.facts() or file.bytes != 4 * self.count:
                raise ValueError("it was made from other data or by another version")
            if not self.is_current(file):
                if sha256(file.blocks(f"hashing {self.path.name}")) != stored["suffixes_sha256"]:
                    raise ValueError("it has changed since it was written")
                if sha256(self.blocks()) != stored["tokens_sha256"]:
                    raise ValueError("the tokens have changed since it was made")
                with suppress(OSError):
                    self.write_record(stored)
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise self.damaged(str(error)) from None
        self.suffixes = StoredArray(file, 0, "<i4", (self.count,))

    def is_current(self, file: DataFile) -> bool:
        """Return whether the record is about exactly this file and these tokens."""
        with suppress(UserError, ValueError):
            return bool(read_mark(self.record, [file, *self.data.shards]))
        return False

    def damaged(self, problem: str) -> UserError:
        again = f"run `python data.py index --data {self.data.prefix}` again"
        return UserError(f"{self.path}: {problem:.200}; delete this file and {again}")

    def write_record(self, hashes: dict) -> None:
        kept = {name: hashes[name] for name in ("tokens_sha256", "suffixes_sha256")}
        write_mark(self.record, [DataFile(self.path), *self.data.shards], **self.facts(), **kept)

    def build(self) -> None:
        """Write the files of this shard. Raises UserError or OSError."""
        divsufsort, width = load_divsufsort(), self.data.dtype.itemsize
        for left in self.path.parent.glob(f".{self.path.stem}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        text, digest, filled = np.empty(self.end - self.begin, f">u{width}"), hashlib.sha256(), 0
        for tokens in self.blocks():
            digest.update(tokens)
            text[filled : filled + len(tokens)] = tokens
            filled += len(tokens)
        suffixes = divsufsort(text.view(np.uint8))  # int32 [width * tokens]
        del text
        kept = 0
        for block in block_slices(len(suffixes), "keeping the starts of tokens"):
            starts = suffixes[block]
            starts = starts[starts % width == 0] // width
            starts = starts[starts < self.count]
            suffixes[kept : kept + len(starts)] = starts
            kept += len(starts)
        hashes = {"tokens_sha256": digest.hexdigest(), "suffixes_sha256": sha256([suffixes[:kept]])}
        with atomic_write(self.path) as file:
            file.write(suffixes[:kept].astype("<i4", copy=False))
        time.sleep(2 * TICK / 1e9)  # read_mark trusts a record only for files that are older than it
        self.write_record(hashes)

    def suffix(self, i: int, length: int) -> bytes:
        """Return the first `length` tokens of a suffix as bytes in the order of the index."""
        start = self.suffixes[i : i + 1].item()
        if not 0 <= start < self.count:
            raise self.damaged(f"entry {i} is {start}")
        return sortable(self.data.read(self.begin + start, min(length, self.end - self.begin - start)))

    def range(self, head: np.ndarray) -> tuple[int, int]:
        """Return the first entry that starts with `head`, at most OVERLAP tokens, and the entry behind the last one."""
        wanted, entries = sortable(head), range(self.count)
        first = bisect_left(entries, wanted, key=lambda i: self.suffix(i, len(head)))
        return first, bisect_right(entries, wanted, first, key=lambda i: self.suffix(i, len(head)))

    def find(self, span: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the positions of a span in the data, int64, ascending in each of the arrays, verified."""
        head = span[:OVERLAP]
        first, last = self.range(head)
        for part in range(first, last, AT_ONCE):
            starts = np.sort(self.suffixes[part : min(part + AT_ONCE, last)].astype(np.int64))
            if starts[0] < 0 or starts[-1] + len(head) > self.end - self.begin or starts[-1] >= self.count:
                raise self.damaged("entries are out of its range")
            positions = self.begin + starts
            if not self.equal(positions, head).all():
                raise self.damaged("entries are not in order")
            if len(span) > len(head):
                positions = positions[positions + len(span) <= self.data.tokens]
                positions = positions[self.equal(positions, span)]
            yield positions

    def equal(self, positions: np.ndarray, span: np.ndarray) -> np.ndarray:
        """Return for each position whether the data has the span there: bool [positions]."""
        tokens = self.data.gather(positions, np.full(len(positions), len(span)))
        return (tokens.reshape(-1, len(span)) == span).all(axis=1)


def sortable(tokens: np.ndarray) -> bytes:
    """Return tokens as bytes that sort as the index sorts tokens: without sign, the high byte first."""
    return tokens.astype(f">u{tokens.itemsize}").tobytes()


def load_divsufsort():
    """Return pydivsufsort.divsufsort. Raises UserError if it is not installed."""
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise UserError("`data.py index` needs pydivsufsort: pip install -e '.[data]'") from None
    return divsufsort


def all_shards(data: IndexedTokens) -> list[Shard]:
    return [Shard(data, k) for k in range(-(-data.tokens * data.dtype.itemsize // SHARD_BYTES))]


class SuffixIndex:
    """The index of a data set: open_index."""

    def __init__(self, shards: list[Shard]):
        self.shards = shards

    def count(self, span: np.ndarray) -> int:
        """Return how often the data has a span; of one with more than OVERLAP tokens, how often it has the first."""
        ranges = (shard.range(span[:OVERLAP]) for shard in self.shards)
        return sum(last - first for first, last in ranges)

    def find(self, span: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the positions of a span in the data, int64. It can cross the end of a document."""
        for shard in self.shards:
            yield from shard.find(span)


def open_index(data: IndexedTokens) -> SuffixIndex | None:
    """Return the index of a data set, or None if there is none. Raises UserError if it is damaged."""
    shards = all_shards(data)
    absent = [shard for shard in shards if not (shard.record.exists() and shard.path.exists())]
    if absent and len(absent) < len(shards):
        note = f"note: {absent[0].path} is not built yet ({len(absent)} of {len(shards)}), so all tokens are read"
        print(printable(note), file=sys.stderr)
    if absent or not shards:
        return None
    for shard in shards:
        shard.open()
    return SuffixIndex(shards)


def add_index_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", required=True, help="prefix or pre-shuffled directory")
    command.add_argument("--shard", metavar="3/16", help="build only the fourth 16th; other machines build the others")


def parse_share(share: str | None) -> tuple[int, int]:
    """Return (3, 16) for "3/16", (0, 1) for None. Raises UserError."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", share or "0/1")
    if not match or not int(match[1]) < int(match[2]):
        raise UserError(f"--shard {share}: give a part and the number of parts, 0/16 to 15/16")
    return int(match[1]), int(match[2])


def build_index(data: IndexedTokens, share: str | None) -> None:
    """Build the shards of the index that are not there, all or those of "3/16". Raises UserError."""
    part, parts = parse_share(share)
    load_divsufsort()
    shards = all_shards(data)
    for shard in shards[part::parts]:
        place = f"{shard.path} ({shard.number + 1} of {len(shards)})"
        try:
            shard.open()
            print(printable(f"{place} is there"))
            continue
        except UserError:  # absent or damaged: it is built
            pass
        started = time.monotonic()
        try:
            shard.path.parent.mkdir(exist_ok=True)
            shard.build()
        except OSError as error:
            raise UserError(f"{shard.path} cannot be written: {reason(error)}") from None
        except MemoryError:
            need = 5 * shard.data.dtype.itemsize * (shard.end - shard.begin) / 1e9
            raise UserError(f"{shard.path}: building it takes {need:.1f} GB of memory") from None
        print(printable(f"{place}: {shard.count:,} tokens in {time.monotonic() - started:.0f} s"), flush=True)
