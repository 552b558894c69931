"""The data path against arrays of GPT-NeoX's own code (golden/order), a naive walk of the stream, and broken files."""

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
from corpus import indexed
from corpus import order as order_module
from corpus.indexed import IndexedTokens
from corpus.loader import batch_sha256
from corpus.order import Order, ShuffledRows, index_maps
from data import batch, check_vocab, row_numbers
from runtime.errors import UserError

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO / "tests/golden/order"
MISC = json.loads((GOLDEN / "misc.json").read_text())
MAPS = ("doc_idx", "sample_idx", "shuffle_idx")


@pytest.fixture
def golden(tmp_path):
    """Copies of the golden data sets, as the order is cached beside the data."""
    for name in ("synth500", "edgeA", "edgeB"):
        for suffix in (".bin", ".idx"):
            shutil.copy(GOLDEN / (name + suffix), tmp_path)
    return tmp_path


def arrays(name):
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def write_index(prefix, sizes, code=8, itemsize=2, marks=None):
    """An .idx by the format's description, independent of prepare.py."""
    ends = np.cumsum(sizes, dtype=np.int64) * itemsize
    marks = range(len(sizes) + 1) if marks is None else marks
    raw = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(marks))
    raw += np.array(sizes, "<i4").tobytes() + (ends - np.array(sizes, np.int64) * itemsize).astype("<i8").tobytes()
    raw += np.array(marks, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(raw)
    return raw


def write_data(prefix, documents, dtype="<u2", code=8, marks=None):
    tokens = np.concatenate([np.zeros(0, dtype), *documents]).astype(dtype)
    Path(f"{prefix}.bin").write_bytes(tokens.tobytes())
    write_index(prefix, [len(d) for d in documents], code, tokens.itemsize, marks)
    return tokens


def random_documents(rng, count, longest, vocab=60000):
    return [rng.integers(0, vocab, rng.integers(0, longest + 1)).astype("<u2") for _ in range(count)]


def cut_into_shards(prefix, cuts, last_is_count=False):
    """PREFIX.bin -> shards that end at the bytes `cuts`."""
    whole = Path(f"{prefix}.bin")
    raw = whole.read_bytes()
    whole.unlink()
    parts = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)])]
    total = len(parts) - (not last_is_count)
    for number, part in enumerate(parts):
        Path(f"{prefix}-{number:05d}-of-{total:05d}.bin").write_bytes(part)


# --- The published order --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["lt1", "eq1", "eq1plus1", "ep1p5", "ep3p2"])
@pytest.mark.parametrize("seq_len", [64, 2048])
def test_order_equals_neox(golden, seq_len, case):
    truth = arrays(f"gpt2ds_L{seq_len}_seed1234")
    requested, epochs, built, served = truth[f"{case}_meta"].tolist()
    order = Order(golden / "synth500", requested, seq_len)
    for name in MAPS:
        array, expected = getattr(order, name), truth[f"{case}_{name}"]
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert (order.epochs, len(order.shuffle_idx), len(order)) == (epochs, built, served)
    np.testing.assert_array_equal([order[i] for i in range(20)], truth[f"{case}_first20"])
    np.testing.assert_array_equal([order[i] for i in range(served - 20, served)], truth[f"{case}_last20"])
    assert order[0].dtype == np.uint16


@pytest.mark.parametrize("case", ["n1", "eq1", "ep2", "ep3p2"])
@pytest.mark.parametrize("seed", [1, 42, 1234])
@pytest.mark.parametrize("name", ["edgeA", "edgeB"])
def test_empty_and_short_documents_equal_neox(golden, name, seed, case):
    truth = {key: value for key, value in arrays(f"{name}_golden").items() if key.startswith(f"s{seed}_{case}_")}
    truth = {key.removeprefix(f"s{seed}_{case}_"): value for key, value in truth.items()}
    requested, epochs, built, served = truth["meta"].tolist()
    order = Order(golden / name, requested, 64, seed)
    for key in MAPS:
        assert getattr(order, key).dtype == truth[key].dtype
        np.testing.assert_array_equal(getattr(order, key), truth[key])
    assert (order.epochs, len(order.shuffle_idx), len(order)) == (epochs, built, served)
    np.testing.assert_array_equal([order[i] for i in range(len(order))], truth["all_rows"])


@pytest.mark.parametrize("case", MISC["randomstate_shuffle"], ids=lambda case: case["seed"])
def test_shuffles(case):
    """The maps of 20 documents and 33 rows are the two published shuffles, one generator after the other."""
    assert np.random.RandomState(case["seed"]).randint(0, 2**32, 8, np.uint32).tolist() == case["first_u32"]
    maps = index_maps(np.array([2] * 14 + [1] * 6), epochs=1, seq_len=1, seed=case["seed"])
    assert maps["doc_idx"].tolist() == case["shuffle20_int32"]
    assert maps["shuffle_idx"].tolist() == case["then_shuffle33_uint32"]


