"""How often a run trains on each token of its data, and how many documents and rows the data has more than once."""

import hashlib

import numpy as np

from corpus.indexed import IndexedTokens, block_slices
from corpus.order import Rows, ShuffledRows, row_digests

BLOCK = 1 << 12  # documents or rows that are in memory at once


def times_trained(rows: Rows, served: int) -> np.ndarray:
    """Return how many tokens are a target 0, 1, 2 ... times in the first `served` rows: int64 [epochs + 1].

    The first token of a row is not a target. In an order it is the last one of another row.
    """
    if isinstance(rows, ShuffledRows) or rows.epochs == 1:  # no token is a target twice
        once = served * rows.seq_len
        return np.array([rows.data.tokens - once, once])
    inverse, epochs, times = rows.inverse, rows.epochs, np.zeros(rows.epochs + 1, np.int64)
    for block in block_slices(rows.data.documents, "counting tokens", BLOCK):
        sizes = inverse.sizes[block].astype(np.int64)
        ends = np.cumsum(sizes)
        places = inverse.places(np.arange(block.start, block.stop)).ravel()
        pieces = inverse.pieces(places, np.zeros_like(places), np.repeat(sizes, epochs))
        pieces = pieces[(pieces["served"] >= 0) & (pieces["served"] < served)]
        begins = (ends - sizes)[pieces["document"] - block.start] + pieces["offset"]  # in the tokens of the block
        stops = begins + pieces["tokens"]
        begins += pieces["position"] == 0
        # Between two neighbours of all begins and stops every token is a target equally often.
        borders = np.concatenate([[0], stops, begins, ends[-1:]])
        change = np.repeat([0, -1, 1, 0], [1, len(stops), len(begins), 1])
        ascending = np.argsort(borders, kind="stable")
        lengths, depth = np.diff(borders[ascending]), np.cumsum(change[ascending])[:-1]
        np.add.at(times, depth, lengths)
    return times


def describe_times(times: np.ndarray) -> str:
    """Return the shares of tokens as text: "never 12.5%, once 50%, twice 37.5%"."""
    names = ["never", "once", "twice", *(f"{n} times" for n in range(3, len(times)))]
    return ", ".join(f"{name} {share:.4%}" for name, share in zip(names, times / times.sum()))


def repeated_documents(data: IndexedTokens) -> int:
    """Return how many documents equal an earlier one. Reads all tokens. See `repeated` for the memory."""
    hashes = np.empty(data.documents, np.uint64)
    for block in block_slices(data.documents, "hashing documents", BLOCK):
        begins, ends = data.spans(np.arange(block.start, block.stop))
        tokens = data.read(begins[0], ends[-1] - begins[0])
        borders = zip((begins - begins[0]).tolist(), (ends - begins[0]).tolist())
        digests = b"".join(hashlib.sha256(tokens[begin:end]).digest()[:8] for begin, end in borders)
        hashes[block] = np.frombuffer(digests, np.uint64)
    return repeated(hashes)


def repeated_rows(rows: Rows, served: int) -> int:
    """Return how many of the first `served` rows equal an earlier one. Reads all of them."""
    hashes = np.empty(served, np.uint64)
    for block in block_slices(served, "hashing rows", BLOCK):
        digests = row_digests(rows.take(np.arange(block.start, block.stop)))  # [rows, 32]
        hashes[block] = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    return repeated(hashes)


def repeated(hashes: np.ndarray) -> int:
    """Return how many hashes, uint64, equal an earlier one. Sorts them in place: 8 bytes per document or row suffice.

    Among the documents of the Pile, two different ones have the same hash with a probability of 0.1%.
    """
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def absent_rows(rows: ShuffledRows) -> str:
    """Return which rows lie in shards that are not here, as text: "0 to 69, 140 to 209"; "" if none does."""
    width, start, spans = (rows.seq_len + 1) * rows.data.dtype.itemsize, 0, []
    for shard in rows.data.shards:
        stop = start + shard.bytes
        if shard.status is None and stop > start:
            spans.append((start // width, (stop - 1) // width))
        start = stop
    return ", ".join(f"{first:,} to {last:,}" for first, last in spans)
