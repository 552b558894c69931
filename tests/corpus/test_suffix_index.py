"""The suffix index: what is damaged is refused or found out, what is there is not built again. What it finds is
compared with brute force in test_search.py."""

import numpy as np
import pytest
from megatron import random_documents, write_data

from corpus import search, suffix_index
from corpus.indexed import IndexedTokens
from corpus.suffix_index import build_index, open_index
from runtime.errors import UserError

pytest.importorskip("pydivsufsort")


@pytest.fixture
def data(tmp_path, monkeypatch) -> IndexedTokens:
    """A data set with an index of several shards."""
    monkeypatch.setattr(suffix_index, "SHARD_BYTES", 200)
    monkeypatch.setattr(suffix_index, "OVERLAP", 4)
    monkeypatch.setattr(suffix_index, "TICK", 0)
    write_data(tmp_path / "data", random_documents(np.random.default_rng(0), 20, 40, 5))
    built = IndexedTokens(tmp_path / "data")
    build_index(built, None)
    return built


def files(data: IndexedTokens) -> list:
    return sorted(data.prefix.parent.glob("data.suffixes/*.i32"))


def test_only_what_is_missing_or_damaged_is_built_again(data, capsys):
    paths = files(data)
    assert len(paths) > 3
    before = [path.read_bytes() for path in paths]
    paths[1].write_bytes(before[1][:-4])
    with pytest.raises(UserError, match=f"{paths[1]}.*delete this file and run .*index --data"):
        open_index(data)
    paths[0].unlink()
    paths[2].with_suffix(".json").write_text("{")
    assert open_index(data) is None
    capsys.readouterr()
    build_index(data, None)
    assert capsys.readouterr().out.count("is there") == len(paths) - 3
    assert [path.read_bytes() for path in paths] == before


def test_parts_on_several_machines_are_the_whole(data):
    before = {path: path.read_bytes() for path in files(data)}
    for path in data.prefix.parent.glob("data.suffixes/*"):
        path.unlink()
    build_index(data, "0/2")
    assert open_index(data) is None  # not whole: find reads all tokens
    build_index(data, "1/2")
    assert {path: path.read_bytes() for path in files(data)} == before
    for text in ("2/2", "x", "1", "-1/2", "0/0"):
        with pytest.raises(UserError, match="--shard"):
            build_index(data, text)


def test_other_tokens_are_noticed(data):
    path = data.files[0]
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    with pytest.raises(UserError, match="the tokens have changed"):
        open_index(IndexedTokens(data.prefix))


@pytest.mark.slow
def test_a_damaged_index_gives_no_wrong_answer(data, monkeypatch):
    """20,000 flipped bytes behind the check of the hashes: the places are right and complete, or it is refused."""
    rng, refused = np.random.default_rng(1), 0
    tokens = data.read(0, data.tokens)
    index = open_index(data)
    whole = [np.fromfile(path, "<i4") for path in files(data)]
    for _ in range(20_000):
        k = rng.integers(len(whole))
        damaged = whole[k].view(np.uint8).copy()
        damaged[rng.integers(len(damaged))] ^= rng.integers(1, 256)
        index.shards[k].suffixes = damaged.view("<i4")
        start = int(rng.integers(0, len(tokens) - 4))
        span = tokens[start : start + 3]
        try:
            found = [position for part in index.find(span) for position in part.tolist()]
            assert all((tokens[position : position + 3] == span).all() for position in found)
        except UserError:
            refused += 1
        index.shards[k].suffixes = whole[k]
    assert 0 < refused < 20_000


def test_without_the_library(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydivsufsort", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[data\]'"):
        build_index(data, None)
    assert search.open_index(data) is not None  # to ask an index needs no library
