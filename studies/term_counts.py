"""How often a run has seen terms by each step: whole words, in all rows that it served.

    counts = TermCounts(rows, batch_size, steps, {"24": spans, ..}, tokenizer)
    counts.rows_with(("24",), step), counts.occurrences("24", step)

A term counts where its tokens stand in one document and in one row, with and without a space before it, unless a
letter, a digit or an underscore stands directly beside it: 24 is not in 1924, nor in a24.
"""

from itertools import pairwise

import numpy as np
from tokenizers import Tokenizer

from corpus.order import Rows, served_rows
from corpus.search import MOST_PAIRS, occurrences
from corpus.suffix_index import open_index
from runtime.errors import UserError


def word_edges(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
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
        for which, pieces in occurrences(rows, spans, open_index(rows.data)):
            pieces = pieces[pieces["whole"] & (pieces["served"] >= 0) & (pieces["served"] < last)]
            pieces = pieces[are_words(rows, pieces, edges)]
            new = term_of[which[pieces["span"]]] * last + pieces["served"]
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


def are_words(rows: Rows, pieces: np.ndarray, edges: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Whether no part of a word stands beside pieces (PIECE), which are whole spans: bool [pieces]."""
    data, begins_word, ends_word = rows.data, *edges
    if (pieces["document"] >= 0).all():
        begin, end = data.spans(pieces["document"])
        first = begin + pieces["offset"]
    else:  # pre-shuffled rows do not know their documents
        begin = pieces["served"] * (rows.seq_len + 1)
        first, end = begin + pieces["position"], begin + rows.seq_len + 1
    behind = first + pieces["tokens"]
    inside, outside = data.gather(first, pieces["tokens"]), np.cumsum(pieces["tokens"])
    ends = inside[outside - 1], inside[outside - pieces["tokens"]]  # the last and the first token of each span
    free = np.ones(len(pieces), bool)
    for places, exists, beside, own in (
        (behind, behind < end, begins_word, ends_word[ends[0]]),
        (first - 1, first > begin, ends_word, begins_word[ends[1]]),
    ):
        at = np.flatnonzero(exists & own)  # a term that ends with ! ends there, whatever follows
        free[at] &= ~beside[data.gather(places[at], np.ones(len(at), np.int64))]
    return free
