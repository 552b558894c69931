"""The order against arrays of GPT-NeoX's own code (golden/order) and a naive walk of the stream; its cache."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron import MAPS, MISC, REPO, arrays, copy_golden, cut_into_shards, random_documents, write_data

import data
from corpus import indexed
from corpus import order as order_module
from corpus.order import Order, ShuffledRows, layout, map_blocks, maps_in_memory
from data import batch
from runtime.errors import UserError


@pytest.fixture
def golden(tmp_path):
    return copy_golden(tmp_path)


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
    """The maps of 20 documents and 33 rows are two shuffles by one generator, equal to those of numpy as published."""
    assert np.random.RandomState(case["seed"]).randint(0, 2**32, 8, np.uint32).tolist() == case["first_u32"]
    sizes = np.array([2] * 14 + [1] * 6)
    maps, _ = maps_in_memory(layout(20, 34, 1, 1), map_blocks(sizes, 34, epochs=1, seq_len=1, seed=case["seed"]))
    assert maps["doc_idx"].tolist() == case["shuffle20_int32"]
    assert maps["shuffle_idx"].tolist() == case["then_shuffle33_uint32"]


def neox_sample_idx(sizes, doc_idx, rows, seq_len):
    """build_sample_idx of GPT-NeoX v1.0 (megatron/data/helpers.cpp): a loop over all tokens."""
    position, offset, result = 0, 0, [(0, 0)]
    for _ in range(rows):
        remaining = seq_len + 1
        while remaining:
            length = sizes[doc_idx[position]] - offset
            remaining -= length
            if remaining <= 0:
                offset += remaining + length - 1
                remaining = 0
            else:
                position, offset = position + 1, 0
        result.append((position, offset))
    return result


def test_order_of_random_data_equals_a_naive_walk(tmp_path, monkeypatch):
    # Blocks of three documents, because block boundaries must not change the result.
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
def test_impossible_orders(golden, arguments, message):
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


@pytest.mark.parametrize("marks", ["one", "all"])  # the published data sets have one mark
def test_shuffled_rows(tmp_path, marks):
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 50304, (50, 65)).astype("<u2")
    write_data(tmp_path / "document", list(rows), marks=[0] if marks == "one" else None)
    for cuts in (None, [1000, 3001, 3002]):  # a row has 130 bytes, so shards end within rows and tokens
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


# --- The cache --------------------------------------------------------------------------------------------------------


def cache_of(directory):
    (cache,) = (path for path in directory.glob("*.order-*") if path.suffix != ".tmp")
    return cache


def forbid_building(monkeypatch):
    monkeypatch.setattr(order_module, "map_blocks", lambda *_: pytest.fail("built again"))


def test_cache_is_used(golden, monkeypatch, capsys):
    built = Order(golden / "edgeA", 57, 64)
    files = sorted([*(f"{m}.npy" for m in MAPS), "order.json", "checked.json"])
    assert sorted(path.name for path in cache_of(golden).iterdir()) == files
    forbid_building(monkeypatch)
    read = Order(golden / "edgeA", 40, 64)  # fewer samples, but the same two epochs
    assert read.sha256 == built.sha256
    assert isinstance(read.sample_idx, np.memmap)
    np.testing.assert_array_equal([read[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])
    assert capsys.readouterr().err == ""


def test_cache_of_earlier_versions_is_used(golden, monkeypatch, capsys):
    """The names and contents of a cache, written here by hand, stay valid."""
    truth, digest = arrays("edgeA_golden"), hashlib.sha256((golden / "edgeA.idx").read_bytes()).hexdigest()
    cache, stored = golden / f"edgeA.order-2epochs-64len-1234seed-{digest[:12]}", {}
    cache.mkdir()
    for name in MAPS:
        array = truth[f"s1234_ep2_{name}"]
        np.save(cache / f"{name}.npy", array)
        sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        stored[name] = {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": sha256}
    facts = {"format": 1, "index_sha256": digest, "epochs": 2, "seq_len": 64, "seed": 1234}
    (cache / "order.json").write_text(json.dumps({"facts": facts, "arrays": stored}))
    forbid_building(monkeypatch)
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([order[i] for i in range(57)], truth["s1234_ep2_all_rows"])
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
def test_damaged_cache_is_rebuilt(golden, damage, capsys, monkeypatch):
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


def test_order_stays_in_memory_in_a_read_only_directory(golden, monkeypatch, capsys):
    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)  # permissions would not stop root
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([order[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])
    notice = capsys.readouterr().err
    assert "stays in memory" in notice
    assert notice.count("\n") == 1
    assert not list(golden.glob("*order*"))


def test_full_disk_leaves_nothing(golden, monkeypatch, capsys):
    def full(file, head):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal(order[5], arrays("edgeA_golden")["s1234_ep2_all_rows"][5])
    assert "No space left" in capsys.readouterr().err
    assert not list(golden.glob("*order*"))


def test_cache_of_a_faster_process_is_used(golden, monkeypatch, capsys):
    build = order_module.map_blocks

    def overtaken(*arguments):
        monkeypatch.setattr(order_module, "map_blocks", build)
        Order(golden / "edgeA", 57, 64)  # the other process, which starts and ends while this one builds
        overtaken.inode = cache_of(golden).stat().st_ino
        return build(*arguments)

    monkeypatch.setattr(order_module, "map_blocks", overtaken)
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


def forge(cache, **changed):
    """Replace maps of a cache, with an order.json that describes them: sha256, dtype and shape are right."""
    stored = json.loads((cache / "order.json").read_text())
    for name, array in changed.items():
        np.save(cache / f"{name}.npy", array)
        sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        stored["arrays"][name] = {"dtype": array.dtype.str, "shape": [*array.shape], "sha256": sha256}
    (cache / "order.json").write_text(json.dumps(stored))


def with_change(name, at, by):
    def change(maps):
        array = maps[name].copy()
        array[at] += by
        return {name: array}

    return change


POISON = {
    "all-zero shuffle": lambda maps: {"shuffle_idx": np.zeros_like(maps["shuffle_idx"])},
    "a row twice": with_change("shuffle_idx", 5, 1),
    "a row past the end": lambda maps: {"shuffle_idx": maps["shuffle_idx"] + np.uint32(1)},
    "documents minus 1": lambda maps: {"doc_idx": maps["doc_idx"] - 1},
    "a document twice": lambda maps: {"doc_idx": np.where(maps["doc_idx"] == 3, 4, maps["doc_idx"]).astype(np.int32)},
    "a document past the end": with_change("doc_idx", 2, 1000),
    "another offset": with_change("sample_idx", (7, 1), 1),
    "another place": with_change("sample_idx", (-1, 0), -1),
    "float64 shuffle": lambda maps: {"shuffle_idx": maps["shuffle_idx"].astype(np.float64)},
    "float64 documents": lambda maps: {"doc_idx": maps["doc_idx"].astype(np.float64)},
    "int64 rows": lambda maps: {"sample_idx": maps["sample_idx"].astype(np.int64)},
    "one row less": lambda maps: {"shuffle_idx": np.delete(maps["shuffle_idx"], maps["shuffle_idx"].argmax())},
    "other axes": lambda maps: {"sample_idx": np.ascontiguousarray(maps["sample_idx"].T)},
    "Fortran order": lambda maps: {"sample_idx": np.asfortranarray(maps["sample_idx"])},
}


@pytest.mark.parametrize("poison", POISON)
def test_poisoned_cache_is_rebuilt(golden, poison, capsys):
    """Maps that are wrong in themselves, although order.json describes them rightly."""
    truth = arrays("edgeA_golden")
    maps = {name: truth[f"s1234_ep2_{name}"] for name in MAPS}
    Order(golden / "edgeA", 57, 64)
    forge(cache_of(golden), **POISON[poison](maps))
    again = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([again[i] for i in range(57)], truth["s1234_ep2_all_rows"])
    assert "building the order again" in capsys.readouterr().err


def forbid_checks(monkeypatch):
    for name in ("check_maps", "describe"):
        monkeypatch.setattr(order_module, name, lambda *_: pytest.fail("checked again"))


def test_a_cache_is_checked_once(golden, monkeypatch):
    Order(golden / "edgeA", 57, 64)
    time.sleep(0.2)  # a stamp counts only for files that are older than it by a tick of the clock
    Order(golden / "edgeA", 57, 64)
    with monkeypatch.context() as patched:
        forbid_checks(patched)
        order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([order[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])


@pytest.mark.parametrize("name", ["order.json", "doc_idx.npy", "sample_idx.npy", "shuffle_idx.npy", "checked.json"])
def test_a_change_ends_the_trust(golden, monkeypatch, name):
    """A file that is written again is checked again, also if its size and modification time are as before."""
    Order(golden / "edgeA", 57, 64)
    time.sleep(0.2)
    Order(golden / "edgeA", 57, 64)
    path = cache_of(golden) / name
    status = path.stat()
    path.write_bytes(path.read_bytes() if name != "checked.json" else b"[[1, 2], {}]")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    called = []
    monkeypatch.setattr(order_module, "check_maps", lambda *_: called.append(1))
    Order(golden / "edgeA", 57, 64)
    assert called == [1]


def test_a_cache_that_was_copied_here_is_checked(golden, monkeypatch):
    """Its stamp is of other files. A stamp of another user does not count either."""
    Order(golden / "edgeA", 57, 64)
    time.sleep(0.2)
    Order(golden / "edgeA", 57, 64)
    cache = cache_of(golden)
    called = []
    monkeypatch.setattr(order_module, "check_maps", lambda *_: called.append(1))
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: cache.stat().st_uid + 4711)
        if cache.stat().st_uid:  # everybody trusts the files of root
            Order(golden / "edgeA", 57, 64)
            assert called.pop()
    subprocess.run(["cp", "-a", cache, golden / "copy"], check=True)
    cache.rename(golden / "aside")
    (golden / "copy").rename(cache)
    Order(golden / "edgeA", 57, 64)
    assert called == [1]


@pytest.mark.parametrize("name", ["order.json", "doc_idx.npy", "checked.json"])
def test_a_fifo_in_the_cache_is_refused(golden, name, capsys):
    """Opening a FIFO would wait for ever."""
    Order(golden / "edgeA", 57, 64)
    path = cache_of(golden) / name
    path.unlink()
    os.mkfifo(path)
    order = Order(golden / "edgeA", 57, 64)
    np.testing.assert_array_equal([order[i] for i in range(57)], arrays("edgeA_golden")["s1234_ep2_all_rows"])
    assert ("not a regular file" in capsys.readouterr().err) == (name != "checked.json")


@pytest.mark.parametrize("name", MAPS)
def test_a_map_that_shrinks_is_named(golden, name):
    Order(golden / "edgeA", 57, 64)
    order = Order(golden / "edgeA", 57, 64)
    path = cache_of(golden) / f"{name}.npy"
    os.truncate(path, 130)
    with pytest.raises(UserError, match=rf"{name}.npy: byte \d+: the file ends here"):
        batch(order, 0, 57)


@pytest.mark.parametrize("file", ["edgeA.idx", *(f"{name}.npy" for name in MAPS)])
def test_verify_finds_what_changed_after_the_check(golden, file):
    """A flipped bit on the disk leaves size and times as they were."""
    order = Order(golden / "edgeA", 57, 64)
    order.verify()
    (path,) = golden.rglob(file)
    flip(file)(path.parent)
    with pytest.raises(UserError, match=f"{file} is not as it was when it was checked"):
        order.verify()


# --- A large index ----------------------------------------------------------------------------------------------------


def test_a_large_index_is_checked_once(golden, monkeypatch):
    monkeypatch.setattr(indexed, "CHECKED_ONCE", 1)
    time.sleep(0.2)  # a mark counts only for files that are older than it by a tick of the clock
    first = indexed.IndexedTokens(golden / "edgeA")
    with monkeypatch.context() as patched:
        patched.setattr(indexed.IndexedTokens, "_check", lambda *_: pytest.fail("checked again"))
        again = indexed.IndexedTokens(golden / "edgeA")
    for name in ("tokens", "documents", "shortest", "longest", "index_sha256"):
        assert getattr(again, name) == getattr(first, name)
    raw = bytearray((golden / "edgeA.idx").read_bytes())
    raw[34] += 1  # the size of the first document
    (golden / "edgeA.idx").write_bytes(raw)
    with pytest.raises(UserError, match="truncated"):
        indexed.IndexedTokens(golden / "edgeA")


@pytest.mark.parametrize("text", ["{", "[]", '{"files": []}', '{"facts": null}'])
def test_a_damaged_mark_does_not_count(golden, text, monkeypatch):
    monkeypatch.setattr(indexed, "CHECKED_ONCE", 1)
    (golden / "edgeA.idx.json").write_text(text)
    assert (
        indexed.IndexedTokens(golden / "edgeA").index_sha256
        == hashlib.sha256((golden / "edgeA.idx").read_bytes()).hexdigest()
    )


def test_take_equals_single_rows(golden):
    order, numbers = Order(golden / "edgeA", 57, 64), np.array([5, 5, 0, 41])
    np.testing.assert_array_equal(order.take(numbers), [order[i] for i in numbers])
    np.testing.assert_array_equal(order.take(numbers), arrays("edgeA_golden")["s1234_ep2_all_rows"][numbers])
    with pytest.raises(IndexError, match="row -1 of"):
        order.take(np.array([3, -1]))
