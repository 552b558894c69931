"""Spans and counts against brute force over the stream and the rows, on alphabets so small that everything repeats."""

from itertools import pairwise

import numpy as np
import pytest
from megatron import random_documents, write_data

from corpus import search, suffix_index
from corpus.order import Order, ShuffledRows
from corpus.search import count_spans, occurrences

BATCH = 3


def brute_force(order: Order, span: np.ndarray) -> list[tuple]:
    """Every piece of every occurrence of a span in the stream: (row as served, position, document, offset, tokens,
    epoch, whole)."""
    sizes, starts = np.asarray(order.data.sizes), [order.data.start(d) for d in range(order.data.documents)]
    everything = order.data.read(0, order.data.tokens)
    stream = [
        (int(everything[starts[document] + offset]), place, document, offset)
        for place, document in enumerate(order.doc_idx.tolist())
        for offset in range(sizes[document])
    ]
    seq_len, n, found = order.seq_len, len(span), []
    served = {row: i for i, row in enumerate(order.shuffle_idx.tolist())}
    for s in range(len(stream) - n + 1):
        here = stream[s : s + n]
        if [token for token, *_ in here] != span.tolist():
            continue
        if any(a[1] != b[1] and a[0] != 0 for a, b in pairwise(here)):
            continue
        for row in range(len(order.shuffle_idx) + 1):
            is_row = row in served  # the end of the stream fills no row
            begin, end = max(s, row * seq_len + (not is_row)), min(s + n, row * seq_len + seq_len + 1)
            if begin < end:
                _, place, document, offset = stream[begin]
                epoch = int((order.doc_idx[:place] == document).sum())
                where = (served[row], begin - row * seq_len) if is_row else (-1, -1)
                found.append((*where, document, offset, end - begin, epoch, end - begin == n))
    return sorted(found)


def found_by(rows, span, index=None) -> list[tuple]:
    found = [piece[1:] for _, pieces in occurrences(rows, [span], index) for piece in pieces.tolist()]
    return sorted(found)


def small_data(rng, prefix, dtype="<u2", code=8) -> None:
    """Up to 12 documents over an alphabet of 2 to 4 tokens; some are empty, some end with the end of text, 0."""
    vocab = int(rng.integers(2, 5))
    documents = random_documents(rng, int(rng.integers(1, 12)), int(rng.integers(2, 40)), vocab)
    documents = [np.append(d, np.zeros(rng.integers(0, 2), "<u2")) for d in documents]
    write_data(prefix, [np.ones(9, "<u2"), *documents], dtype, code)


def spans_for(rng, data, count) -> list[np.ndarray]:
    """Spans that occur in the data, and some that do not."""
    tokens = data.read(0, data.tokens)
    result = []
    for _ in range(count):
        length = int(rng.integers(1, 8))
        start = int(rng.integers(0, max(len(tokens) - length, 1)))
        span = tokens[start : start + length].copy()
        if rng.random() < 0.2:
            span[rng.integers(len(span))] = 3
        result.append(span)
    return result


@pytest.fixture
def indexed(monkeypatch):
    """indexed(data) builds an index in tiny shards, which is asked however small the data is."""
    pytest.importorskip("pydivsufsort")
    monkeypatch.setattr(suffix_index, "SHARD_BYTES", 64)
    monkeypatch.setattr(suffix_index, "OVERLAP", 3)
    monkeypatch.setattr(suffix_index, "TICK", 0)
    monkeypatch.setattr(search, "is_quicker", lambda *_: True)

    def build(data) -> suffix_index.SuffixIndex:
        suffix_index.build_index(data, None)
        return suffix_index.open_index(data)

    return build


@pytest.mark.parametrize("how", ["scan", "index"])
def test_spans_equal_brute_force(tmp_path, indexed, monkeypatch, how):
    monkeypatch.setattr(search, "BLOCK", 16)
    rng, whole, cut, crossing = np.random.default_rng(7), 0, 0, 0
    for trial in range(25):
        small_data(rng, tmp_path / f"{trial}", *[("<u2", 8), ("<i4", 4)][trial % 2])
        order = Order(tmp_path / f"{trial}", int(rng.integers(1, 40)), int(rng.integers(2, 9)), trial)
        index = indexed(order.data) if how == "index" else None
        for span in spans_for(rng, order.data, 12):
            expected = brute_force(order, span)
            assert found_by(order, span, index) == expected, (trial, span)
            whole, cut = whole + sum(p[-1] for p in expected), cut + sum(not p[-1] for p in expected)
            crossing += len(expected) * bool((span[:-1] == 0).any())
    assert min(whole, cut, crossing) > 100


