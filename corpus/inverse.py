"""The order inverted: from tokens of a document to every row that contains them.

A span of tokens lies at a place of doc_idx (document), then somewhere in the stream, then in one row or more. Each copy
of a document in the order has a place of its own. Two maps are inverted for this:

    places   [documents, epochs]  where doc_idx has each document, ascending
    served   [rows]               where shuffle_idx has each row of the stream

They take 4 bytes per entry and are stored beside the order. Every answer is checked against doc_idx and shuffle_idx.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from corpus.indexed import IndexedTokens, block_slices, open_npy
from runtime.errors import UserError, printable
from runtime.files import atomic_write

# The tokens of a span that one row contains. -1 stands for "none": the run's data has no such row or document.
PIECE = np.dtype(
    [
        ("span", "i8"),  # which of the spans that were asked for
        ("served", "i8"),  # number of the row, as served
        ("position", "i8"),  # of the first token, in the row
        ("document", "i8"),
        ("offset", "i8"),  # of the first token, in the document
        ("tokens", "i8"),  # how many tokens of the span are in this row
        ("epoch", "i8"),  # which copy of the document in the order, from 0
        ("whole", "?"),  # all of the span is in this row
    ]
)


def last_at_most(array: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return for each value the last index i with array[i] <= value: int64 [values].

    The array is ascending, array[0] <= every value. np.searchsorted would copy an array that is not contiguous, and
    most arrays here are gigabytes in a file.
    """
    low, high = np.zeros(len(values), np.int64), np.full(len(values), len(array), np.int64)
    while (high - low > 1).any():
        middle = (low + high) // 2
        right = array[middle] <= values
        low, high = np.where(right, middle, low), np.where(right, high, middle)
    return low


