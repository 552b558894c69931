"""How often a run has seen terms by each step: whole words, in all rows that it served.

    counts = TermCounts(rows, batch_size, steps, {"24": spans, ..}, tokenizer)
    counts.rows_with(("24",), step), counts.occurrences("24", step)

A term counts where its tokens stand in one document and in one row, with and without a space before it, unless a
letter, a digit or an underscore stands directly beside it: 24 is not in 1924, nor in a24. Rows with edits are searched
as they were served; the end of such a row is the end of a word.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from corpus.indexed import block_slices
from corpus.order import Order, Rows, served_rows
from corpus.search import MOST_PAIRS, find_group, group_spans, occurrences
from corpus.suffix_index import open_index
from runtime.errors import UserError

Edges = tuple[np.ndarray, np.ndarray]  # of word_edges
Places = Iterator[tuple[np.ndarray, np.ndarray]]  # which span [places], row as served [places]


def word_edges(tokenizer: Tokenizer) -> Edges:
    """Whether each token begins, and ends, with a part of a word: bool [vocabulary] each."""
    ids = range(max(tokenizer.get_vocab().values()) + 1)
    texts = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)
    # A part of a letter of several bytes is decoded as U+FFFD.
    is_part = [[char.isalnum() or char in "_\ufffd" for char in (text[:1], text[-1:]) if char] for text in texts]
    return tuple(np.array([parts[k] if parts else False for parts in is_part]) for k in (0, -1))


class TermCounts:
    """The places of terms in the rows that a run served. Raises UserError if there are too many to hold in memory.

    terms: for each term its spans of tokens, with and without a space before it.
    """

    def __init__(
        self, rows: Rows, batch_size: int, steps: int, terms: dict[str, list[np.ndarray]], tokenizer: Tokenizer
    ):
        self.terms, self.batch_size = {term: k for k, term in enumerate(terms)}, batch_size
        edges, last = word_edges(tokenizer), served_rows(rows, batch_size, steps)
        spans = [span for several in terms.values() for span in several]
        term_of = np.repeat(np.arange(len(terms)), [len(several) for several in terms.values()])
        codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        search = spans_with_edits if rows.edits else spans_in_data
        for which, row in search(rows, spans, edges, last):
            new = term_of[which] * last + row
            codes, index = np.unique(np.concatenate([codes, new]), return_inverse=True)
            counts = np.bincount(index, np.concatenate([counts, np.ones(len(new), np.int64)]), len(codes))
            if len(codes) > MOST_PAIRS:
                raise UserError(f"the terms are in more than {MOST_PAIRS:,} rows; count fewer at a time")
        bounds = np.searchsorted(codes, np.arange(len(terms) + 1) * last)
        self._rows = [codes[begin:end] - k * last for k, (begin, end) in enumerate(pairwise(bounds))]
        self._counts = [counts[begin:end].astype(np.int64) for begin, end in pairwise(bounds)]

    def occurrences(self, term: str, step: int) -> int:
        """How often the rows before a step have the term."""
        k = self.terms[term]
        return int(self._counts[k][: np.searchsorted(self._rows[k], step * self.batch_size)].sum())

    def rows_with(self, terms: tuple[str, ...], step: int) -> int:
        """How many rows before a step have all of the terms."""
        return int(np.searchsorted(self._common(terms), step * self.batch_size))

    def _common(self, terms: tuple[str, ...]) -> np.ndarray:
        first, *others = (self._rows[self.terms[term]] for term in terms)
        for rows in others:
            first = np.intersect1d(first, rows, assume_unique=True)
        return first


def spans_in_data(rows: Rows, spans: list[np.ndarray], edges: Edges, last: int) -> Places:
    """The whole words that are one of the spans, in the rows before `last`, without edits."""
    data = rows.data
    for which, pieces in occurrences(rows, spans, open_index(data)):
        pieces = pieces[pieces["whole"] & (pieces["served"] >= 0) & (pieces["served"] < last)]
        if isinstance(rows, Order):
            begin, end = data.spans(pieces["document"])
            first = begin + pieces["offset"]
        else:  # pre-shuffled rows do not know their documents
            begin = pieces["served"] * (rows.seq_len + 1)
            first, end = begin + pieces["position"], begin + rows.seq_len + 1
        read = lambda positions: data.gather(positions, np.ones_like(positions))  # noqa: E731
        kept = are_words(first, first + pieces["tokens"], begin, end, read, edges)
        yield which[pieces["span"][kept]], pieces["served"][kept]


def spans_with_edits(rows: Rows, spans: list[np.ndarray], edges: Edges, last: int) -> Places:
    """The same in the rows as served: what the data has in rows without edits, and a search in those with edits."""
    edited = np.unique(np.concatenate([np.zeros(0, np.int64), *(part["row"] for part in rows.edits.groups())]))
    edited, width = edited[edited < last], rows.seq_len + 1
    for which, row in spans_in_data(rows, spans, edges, last):
        kept = ~np.isin(row, edited)
        yield which[kept], row[kept]
    lengths = np.array([len(span) for span in spans])
    for block in block_slices(len(edited), "searching edited rows", 1 << 10):
        tokens = rows.take(edited[block]).ravel()
        for group in group_spans(spans, tokens):
            which, first = find_group(group, tokens)
            behind, begin = first + lengths[which], first // width * width
            inside = behind <= begin + width
            kept = inside & are_words(first, behind, begin, begin + width, tokens.take, edges)
            yield which[kept], edited[block][first[kept] // width]


def are_words(
    first: np.ndarray,
    behind: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    read: Callable[[np.ndarray], np.ndarray],
    edges: Edges,
) -> np.ndarray:
    """Whether no part of a word goes on beside the spans first .. behind - 1 in texts begin .. end - 1: bool [spans].

    read(positions) gives the tokens there. A span that begins with a space, or ends with a dot, ends there itself.
    """
    begins_word, ends_word = edges
    free = np.ones(len(first), bool)
    for inner, outer, exists, own, beside in (
        (behind - 1, behind, behind < end, ends_word, begins_word),
        (first, first - 1, first > begin, begins_word, ends_word),
    ):
        at = np.flatnonzero(exists)
        free[at] &= ~(own[read(inner[at])] & beside[read(outer[at])])
    return free