def neox_sample_idx(sizes, doc_idx, rows, seq_len):
    """The loop of GPT-NeoX v1.0, megatron/data/helpers.cpp, build_sample_idx."""
    place, offset, result = 0, 0, [(0, 0)]
    for _ in range(rows):
        remaining = seq_len + 1
        while remaining:
            length = sizes[doc_idx[place]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                place, offset = place + 1, 0
        result.append((place, offset))
    return result


def test_order_of_random_data_equals_a_naive_walk(tmp_path, monkeypatch):
    # Blocks of three documents: what is vectorised over blocks must not notice where they end.
    whole = indexed.block_slices
    for module in (indexed, order_module):
        monkeypatch.setattr(module, "block_slices", lambda count, label, size=3: whole(count, label, size))
    rng = np.random.default_rng(0)
    for trial in range(60):
        documents = random_documents(rng, int(rng.integers(1, 30)), int(rng.choice([1, 3, 20, 100])))
        tokens = write_data(tmp_path / f"{trial}", documents)
        seq_len, samples, seed = int(rng.integers(1, 12)), int(rng.integers(1, 60)), int(rng.integers(2**32))
        if len(tokens) <= seq_len:
            with pytest.raises(UserError, match="make no row"):
                Order(tmp_path / f"{trial}", samples, seq_len, seed)
            continue
        order = Order(tmp_path / f"{trial}", samples, seq_len, seed)

        epochs = next(e for e in range(1, 10**6) if (e * len(tokens) - 1) // seq_len >= samples)
        rows = (epochs * len(tokens) - 1) // seq_len
        random = np.random.RandomState(seed)
        doc_idx = list(range(len(documents))) * epochs
        doc_idx = np.array(doc_idx, np.int32)
        random.shuffle(doc_idx)
        shuffle_idx = np.arange(rows)
        random.shuffle(shuffle_idx)
        stream = np.concatenate([documents[d] for d in doc_idx])
        assert order.epochs == epochs
        assert len(order) == rows - 1
        np.testing.assert_array_equal(order.doc_idx, doc_idx)
        np.testing.assert_array_equal(order.shuffle_idx, shuffle_idx)
        sizes = [len(d) for d in documents]
        assert [tuple(pair) for pair in order.sample_idx.tolist()] == neox_sample_idx(sizes, doc_idx, rows, seq_len)
        for i in range(len(order)):
            start = shuffle_idx[i] * seq_len
            np.testing.assert_array_equal(order[i], stream[start : start + seq_len + 1])
            pieces = order.pieces(i)
            np.testing.assert_array_equal(
                np.concatenate([documents[d][offset : offset + n] for d, offset, n in pieces]), order[i]
            )
            assert all(n > 0 for _, _, n in pieces)


def test_one_order_for_all_requests_of_the_same_epochs(golden):
    first = Order(golden / "synth500", 1, 64)
    assert first.sha256 == Order(golden / "synth500", 19429, 64).sha256
    others = [
        Order(golden / "synth500", 19430, 64),
        Order(golden / "synth500", 1, 63),
        Order(golden / "synth500", 1, 64, 1),
    ]
    assert len({order.sha256 for order in [first, *others]}) == 4
    digests = [hashlib.sha256(np.ascontiguousarray(getattr(first, name)).tobytes()).digest() for name in MAPS]
    assert first.sha256 == hashlib.sha256(b"".join(digests)).hexdigest()


def test_rows_outside_the_order(golden):
    order = Order(golden / "edgeA", 1, 64)
    for i in (-1, len(order), 10**12):
        with pytest.raises(IndexError):
            order[i]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "order of 0 samples"),
        ({"samples": 1, "seq_len": 0}, "--seq-len 0"),
        ({"samples": 1, "seed": -1}, "--seed -1"),
        ({"samples": 1, "seed": 2**32}, "--seed 4294967296"),
        ({"samples": 1, "seq_len": 2048}, "1857 tokens make no row of 2049"),
        ({"samples": 10**12, "seq_len": 64}, "lower --steps"),
    ],
)
def test_orders_that_cannot_be(golden, arguments, message):
    before = sorted(golden.iterdir())
    with pytest.raises(UserError, match=message):
        Order(golden / "edgeA", **arguments)
    assert sorted(golden.iterdir()) == before


def test_int32_tokens(tmp_path):
    documents = [np.arange(100_000, 100_050), np.arange(200_000, 200_070)]
    write_data(tmp_path / "wide", documents, "<i4", code=4)
    order = Order(tmp_path / "wide", 1, 10)
    assert order[0].dtype == np.int32
    stream = np.concatenate([documents[d] for d in order.doc_idx])
    np.testing.assert_array_equal(order[0], stream[order.shuffle_idx[0] * 10 :][:11])