def test_whole_pieces_are_what_the_rows_have(tmp_path):
    """Against the rows as served, without the maps: every place of a row at which its tokens are the span."""
    rng = np.random.default_rng(8)
    documents = [np.append(d, np.uint16(0)) for d in random_documents(rng, 30, 20, 3) if len(d)]
    write_data(tmp_path / "data", documents)
    order = Order(tmp_path / "data", 200, 16)
    served = order.take(np.arange(len(order)))
    for span in spans_for(rng, order.data, 20):
        n = len(span)
        rows = {(i, p) for i, row in enumerate(served) for p in range(18 - n) if (row[p : p + n] == span).all()}
        pieces = [p for _, array in occurrences(order, [span], None) for p in array.tolist()]
        # Where a document ends with 0 in every case, no occurrence crosses an end without one.
        assert {(p[1], p[2]) for p in pieces if p[-1] and 0 <= p[1] < len(order)} == rows


@pytest.mark.parametrize("how", ["scan", "index"])
def test_pre_shuffled_rows(tmp_path, indexed, how):
    rng = np.random.default_rng(9)
    rows = rng.integers(0, 3, (20, 9)).astype("<u2")
    write_data(tmp_path / "document", list(rows), marks=[0])
    served = ShuffledRows(tmp_path, 8)
    index = indexed(served.data) if how == "index" else None
    for span in spans_for(rng, served.data, 30):
        n = len(span)
        expected = [
            (i, p, -1, -1, n, -1, True) for i in range(20) for p in range(10 - n) if (rows[i, p : p + n] == span).all()
        ]
        assert found_by(served, span, index) == expected


def brute_count(order, spans, step, batch_size) -> tuple[int, int, int]:
    """Occurrences, rows and documents of spans in the rows of the steps 0 .. step - 1."""
    pieces = [p for span in spans for p in brute_force(order, span) if p[-1] and 0 <= p[0] < step * batch_size]
    return len(pieces), len({p[0] for p in pieces}), len({p[2] for p in pieces})


@pytest.mark.parametrize("how", ["scan", "index"])
def test_counts_equal_brute_force(tmp_path, indexed, monkeypatch, how):
    monkeypatch.setattr(search, "BLOCK", 16)
    rng = np.random.default_rng(10)
    for trial in range(8):
        small_data(rng, tmp_path / f"{trial}")
        order = Order(tmp_path / f"{trial}", 60, 5, trial)
        index = indexed(order.data) if how == "index" else None
        different = {span.tobytes(): span for span in spans_for(rng, order.data, 7)}
        terms = {f"{k}": [span] for k, span in enumerate(different.values())}
        terms["two"] = [*different.values()][:2]  # a span of more than one term
        at = [1, 2, 5, len(order) // BATCH]
        counted = [*count_spans(order, terms, at, BATCH, index)]
        assert [(record["term"], record["step"]) for record in counted] == [(term, s) for term in terms for s in at]
        for record in counted:
            expected = brute_count(order, terms[record["term"]], record["step"], BATCH)
            assert (record["occurrences"], record["rows"], record["documents"]) == expected


def test_the_hash_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(search, "hash_windows", lambda tokens, starts, length: np.zeros(len(starts), np.uint64))
    rng = np.random.default_rng(11)
    small_data(rng, tmp_path / "data")
    order = Order(tmp_path / "data", 9, 6)
    different = [*{span.tobytes(): span for span in spans_for(rng, order.data, 9)}.values()]
    found = [(which[p[0]], *p[1:]) for which, array in occurrences(order, different, None) for p in array.tolist()]
    assert sorted(found) == [(k, *piece) for k, span in enumerate(different) for piece in brute_force(order, span)]
