"""The inverse of an order against a walk over its rows and its stream."""

import numpy as np
import pytest
from megatron import copy_golden, random_documents, write_data

from corpus import inverse
from corpus.inverse import invert, last_at_most, ramps
from corpus.order import Order, ShuffledRows
from runtime.errors import UserError

BATCH = 4


def walk(order: Order, document: int, batch_size: int = BATCH, steps: int = 10**9) -> list[dict]:
    """The served pieces of a document, from the rows in the order of training."""
    epochs = {place: copy for copy, place in enumerate(np.flatnonzero(order.doc_idx == document).tolist())}
    size, found = int(np.asarray(order.data.sizes)[document]), []
    for i in range(min(steps * batch_size, len(order) // batch_size * batch_size)):
        row = order.shuffle_idx[i]
        place, position = order.sample_idx[row, 0], 0
        for piece, offset, count in order.pieces(i):
            while order.doc_idx[place] != piece or not np.asarray(order.data.sizes)[piece]:
                place += 1
            if piece == document:
                where = {"step": i // batch_size, "row": i % batch_size, "position": position}
                what = {"document": document, "offset": offset, "tokens": count, "epoch": epochs[int(place)]}
                found.append({**where, **what, "whole": count == size})
            position, place = position + count, place + 1
    return found


@pytest.fixture
def golden(tmp_path):
    return copy_golden(tmp_path)


@pytest.mark.parametrize("name", ["edgeA", "edgeB"])
@pytest.mark.parametrize(("samples", "seed"), [(1, 1), (57, 1234), (80, 42)])
def test_documents_of_the_golden_orders(golden, name, samples, seed):
    """Empty documents, documents of one token, documents that end with a row; one epoch and more."""
    order = Order(golden / name, samples, 64, seed)
    for document in range(order.data.documents):
        assert order.find(document, BATCH) == walk(order, document)
    assert order.find(3, BATCH, steps=2) == walk(order, 3, steps=2)
    assert order.find(3, steps=2) == []  # there is no whole batch of 1024 rows


def test_documents_of_random_orders(tmp_path):
    rng = np.random.default_rng(5)
    for trial in range(40):
        seq_len, longest = int(rng.integers(1, 12)), int(rng.integers(1, 40))
        documents = random_documents(rng, int(rng.integers(1, 20)), longest)
        if sum(map(len, documents)) <= seq_len:
            continue
        write_data(tmp_path / f"{trial}", documents)
        order = Order(tmp_path / f"{trial}", int(rng.integers(1, 60)), seq_len, trial)
        for document in range(len(documents)):
            assert order.find(document, 3) == walk(order, document, 3)


def test_every_token_of_every_copy_is_accounted_for(golden):
    """The pieces of a document, served or not, cover each of its tokens once per copy, and those that two rows share
    twice. Pieces that are never served have no step."""
    order = Order(golden / "edgeB", 40, 64)
    shared = {int(begin): 0 for begin in range(64, len(order.shuffle_idx) * 64, 64)}  # tokens of the stream
    sizes, stream = np.asarray(order.data.sizes), []
    for place, document in enumerate(order.doc_idx.tolist()):
        stream += [(document, place, offset) for offset in range(sizes[document])]
    for document in range(order.data.documents):
        pieces = order.find(document, BATCH, steps=2, unserved=True)
        served = [piece for piece in pieces if piece["step"] is not None]
        assert served == order.find(document, BATCH, steps=2) == pieces[: len(served)]
        assert all(piece["row"] is None for piece in pieces[len(served) :])
        places = np.flatnonzero(order.doc_idx == document).tolist()
        covered = [(p["epoch"], p["offset"] + k) for p in pieces for k in range(p["tokens"])]
        expected = [(places.index(s[1]), s[2]) for s in stream if s[0] == document]
        expected += [(places.index(stream[t][1]), stream[t][2]) for t in shared if stream[t][0] == document]
        assert sorted(covered) == sorted(expected)


def test_documents_that_do_not_exist(golden):
    order = Order(golden / "edgeA", 1, 64)
    for document in (-1, order.data.documents):
        with pytest.raises(UserError, match=f"document {document}: the data has the documents 0 .. "):
            order.find(document)


def test_pre_shuffled_rows_have_no_documents(tmp_path):
    write_data(tmp_path / "document", list(np.ones((8, 65))), marks=[0])
    with pytest.raises(UserError, match="pre-shuffled rows do not say which documents"):
        ShuffledRows(tmp_path, 64).find(0)


def test_the_inverse_is_stored_once(golden, monkeypatch):
    built = Order(golden / "edgeA", 57, 64)
    assert not (built.cache / "places.npy").exists()  # training needs none
    expected = built.find(5, BATCH)
    monkeypatch.setattr(inverse, "invert", lambda _: pytest.fail("computed again"))
    again = Order(golden / "edgeA", 57, 64)
    assert again.find(5, BATCH) == expected
    assert isinstance(again.inverse._places.base, np.memmap)


@pytest.mark.parametrize("name", ["places", "served"])
def test_a_damaged_inverse_gives_no_answer(golden, name):
    """Every number in turn is replaced: an answer is right or refused."""
    order = Order(golden / "edgeA", 57, 64)
    expected = [order.find(document, BATCH) for document in range(order.data.documents)]
    path, refused = order.cache / f"{name}.npy", 0
    right = np.load(path)
    for at in range(0, len(right), 7):
        wrong = right.copy()
        wrong[at] = [right[at - 1], 2**32 - 1][at % 2]
        np.save(path, wrong)
        order = Order(golden / "edgeA", 57, 64)
        for document in range(0, order.data.documents):
            try:
                found = order.find(document, BATCH)
            except UserError as error:
                refused += f"{name}.npy does not fit the order: delete this file" in str(error)
            else:
                assert found == expected[document]
    assert refused > len(right) // 8
    path.write_bytes(path.read_bytes()[:-3])  # not a whole file: computed again
    assert Order(golden / "edgeA", 57, 64).find(5, BATCH) == expected[5]


def test_an_order_that_cannot_be_stored(golden, monkeypatch):
    order = Order(golden / "edgeA", 57, 64)
    expected = order.find(5, BATCH)
    order = Order(golden / "edgeA", 57, 64)
    order.cache = golden / "absent"
    assert order.find(5, BATCH) == expected


def test_helpers_equal_numpy():
    rng = np.random.default_rng(3)
    for _ in range(100):
        array = np.sort(rng.integers(0, 50, int(rng.integers(1, 60))))
        array[0] = 0
        values = rng.integers(0, 60, 20)
        np.testing.assert_array_equal(last_at_most(array, values), np.searchsorted(array, values, "right") - 1)
        for dtype in (np.int32, np.uint32, np.int64):
            shuffled = rng.permutation(array).astype(dtype)
            np.testing.assert_array_equal(invert(shuffled), np.argsort(shuffled, kind="stable"))
    np.testing.assert_array_equal(ramps(np.array([2, 0, 3, 0])), [0, 1, 0, 1, 2])