# --- Steps and ranks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in MISC["weighted_num_samples"] if case["weights"] == [1.0]])
def test_requested_samples(case):
    assert data.requested_samples(case["num_samples"], 1) == case["out"][1][0]
    if case["num_samples"] % 1024 == 0:
        assert data.requested_samples(case["num_samples"] // 1024, 1024) == case["out"][1][0]


@pytest.mark.parametrize("case", MISC["sampler"])
def test_rows_are_dealt_as_by_neox(case):
    micro, world = case["micro_batch"], case["dp"]
    for k, expected in enumerate(case.get("batches") or case["first"]):
        numbers = row_numbers(case["start_iter"] + k, micro * world, micro, case["rank"], world)
        assert numbers.shape == (1, micro)
        assert (numbers[0].tolist() if "batches" in case else numbers[0, 0]) == expected


@pytest.mark.parametrize("rank", range(4))
def test_loader_equals_neox(golden, rank):
    """The whole loader: micro-batch 2, 4 ranks, 2 micro-steps; 7 iterations, evaluated every 3 for 2."""
    truth = arrays("loader")
    samples = {"train": data.requested_samples(7, 16), "valid": data.requested_samples(6, 16)}
    samples["test"] = data.requested_samples(2, 16)
    for split, count in samples.items():
        order = Order(golden / "synth500", count, 64)
        for start in (0, 3):
            expected = truth[f"paths_it{start}_rank{rank}_{split}"]  # [micro-batches, micro_batch, seq_len + 1]
            if split == "train":
                served = np.concatenate([batch(order, start + k, 16, 2, rank, 4) for k in range(3)])
            else:
                # Counted in micro-batches of all ranks; a resumed validation skips 2 * 2 // 3 * 3 of them, a test none.
                skipped = start * 2 // 3 * 2 if split == "valid" else 0
                served = np.concatenate([batch(order, skipped + k, 8, 2, rank, 4) for k in range(4)])
            np.testing.assert_array_equal(served, expected)


@pytest.mark.parametrize("rank", range(4))
def test_loader_of_split_documents_equals_neox(golden, rank):
    """Split 900,60,40: each part is the order of its documents alone. (Tripod trains on all documents; a part is made
    here by cutting the files.)"""
    truth = arrays("loader")
    whole = IndexedTokens(golden / "synth500")
    for split, first, end, samples in (("train", 0, 450, 112), ("valid", 450, 480, 96), ("test", 480, 500, 32)):
        write_data(golden / split, [whole.read(whole.start(d), int(whole.sizes[d])) for d in range(first, end)])
        order = Order(golden / split, samples, 64)
        served = np.concatenate([batch(order, k, 8, 2, rank, 4) for k in range(6 if split == "train" else 4)])
        np.testing.assert_array_equal(served, truth[f"split_it0_rank{rank}_{split}"])


def test_union_of_ranks_is_the_global_batch(golden):
    order = Order(golden / "synth500", 1, 64)
    for step in (0, 5):
        whole = batch(order, step, 32)
        assert whole.shape == (1, 32, 65)
        np.testing.assert_array_equal(whole[0], [order[i] for i in range(32 * step, 32 * step + 32)])
        for world in (1, 2, 4, 8):
            for micro in (1, 2, 4):
                shares = [batch(order, step, 32, micro, rank, world) for rank in range(world)]
                # [rank, micro_step, micro_batch, seq_len + 1] -> micro_step first, then rank: the rows in order
                np.testing.assert_array_equal(np.stack(shares).swapaxes(0, 1).reshape(32, 65), whole[0])


def test_batch_sha256_composes_from_rows(golden):
    order = Order(golden / "synth500", 1, 64)
    whole = batch(order, 3, 8)
    rows = [hashlib.sha256(struct.pack("<65H", *order[i].tolist())).digest() for i in range(24, 32)]
    assert batch_sha256(whole) == batch_sha256(batch(order, 3, 8, 2)) == hashlib.sha256(b"".join(rows)).hexdigest()
    other = whole.copy()
    other[0, 7, 64] ^= 1
    assert batch_sha256(other) != batch_sha256(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 12, "micro_batch": 5}, r"--micro-batch 5 .* 4 or 6 would"),
        ({"batch_size": 12, "micro_batch": 2, "world_size": 4}, r"--micro-batch 2 .* 1 or 3 would"),
        ({"batch_size": 12, "micro_batch": 99}, r"; 12 would"),
        ({"batch_size": 12, "micro_batch": 0}, r"; 1 would"),
        ({"batch_size": 12, "world_size": 5}, r"--batch-size 12 .* 10 or 15 would"),
        ({"batch_size": 0}, r"--batch-size 0 .* 1 or 2 would"),
        ({"batch_size": 12, "step": 2}, "step 2: the data has 2 steps of 12 rows"),
        ({"batch_size": 12, "step": -1}, "step -1"),
    ],
)
def test_batches_that_cannot_be(golden, arguments, message):
    order = Order(golden / "edgeA", 1, 64)  # 28 rows
    with pytest.raises(UserError, match=message):
        batch(order, **{"step": 0, **arguments})


def test_check_vocab_names_the_token():
    tokens = np.zeros((2, 3, 9), np.uint16)
    check_vocab(tokens, 1, step=0)
    tokens[1, 2, 5] = 50304
    check_vocab(tokens, 50305, step=7)
    check_vocab(tokens, 100_000, step=7)  # more than the dtype can hold
    # Rank 1 of 2: step 7 begins at row 84, its second micro-step at 90, this rank's part of it at 93.
    with pytest.raises(UserError, match=r"step 7, row 95, position 5: token id 50304 .* vocabulary of 50304"):
        check_vocab(tokens, 50304, step=7, rank=1, world_size=2)
    with pytest.raises(UserError, match="step 0, row 1, position 2: token id -1"):
        check_vocab(np.array([[[0, 0, 0], [0, 0, -1]]]), 50304, step=0)