def ramps(counts: np.ndarray) -> np.ndarray:
    """Return 0 .. counts[0] - 1, then 0 .. counts[1] - 1, and so on, as one array."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


def invert(array: np.ndarray) -> np.ndarray:
    """Return the indices at which the array has 0, then those at which it has 1, and so on; uint32 [len(array)].

    This is a stable argsort. To sort numbers that hold value and index is much quicker; it takes 12 bytes per entry.
    """
    if array.dtype.itemsize > 4:
        return np.argsort(array, kind="stable")
    keys = np.empty(len(array), np.uint64)
    for block in block_slices(len(array), "inverting the order"):
        indices = np.arange(block.start, block.stop, dtype=np.uint64)
        keys[block] = array[block].astype(np.uint64) << np.uint64(32) | indices
    keys.sort()
    return keys.astype(np.uint32)


def stored_inverse(path: Path, array: np.ndarray) -> np.ndarray:
    """Return invert(array), memory-mapped from a file, which is written if it is not there."""
    try:
        found = open_npy(path)
        if found.shape == array.shape and found.dtype in (np.uint32, np.int64):
            return found.map()
    except (UserError, ValueError):  # absent, or not a whole .npy file
        pass
    if len(array) > 10_000_000:
        print(printable(f"note: inverting {len(array):,} entries, only this time: {path}"), file=sys.stderr)
    inverse = invert(array)
    try:
        with atomic_write(path) as file:
            np.save(file, inverse, allow_pickle=False)
    except OSError:  # a directory that cannot be written: the order is not stored there either
        pass
    return inverse


class Inverse:
    """Finds the rows of an order that contain given tokens. Its maps are those of corpus.order.index_maps.

    cache is the directory of the order; the two inverted maps are stored there.
    """

    def __init__(
        self,
        doc_idx: np.ndarray,
        sample_idx: np.ndarray,
        shuffle_idx: np.ndarray,
        data: IndexedTokens,
        seq_len: int,
        cache: Path,
    ):
        self.doc_idx, self.sample_idx, self.shuffle_idx = doc_idx, sample_idx, shuffle_idx
        self.sizes, self.seq_len, self.cache, self.documents = data.sizes.map(), seq_len, cache, data.documents
        self._places = stored_inverse(cache / "places.npy", doc_idx).reshape(data.documents, -1)
        self._served = stored_inverse(cache / "served.npy", shuffle_idx)

    def places(self, documents: np.ndarray) -> np.ndarray:
        """Return where doc_idx has these documents: int64 [documents, epochs], ascending along epochs."""
        places = self._places[documents].astype(np.int64)
        # Each document has as many copies as epochs. So if all places hold it and ascend, none is missing.
        self._check("places.npy", places < len(self.doc_idx))
        self._check("places.npy", self.doc_idx[places] == documents[:, None])
        self._check("places.npy", np.diff(places, axis=1) > 0)
        return places

    def _check(self, name: str, right: np.ndarray) -> None:
        if not right.all():
            raise UserError(f"{self.cache / name} does not fit the order: delete this file, it is computed again")

    def begins(self, places: np.ndarray) -> np.ndarray:
        """Return the token of the stream at which the document at each place begins: int64 [places].

        The last row that starts in this document or before it tells where it starts itself. The documents between that
        start and the place are fewer than the tokens of a row, without the empty ones.
        """
        rows = last_at_most(self.sample_idx[:, 0], places)
        first, offset = self.sample_idx[rows].astype(np.int64).T
        between = places - first
        sizes = self.sizes[self.doc_idx[np.repeat(first, between) + ramps(between)]]
        sums, ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]), np.cumsum(between)
        return rows * self.seq_len - offset + sums[ends] - sums[ends - between]

    def pieces(self, places: np.ndarray, offsets: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Return the pieces of spans in the rows of the order: PIECE [pieces], `span` is an index in `places`.

        A span starts `offsets` tokens after the start of the document at a place of doc_idx, and has `counts` tokens.
        Neighbouring rows share a token, so a span can have pieces in two rows although one of them has it whole. The
        stream's end fills no row: tokens there are a piece whose `served` and `position` are -1.
        """
        seq_len, rows = self.seq_len, len(self.shuffle_idx)
        begins = self.begins(places) + offsets
        ends = begins + counts
        first = np.maximum((begins - 1) // seq_len, 0)
        times = (ends - 1) // seq_len + 1 - first
        span = np.repeat(np.arange(len(places)), times)
        row = first[span] + ramps(times)  # of the stream
        row_begin = row * seq_len
        start = np.maximum(begins[span], row_begin + (row == rows))  # the last row has the first token behind it
        stop = np.minimum(ends[span], row_begin + seq_len + 1)
        kept = stop > start
        span, row, row_begin, start, stop = (array[kept] for array in (span, row, row_begin, start, stop))
        found = np.empty(len(span), PIECE)
        found["span"], found["tokens"], found["whole"] = span, stop - start, stop - start == counts[span]
        in_row = row < rows
        served = self._served[row[in_row]].astype(np.int64)
        self._check("served.npy", (served >= 0) & (served < rows))
        self._check("served.npy", self.shuffle_idx[served] == row[in_row])
        found["served"], found["position"] = -1, np.where(in_row, start - row_begin, -1)
        found["served"][in_row] = served
        self._name_documents(found, places[span], offsets[span] + start - begins[span])
        return found

    def _name_documents(self, found: np.ndarray, places: np.ndarray, offsets: np.ndarray) -> None:
        """Fill in document, offset and epoch of pieces that start `offsets` tokens after the start of a document.

        A span with an end-of-text token can go on in the next document, and a piece of it can start there.
        """
        while (beyond := np.flatnonzero(offsets >= (sizes := self.sizes[self.doc_idx[places]]))).size:
            offsets[beyond] -= sizes[beyond]
            places[beyond] += 1
        found["document"], found["offset"] = self.doc_idx[places], offsets
        found["epoch"] = (self._places[found["document"]] < places[:, None]).sum(axis=1)


def sort_served(pieces: np.ndarray, rows: int) -> np.ndarray:
    """Return the pieces in the order of (row as served, position); at the end those outside of the first `rows`."""
    unserved = (pieces["served"] < 0) | (pieces["served"] >= rows)
    return pieces[np.lexsort((pieces["offset"], pieces["document"], pieces["position"], pieces["served"], unserved))]


def as_json(pieces: np.ndarray, batch_size: int, rows: int) -> Iterator[dict]:
    """Yield each piece as `data.py find --json` prints it, for a run that serves the first `rows` rows."""
    for _, served, position, document, offset, tokens, epoch, whole in pieces.tolist():
        is_served = 0 <= served < rows
        yield {
            "step": served // batch_size if is_served else None,
            "row": served % batch_size if is_served else None,
            "position": None if position < 0 else position,
            "document": None if document < 0 else document,
            "offset": None if offset < 0 else offset,
            "tokens": tokens,
            "epoch": None if epoch < 0 else epoch,
            "whole": whole,
        }