# --- Files ----------------------------------------------------------------------------------------------------------


def test_shards_cut_anywhere_hold_the_same_rows(tmp_path):
    rng = np.random.default_rng(1)
    for trial in range(30):
        prefix = tmp_path / f"{trial}"
        tokens = write_data(prefix, random_documents(rng, 12, 40))
        # Any bytes: within a token, twice the same (an empty shard), at the very ends.
        cuts = sorted(rng.integers(0, 2 * len(tokens) + 1, int(rng.integers(1, 8))).tolist())
        cut_into_shards(prefix, cuts, last_is_count=bool(trial % 2))
        read = IndexedTokens(prefix)
        assert len(read.files) == len(cuts) + 1
        np.testing.assert_array_equal(read.read(0, len(tokens)), tokens)
        for _ in range(50):
            position = int(rng.integers(0, len(tokens) + 1))
            count = int(rng.integers(0, len(tokens) + 1 - position))
            np.testing.assert_array_equal(read.read(position, count), tokens[position : position + count])
        for position, count in ((-1, 2), (0, len(tokens) + 1), (len(tokens), 1), (3, -1)):
            with pytest.raises(IndexError):
                read.read(position, count)
        order, stream = Order(prefix, 40, 7), []
        documents = np.split(tokens, np.cumsum(read.sizes)[:-1])
        stream = np.concatenate([documents[d] for d in order.doc_idx])
        for i in range(len(order)):
            np.testing.assert_array_equal(order[i], stream[order.shuffle_idx[i] * 7 :][:8])


def test_shards_equal_the_whole_file(golden):
    whole = Order(golden / "synth500", 100, 64)
    expected, sha = [whole[i] for i in range(100)], data.fingerprint(whole)["bin_sha256"]
    cut_into_shards(golden / "synth500", [500_001, 1_000_000, 1_777_777])
    sharded = Order(golden / "synth500", 100, 64)
    np.testing.assert_array_equal([sharded[i] for i in range(100)], expected)
    assert (
        data.fingerprint(sharded)["bin_sha256"]
        == sha
        == hashlib.sha256((GOLDEN / "synth500.bin").read_bytes()).hexdigest()
    )


def test_missing_and_superfluous_shards(golden):
    prefix = golden / "synth500"
    cut_into_shards(prefix, [500_001, 1_000_000, 1_777_777])

    def refused(message):
        with pytest.raises(UserError, match=message):
            IndexedTokens(prefix)

    (golden / "synth500-00001-of-00003.bin").rename(golden / "aside")
    refused("synth500-00001-of-00003.bin: this shard is missing")
    (golden / "aside").rename(golden / "synth500-00001-of-00003.bin")
    IndexedTokens(prefix)

    (golden / "synth500-00003-of-00003.bin").rename(golden / "aside")
    refused("709169 bytes are missing; is the shard .*synth500-00003-of-00003.bin missing")
    shutil.copy(golden / "aside", golden / "synth500-00004-of-00003.bin")
    refused("synth500-00004-of-00003.bin: a shard beyond the last one")
    (golden / "synth500-00004-of-00003.bin").unlink()
    (golden / "aside").rename(golden / "synth500-00003-of-00003.bin")

    shutil.copy(golden / "synth500-00000-of-00003.bin", golden / "synth500-00000-of-00005.bin")
    refused("shards of 2 different sets")


def test_an_empty_set_is_read_but_has_no_rows(tmp_path):
    for marks in ([0], [0, 0]):
        write_data(tmp_path / "empty", [], marks=[0])
        assert (IndexedTokens(tmp_path / "empty").tokens, IndexedTokens(tmp_path / "empty").documents) == (0, 0)
        assert len(IndexedTokens(tmp_path / "empty").read(0, 0)) == 0
        write_data(tmp_path / "hollow", [[], []], marks=[*marks, 2] if len(marks) > 1 else marks)
        assert IndexedTokens(tmp_path / "hollow").tokens == 0
    with pytest.raises(UserError, match="0 tokens make no row"):
        Order(tmp_path / "empty", 1)


@pytest.mark.parametrize("marks", ["one", "all"])  # published sets have one
def test_shuffled_rows(tmp_path, marks):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 50304, (50, 65)).astype("<u2")
    write_data(tmp_path / "document", list(rows), marks=[0] if marks == "one" else None)
    for cuts in (None, [1000, 3001, 3002]):  # 130 bytes a row: shards end within rows and tokens
        if cuts:
            cut_into_shards(tmp_path / "document", cuts)
        served = data.open_rows(tmp_path, samples=10**9, seq_len=64)
        assert isinstance(served, ShuffledRows)
        assert (len(served), served.seq_len) == (50, 64)
        np.testing.assert_array_equal([served[i] for i in range(50)], rows)
        np.testing.assert_array_equal(batch(served, 2, 16, 4)[1, 3], rows[39])
        assert served.sha256 == hashlib.sha256((tmp_path / "document.idx").read_bytes()).hexdigest()
        for i in (-1, 50):
            with pytest.raises(IndexError):
                served[i]
        with pytest.raises(UserError, match="step 3: the data has 3 steps of 16 rows"):
            batch(served, 3, 16)
    with pytest.raises(UserError, match="row 0 has 65 tokens, not 2049"):
        ShuffledRows(tmp_path)
    if marks == "one":
        with pytest.raises(UserError, match="shuffled already"):
            Order(tmp_path / "document", 1, 64)


def test_open_rows_says_what_it_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"neither .*nothing.idx .* nor .*nothing/document.idx"):
        data.open_rows(tmp_path / "nothing", 1)


def test_find_tokenizer(golden):
    assert data.find_tokenizer(golden / "edgeA") is None
    (golden / "tokenizer.json").touch()
    assert data.find_tokenizer(golden / "edgeA") == data.find_tokenizer(golden) == golden / "tokenizer.json"
    (golden / "edgeA.tokenizer.json").touch()
    assert data.find_tokenizer(golden / "edgeA") == golden / "edgeA.tokenizer.json"


def test_data_facts(golden):
    facts = data.fingerprint(Order(golden / "synth500", 19430, 64))
    assert (facts["tokens"], facts["documents"], facts["epochs"], facts["rows"]) == (1_243_473, 500, 2, 38857)
    assert [Path(file).name for file in facts["files"]] == ["synth500.idx", "synth500.bin"]
    json.dumps(facts)


def corrupt(field, value):
    """The .idx of edgeA with one field overwritten: 51 or so sequences from byte 34 on."""
    raw = bytearray((GOLDEN / "edgeA.idx").read_bytes())
    n = struct.unpack_from("<Q", raw, 18)[0]
    offsets = {"magic": 0, "version": 9, "code": 17, "count": 18, "marks": 26, "size": 34, "pointer": 34 + 4 * n + 8}
    offsets |= {"first mark": 34 + 12 * n, "mark": 34 + 12 * n + 8 * 7, "last mark": 34 + 20 * n}
    raw[offsets[field] : offsets[field] + len(value)] = value
    return bytes(raw)


BAD_INDEX = {  # name: (bytes of the .idx, what the message says)
    "no file": (None, "edgeA.idx"),
    "empty": (b"", "too few for a header"),
    "short header": (b"MMIDIDX\0\0" + bytes(10), "too few for a header"),
    "magic": (corrupt("magic", b"TNTIDX\0\0"), "magic"),
    "version": (corrupt("version", struct.pack("<Q", 2)), "version 2"),
    "float32": (corrupt("code", b"\6"), "dtype code 6"),
    "float64": (corrupt("code", b"\7"), "dtype code 7"),
    "unknown dtype": (corrupt("code", b"\xff"), "dtype code 255"),
    "wider dtype": (corrupt("code", b"\4"), "truncated, 3714 bytes are missing"),
    "narrower dtype": (corrupt("code", b"\1"), "1857 bytes too long"),
    "sizes overrun the file": (corrupt("count", struct.pack("<Q", 1000)), "truncated or damaged"),
    "negative count": (corrupt("count", struct.pack("<q", -1)), "truncated or damaged"),
    "overflowing count": (corrupt("count", struct.pack("<Q", 2**64 // 12 + 1)), "truncated or damaged"),
    "overflowing marks": (corrupt("marks", struct.pack("<Q", 2**61)), "truncated or damaged"),
    "no marks": (corrupt("marks", struct.pack("<Q", 0)), "no document marks"),
    "negative size": (corrupt("size", struct.pack("<i", -5)), "sequence 0 has a negative size"),
    "enormous size": (corrupt("size", struct.pack("<i", 2**31 - 1)), "truncated"),
    "wrong position": (corrupt("pointer", struct.pack("<q", 3)), "position of sequence 1"),
    "first mark": (corrupt("first mark", struct.pack("<q", 1)), "document marks do not run"),
    "mark past the end": (corrupt("mark", struct.pack("<q", 10**6)), "document marks go backwards"),
    "negative mark": (corrupt("mark", struct.pack("<q", -(2**63))), "document marks go backwards"),
    "last mark past the end": (corrupt("last mark", struct.pack("<q", 10**6)), "document marks do not run"),
    "truncated": ((GOLDEN / "edgeA.idx").read_bytes()[:-1], "truncated or damaged"),
}


def command(directory, *arguments):
    """`python data.py ...` as a user runs it."""
    line = [sys.executable, str(REPO / "data.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=directory, capture_output=True, text=True, timeout=60)


def refused(run, message):
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")
    assert run.stderr.count("\n") == 1
    assert message in run.stderr
    assert run.stdout == ""


@pytest.mark.parametrize("name", BAD_INDEX)
def test_bad_index(golden, name):
    raw, message = BAD_INDEX[name]
    (golden / "edgeA.idx").unlink() if raw is None else (golden / "edgeA.idx").write_bytes(raw)
    before = sorted(golden.iterdir())
    with pytest.raises(UserError) as error:
        IndexedTokens(golden / "edgeA")
    assert "edgeA" in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError):
        data.open_rows(golden / "edgeA", 1, 64)
    assert sorted(golden.iterdir()) == before


def test_bad_bin(golden):
    whole = (golden / "edgeA.bin").read_bytes()
    for raw, message in (
        (whole[:-3], "edgeA.bin: truncated, 3 bytes are missing"),
        (whole + b"x", "edgeA.bin: 1 bytes too long"),
        (b"", "edgeA.bin: truncated, 3714 bytes are missing"),
    ):
        (golden / "edgeA.bin").write_bytes(raw)
        with pytest.raises(UserError, match=message):
            IndexedTokens(golden / "edgeA")
    (golden / "edgeA.bin").unlink()
    with pytest.raises(UserError, match=r"edgeA\.bin: no such file, and no shards"):
        IndexedTokens(golden / "edgeA")
    (golden / "edgeA.bin").mkdir()
    with pytest.raises(UserError, match=r"edgeA\.bin: "):
        IndexedTokens(golden / "edgeA")


def mutate(rng, raw, n):
    """One hostile .idx: flipped bytes, another length, extreme fields, sizes and counts that agree with each other."""
    raw = bytearray(raw)
    extremes = [0, 1, -1, n - 1, n + 1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**63 - 1, -(2**63), 2**61, 3 * 2**60]
    kind = rng.integers(7)
    if kind == 0:  # flip some bytes
        for at in rng.integers(0, len(raw), rng.integers(1, 5)):
            raw[at] ^= int(rng.integers(1, 256))
    elif kind == 1:  # flip a bit in the header
        raw[rng.integers(0, 34)] ^= 1 << int(rng.integers(8))
    elif kind == 2:  # cut or lengthen
        end = int(rng.integers(0, len(raw)))
        raw = raw[:end] if rng.integers(2) else raw + bytes(rng.integers(0, 256, end % 40 + 1).tolist())
    elif kind == 3:  # an 8-byte field, anywhere
        at = int(rng.choice([9, 18, 26, 34 + 4 * n + 8 * rng.integers(n), 34 + 12 * n + 8 * rng.integers(n + 1)]))
        raw[at : at + 8] = struct.pack("<Q", int(rng.choice(extremes)) % 2**64)
    elif kind == 4:  # a size
        at = 34 + 4 * int(rng.integers(n))
        raw[at : at + 4] = struct.pack("<I", int(rng.choice(extremes)) % 2**32)
    elif kind == 5:  # the counts so that the file's length still fits: 12 dn + 8 dm = 0
        change = 2 * int(rng.integers(-(n // 2), n))
        raw[18:34] = struct.pack("<QQ", (n + change) % 2**64, (n + 1 - change * 3 // 2) % 2**64)
    else:  # two sizes so that their sum still fits, with the position between them or without
        i = int(rng.integers(n - 1))
        sizes = list(struct.unpack_from("<2i", raw, 34 + 4 * i))
        change = int(rng.integers(1, 9))
        struct.pack_into("<2i", raw, 34 + 4 * i, sizes[0] - change, sizes[1] + change)
        if rng.integers(2):
            at = 34 + 4 * n + 8 * (i + 1)
            struct.pack_into("<q", raw, at, struct.unpack_from("<q", raw, at)[0] - 2 * change)
    return bytes(raw)


def test_ten_thousand_hostile_indexes(tmp_path):
    """Each is refused, or serves exactly the right tokens: no crash, no other exception, never a wrong token."""
    rng = np.random.default_rng(3)
    documents = [rng.integers(30000, 50304, size) for size in (0, 1, 7, 0, 30, 2, 64, 1, 0)]
    tokens = write_data(tmp_path / "hostile", documents)
    whole = (tmp_path / "hostile.idx").read_bytes()
    accepted = 0
    for _ in range(10_000):
        (tmp_path / "hostile.idx").write_bytes(mutate(rng, whole, len(documents)))
        try:
            read = IndexedTokens(tmp_path / "hostile")
            served = read.read(0, read.tokens)
            # The code of int16 differs from that of uint16 by some bits, and all else fits it. Where that changes
            # tokens they turn negative, which the check of every batch refuses.
            check_vocab(served[None, None], 50304, step=0)
        except UserError:
            continue
        accepted += 1
        np.testing.assert_array_equal(served, tokens)
        for document, start in enumerate(np.cumsum(read.sizes) - read.sizes):
            assert read.start(document) == start
    assert 0 < accepted < 2000  # most are refused, but marks may move without harm, and some cuts are none


# --- The cache ------------------------------------------------------------------------------------------------------


def cache_of(directory):
    (cache,) = directory.glob("*.order-*")
    return cache


def forbid_building(monkeypatch):
    monkeypatch.setattr(order_module, "index_maps", lambda *_: pytest.fail("built again"))


def test_cache_is_used(golden, monkeypatch, capsys):
    built = Order(golden / "edgeA", 57, 64)
    assert sorted(path.name for path in cache_of(golden).iterdir()) == sorted(
        [*(f"{m}.npy" for m in MAPS), "order.json"]
    )
    forbid_building(monkeypatch)
    read = Order(golden / "edgeA", 40, 64)  # fewer samples, the same two epochs
    assert read.sha256 == built.sha256
    assert isinstance(read.sample_idx, np.memmap)
    np.testing.assert_array_equal([read[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])
    assert capsys.readouterr().err == ""


def flip(name, at=-1):
    def damage(cache):
        raw = bytearray((cache / name).read_bytes())
        raw[at] ^= 4
        (cache / name).write_bytes(raw)

    return damage


def other_dtype(cache):
    raw = (cache / "doc_idx.npy").read_bytes()
    assert b"<i4" in raw
    (cache / "doc_idx.npy").write_bytes(raw.replace(b"<i4", b"<f4"))


def stale(cache):
    stored = json.loads((cache / "order.json").read_text())
    stored["facts"]["index_sha256"] = "0" * 64
    (cache / "order.json").write_text(json.dumps(stored))


@pytest.mark.parametrize(
    "damage",
    [
        flip("doc_idx.npy"),
        flip("sample_idx.npy", 200),
        flip("shuffle_idx.npy"),
        flip("shuffle_idx.npy", 1),
        other_dtype,
        stale,
        lambda cache: (cache / "order.json").write_text("{"),
        lambda cache: (cache / "order.json").write_text("[]"),
        lambda cache: (cache / "order.json").unlink(),
        lambda cache: (cache / "sample_idx.npy").unlink(),
        lambda cache: (cache / "sample_idx.npy").write_bytes((cache / "sample_idx.npy").read_bytes()[:-7]),
        lambda cache: (cache / "sample_idx.npy").write_bytes(b""),
    ],
)
def test_damaged_cache_is_built_again(golden, damage, capsys, monkeypatch):
    truth = arrays("edgeA_golden")
    Order(golden / "edgeA", 57, 64)
    damage(cache_of(golden))
    again = Order(golden / "edgeA", 57, 64)
    for name in MAPS:
        np.testing.assert_array_equal(getattr(again, name), truth[f"s1234_ep2_{name}"])
    notice = capsys.readouterr().err
    assert "building the order again" in notice
    assert notice.count("\n") == 1
    forbid_building(monkeypatch)
    Order(golden / "edgeA", 57, 64)
    assert capsys.readouterr().err == ""


def test_other_data_under_the_same_name_gets_another_order(tmp_path):
    write_data(tmp_path / "same", [np.arange(100)])
    first = Order(tmp_path / "same", 1, 10)
    write_data(tmp_path / "same", [np.arange(50), np.arange(50)])
    second = Order(tmp_path / "same", 1, 10)
    assert (len(first.doc_idx), len(second.doc_idx)) == (1, 2)


def test_directory_that_cannot_be_written(golden, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # tests may run as root, whom no permission stops
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([order[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])
    notice = capsys.readouterr().err
    assert "stays in memory" in notice
    assert notice.count("\n") == 1
    assert not list(golden.glob("*order*"))


def test_full_disk_leaves_nothing(golden, monkeypatch, capsys):
    def full(path, *_, **__):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal(order[5], arrays("edgeA_golden")["s1234_ep2_all_rows"][5])
    assert "No space left" in capsys.readouterr().err
    assert not list(golden.glob("*order*"))


def test_faster_process_wins(golden, monkeypatch, capsys):
    build = order_module.index_maps

    def overtaken(*arguments):
        monkeypatch.setattr(order_module, "index_maps", build)
        Order(golden / "edgeA", 57, 64)  # the other process, from start to end while this one builds
        overtaken.inode = cache_of(golden).stat().st_ino
        return build(*arguments)

    monkeypatch.setattr(order_module, "index_maps", overtaken)
    order = Order(golden / "edgeA", 57, 64)
    assert cache_of(golden).stat().st_ino == overtaken.inode
    np.testing.assert_array_equal(order[5], arrays("edgeA_golden")["s1234_ep2_all_rows"][5])
    assert capsys.readouterr().err == ""


def test_processes_that_start_together(golden):
    code = "import data, sys; print(data.Order(sys.argv[1], 19430, 64).sha256)"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, golden / "synth500"], cwd=REPO, text=True, stdout=-1, stderr=-1)
        for _ in range(4)
    ]
    results = [run.communicate(timeout=60) for run in runs]
    assert {out.strip() for out, _ in results} == {Order(golden / "synth500", 19430, 64).sha256}
    assert {error for _, error in results} == {""}
    assert len(list(golden.glob("*order*"))) == 1


# --- Commands -------------------------------------------------------------------------------------------------------

SHORT = ("--seq-len", "64", "--batch-size", "8", "--steps", "3")


def test_info(golden):
    run = command(golden, "info", "--data", "synth500", "--seq-len", "64", "--batch-size", "100", "--steps", "250")
    assert run.returncode == 0, run.stderr
    for fact in (
        "1,243,473",
        "500",
        "epochs       2",
        "38,857",
        "388 of 100 rows of 65 tokens",
        "synth500.bin",
        "uint16",
    ):
        assert fact in run.stdout
    assert Order(golden / "synth500", 25125, 64).sha256 in run.stdout


def test_view_prints_what_the_model_saw(golden):
    order = Order(golden / "synth500", 25, 64)
    run = command(golden, "view", "--data", "synth500", *SHORT, "--step", "2", "--row", "3")
    assert run.returncode == 0, run.stderr
    head, ids = run.stdout.splitlines()
    assert "step 2, row 3 of 8 (row 19 of the order)" in head
    for document, offset, count in order.pieces(19):
        assert f"document {document} from {offset} ({count})" in head
    assert [int(id) for id in ids.split()] == order[19].tolist()
    everything = command(golden, "view", "--data", "synth500", *SHORT, "--step", "2").stdout.splitlines()
    assert len(everything) == 16
    assert everything[6:8] == [head, ids]


def test_commands_on_shuffled_rows(tmp_path):
    (tmp_path / "set").mkdir()
    rows = np.random.default_rng(4).integers(0, 50304, (20, 65)).astype("<u2")
    write_data(tmp_path / "set/document", list(rows), marks=[0])
    cut_into_shards(tmp_path / "set/document", [999])
    run = command(tmp_path, "info", "--data", "set", *SHORT)
    assert run.returncode == 0, run.stderr
    assert "rows         20" in run.stdout
    assert "2 of 8 rows" in run.stdout
    run = command(tmp_path, "view", "--data", "set", *SHORT, "--step", "1", "--row", "2")
    head, ids = run.stdout.splitlines()
    assert head == "--- step 1, row 2 of 8 (row 10 of the order)"
    assert [int(id) for id in ids.split()] == rows[10].tolist()
    refused(command(tmp_path, "view", "--data", "set", *SHORT, "--step", "2"), "step 2: the data has 2 steps of 8 rows")
    refused(command(tmp_path, "info", "--data", "set", "--batch-size", "0"), "--batch-size 0 must be at least 1")
    refused(command(tmp_path, "info", "--data", "set"), "row 0 has 65 tokens, not 2049")


def test_view_exports_the_batch(golden):
    line = ("view", "--data", "synth500", *SHORT, "--step", "1", "--export", "rows.npy")
    run = command(golden, *line)
    assert run.returncode == 0, run.stderr
    rows = np.load(golden / "rows.npy", allow_pickle=False)
    assert (rows.dtype, rows.shape) == (np.uint16, (8, 65))
    truth = arrays("gpt2ds_L64_seed1234")["lt1_first20"]
    np.testing.assert_array_equal(rows, truth[8:16])
    refused(command(golden, *line), "rows.npy exists")
    np.testing.assert_array_equal(np.load(golden / "rows.npy", allow_pickle=False), rows)
    refused(command(golden, *line[:-1], "absent/rows.npy"), "absent/rows.npy: No such file")


def test_commands_refuse_in_one_line(golden):
    before = {path: path.stat().st_mtime_ns for path in golden.iterdir()}
    data_ = ("--data", "edgeA", "--seq-len", "64")
    for arguments, message in (
        (("info", "--data", "absent"), "neither absent.idx"),
        (("info", "--data", "edgeA"), "1857 tokens make no row of 2049"),
        (("info", *data_, "--steps", "0"), "--steps 0"),
        (("info", *data_, "--seed", "-1"), "--seed -1"),
        (("info", *data_, "--seed", "x"), "--seed: invalid int value"),
        (("view", *data_), "required: --step"),
        (("info", *data_, "--seed", "99999999999"), "--seed 99999999999"),
        (("info", *data_, "--steps", "100000000"), "lower --steps"),
        (("view", *data_, "--step", "0", "--batch-size", "0"), "--batch-size 0 must be at least 1"),
    ):
        refused(command(golden, *arguments), message)
    assert {path: path.stat().st_mtime_ns for path in golden.iterdir()} == before
    for arguments, message in (  # these have an order, and its cache
        (("view", *data_, "--steps", "3", "--batch-size", "8", "--step", "3"), "step 3: the data has 3 steps"),
        (("view", *data_, "--steps", "3", "--batch-size", "8", "--step", "0", "--row", "8"), "--row 8"),
        (("view", *data_, "--steps", "3", "--batch-size", "8", "--step", "0", "--tokenizer", "edgeA.idx"), "tokenizer"),
    ):
        refused(command(golden, *arguments), message)


def test_help_teaches():
    assert "prepare" in command(REPO, "--help").stdout
    for name in ("prepare", "info", "view"):
        assert f"example: python data.py {name}" in command(REPO, name, "--help").stdout


def test_a_reader_that_leaves_early(golden):
    line = [sys.executable, REPO / "data.py", "view", "--data", "synth500", "--step", "0", "--batch-size", "500"]
    line += ["--seq-len", "512", "--steps", "1"]
    run = subprocess.Popen(line, cwd=golden, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("--- step 0, row 0")
    os.close(run.stdout.detach().detach().fileno())
    assert run.stderr.read() == ""
    assert run.wait(timeout=60) == 0
