"""batch(t) against the loader of GPT-NeoX (golden/order), the data set of --data, and the commands."""

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from megatron import MISC, REPO, arrays, assert_refused, copy_golden, cut_into_shards, run_data, write_data

import data
from corpus.indexed import DataFile, IndexedTokens
from corpus.order import Order, digest, row_digests
from corpus.tokenizer import byte_tokenizer
from data import batch, check_vocab, row_numbers
from runtime.errors import UserError, run_command
from settings import FIXED


@pytest.fixture
def golden(tmp_path):
    return copy_golden(tmp_path)


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
    """NeoX with micro-batch 2, 4 ranks, 2 micro-steps; 7 iterations, and after every 3 an evaluation of 2."""
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
                # Both count micro-steps. On resume, validation skips start * 2 // 3 * 2 of them; test skips none.
                skipped = start * 2 // 3 * 2 if split == "valid" else 0
                served = np.concatenate([batch(order, skipped + k, 8, 2, rank, 4) for k in range(4)])
            np.testing.assert_array_equal(served, expected)


@pytest.mark.parametrize("rank", range(4))
def test_loader_of_split_documents_equals_neox(golden, rank):
    """NeoX's split 900,60,40: each part has an order of its own documents. Tripod has no split (it trains on all
    documents), so this test writes each part as a data set."""
    truth = arrays("loader")
    whole = IndexedTokens(golden / "synth500")
    sizes = np.asarray(whole.sizes).tolist()
    for split, first, end, samples in (("train", 0, 450, 112), ("valid", 450, 480, 96), ("test", 480, 500, 32)):
        write_data(golden / split, [whole.read(whole.start(d), sizes[d]) for d in range(first, end)])
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
                # [rank, micro_step, micro_batch, seq_len + 1]; with micro_step first the rows are in order
                np.testing.assert_array_equal(np.stack(shares).swapaxes(0, 1).reshape(32, 65), whole[0])


def test_batch_sha256_composes_from_rows(golden):
    def batch_sha256(tokens):
        return digest(row_digests(tokens))

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
def test_impossible_batches(golden, arguments, message):
    order = Order(golden / "edgeA", 1, 64)  # 28 rows
    with pytest.raises(UserError, match=message):
        batch(order, **{"step": 0, **arguments})


def test_check_vocab_names_the_token():
    tokens = np.zeros((2, 3, 9), np.uint16)
    check_vocab(tokens, 1, step=0)
    tokens[1, 2, 5] = 50304
    check_vocab(tokens, 50305, step=7)
    check_vocab(tokens, 100_000, step=7)  # more than the dtype can hold
    # Step 7 starts at row 84, its second micro-step at 90, and the slice of rank 1 of 2 at 93.
    with pytest.raises(UserError, match=r"step 7, row 95, position 5: token id 50304 .* vocabulary of 50304"):
        check_vocab(tokens, 50304, step=7, rank=1, world_size=2)
    with pytest.raises(UserError, match="step 0, row 1, position 2: token id -1"):
        check_vocab(np.array([[[0, 0, 0], [0, 0, -1]]]), 50304, step=0)


def test_open_rows_names_the_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"neither .*nothing.idx .* nor .*nothing/document.idx"):
        data.open_rows(tmp_path / "nothing", 1)


def test_find_tokenizer(golden):
    assert data.find_tokenizer(golden / "edgeA") is None
    (golden / "tokenizer.json").touch()
    assert data.find_tokenizer(golden / "edgeA") == data.find_tokenizer(golden) == golden / "tokenizer.json"
    (golden / "edgeA.tokenizer.json").touch()
    assert data.find_tokenizer(golden / "edgeA") == golden / "edgeA.tokenizer.json"


def test_fingerprint(golden):
    facts = data.fingerprint(Order(golden / "synth500", 19430, 64))
    assert (facts["tokens"], facts["documents"], facts["epochs"], facts["rows"]) == (1_243_473, 500, 2, 38857)
    assert [Path(file).name for file in facts["files"]] == ["synth500.idx", "synth500.bin"]
    json.dumps(facts)


def test_other_tokens_of_equal_length_are_named(golden, monkeypatch):
    stored = json.loads(json.dumps(data.fingerprint(Order(golden / "synth500", 1, 64))))
    assert data.fingerprint_differences(stored, data.fingerprint(Order(golden / "synth500", 1, 64))) == []
    raw = bytearray((golden / "synth500.bin").read_bytes())
    raw[1000:2000] = bytes(1000)
    (golden / "synth500.bin").write_bytes(raw)
    here = data.fingerprint(Order(golden / "synth500", 1, 64))
    assert data.fingerprint_differences(stored, here) == ["the tokens in synth500.bin"]
    without = {name: None if name == "bin_sha256" else fact for name, fact in stored.items()}  # as for large data
    assert data.fingerprint_differences(without, here) == ["the tokens in synth500.bin"]
    old = {name: fact for name, fact in stored.items() if name != "shards"}  # as earlier versions wrote it
    assert "synth500.bin" in data.fingerprint_differences(old, here)[0]
    with pytest.raises((LookupError, TypeError, ValueError)):
        data.fingerprint_differences({"order_sha256": 5}, here)


def test_tokens_in_other_shards_are_the_same_data(golden, monkeypatch):
    def facts() -> dict:
        return json.loads(json.dumps(data.fingerprint(Order(golden / "synth500", 1, 64))))

    whole = facts()
    cut_into_shards(golden / "synth500", [999_999, 2_000_000])
    shards = facts()
    assert len(shards["shards"]) == 3
    assert data.fingerprint_differences(whole, shards) == data.fingerprint_differences(shards, whole) == []
    part = golden / "synth500-00001-of-00002.bin"
    part.write_bytes(bytes(100) + part.read_bytes()[100:])
    assert data.fingerprint_differences(shards, facts()) == [f"the tokens in {part.name}"]
    # Without the hash of all tokens, other shards cannot be compared.
    monkeypatch.setattr(data, "HASHED_AT_ONCE", 0)
    assert data.fingerprint_differences(whole, facts()) == ["the number or sizes of the token files (1 there, 3 here)"]


def test_blocks_of_a_large_file_are_sampled(tmp_path):
    """Three blocks of 10 bytes of a file of 1000: the first, one in the middle, the last."""
    path, raw = tmp_path / "large", bytes(range(250)) * 4

    def sample(changed: int | None = None, length: int = 1000) -> str:
        path.write_bytes(bytes(b ^ (i == changed) for i, b in enumerate(raw[:length])))
        return data.sample_sha256(DataFile(path), count=3, size=10)

    assert sample() == hashlib.sha256(raw[:10] + raw[495:505] + raw[990:]).hexdigest()
    for changed in (0, 9, 495, 504, 990, 999):
        assert sample(changed) != sample()
    for between in (10, 494, 505, 989):  # not sampled; `data.py info --hash` finds these
        assert sample(between) == sample()
    assert sample(length=30) == hashlib.sha256(raw[:30]).hexdigest()


# --- Commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call(*arguments) does what run_data(tmp_path, *arguments) does, in this process, which is quicker."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments) -> subprocess.CompletedProcess:
        command, status = ["data.py", *map(str, arguments)], 0
        monkeypatch.setattr(sys, "argv", command)
        try:
            run_command(data.main)
        except SystemExit as end:
            status = 1
            print(end, file=sys.stderr)
        return subprocess.CompletedProcess(command, status, *capfd.readouterr())

    return run


SHORT = ("--seq-len", "64", "--batch-size", "8", "--steps", "3")


def test_info(golden):
    run = run_data(golden, "info", "--data", "synth500", "--seq-len", "64", "--batch-size", "100", "--steps", "250")
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
    run = run_data(golden, "view", "--data", "synth500", *SHORT, "--step", "2", "--row", "3")
    assert run.returncode == 0, run.stderr
    head, ids = run.stdout.splitlines()
    assert "step 2, row 3 of 8 (row 19 of the order)" in head
    for document, offset, count in order.pieces(19):
        assert f"document {document} from {offset} ({count})" in head
    assert [int(id) for id in ids.split()] == order[19].tolist()
    everything = run_data(golden, "view", "--data", "synth500", *SHORT, "--step", "2").stdout.splitlines()
    assert len(everything) == 16
    assert everything[6:8] == [head, ids]


def test_commands_on_shuffled_rows(tmp_path, call):
    (tmp_path / "set").mkdir()
    rows = np.random.default_rng(4).integers(0, 50304, (20, 65)).astype("<u2")
    write_data(tmp_path / "set/document", list(rows), marks=[0])
    cut_into_shards(tmp_path / "set/document", [999])
    run = call("info", "--data", "set", *SHORT)
    assert run.returncode == 0, run.stderr
    assert "rows         20" in run.stdout
    assert "2 of 8 rows" in run.stdout
    run = call("view", "--data", "set", *SHORT, "--step", "1", "--row", "2")
    head, ids = run.stdout.splitlines()
    assert head == "--- step 1, row 2 of 8 (row 10 of the order)"
    assert [int(id) for id in ids.split()] == rows[10].tolist()
    assert_refused(call("view", "--data", "set", *SHORT, "--step", "2"), "step 2: the data has 2 steps of 8 rows")
    assert_refused(call("info", "--data", "set", "--batch-size", "0"), "--batch-size 0 must be at least 1")
    assert_refused(call("view", "--data", "set", "--step", "0"), "row 0 has 65 tokens, not 2049")
    for part in ("document.idx", "document-00001-of-00001.bin"):
        assert_refused(call("info", "--data", f"set/{part}", *SHORT), "did you mean set?")


def test_view_exports_the_batch(golden, call):
    arguments = ("view", "--data", "synth500", *SHORT, "--step", "1", "--export", "rows.npy")
    run = call(*arguments)
    assert run.returncode == 0, run.stderr
    rows = np.load(golden / "rows.npy", allow_pickle=False)
    assert (rows.dtype, rows.shape) == (np.uint16, (8, 65))
    truth = arrays("gpt2ds_L64_seed1234")["lt1_first20"]
    np.testing.assert_array_equal(rows, truth[8:16])
    assert_refused(call(*arguments), "rows.npy exists")
    np.testing.assert_array_equal(np.load(golden / "rows.npy", allow_pickle=False), rows)
    assert_refused(call(*arguments[:-1], "absent/rows.npy"), "absent/rows.npy: No such file")
    assert_refused(call(*arguments[:-1], "x" * 300), "File name too long; nothing was written")
    assert_refused(call(*arguments[:-1], "rows.npy/x"), "rows.npy/x: Not a directory")
    (golden / "link.npy").symlink_to("nowhere")
    assert_refused(call(*arguments[:-1], "link.npy"), "link.npy exists")


def test_commands_refuse_in_one_line(golden, call):
    before = {path: path.stat().st_mtime_ns for path in golden.iterdir()}
    edge = ("--data", "edgeA", "--seq-len", "64")
    for arguments, message in (
        (("info", "--data", "absent"), "neither absent.idx"),
        (("info", *edge, "--steps", "0"), "--steps 0"),
        (("info", *edge, "--seed", "x"), "--seed: invalid int value"),
        (("view", *edge), "required: --step"),
        (("info", "--data", "edgeA.bin"), "did you mean edgeA?"),
        (("info", "--data", "edgeA.idx"), "did you mean edgeA?"),
        (("info", "--data", "edgeA-00003-of-00020.bin"), "did you mean edgeA?"),
        (("info", "--data", "x" * 300), "neither xxx"),
        (("info", *edge, "--steps", "9" * 400), "--steps 999"),
        (("view", *edge, "--step", "0", "--batch-size", "0"), "--batch-size 0 must be at least 1"),
        (("view", *edge, "--step", "0", "--seed", "-1", "--steps", "1"), "--seed -1"),
        (("view", *edge, "--step", "0", "--seed", "99999999999", "--steps", "1"), "--seed 99999999999"),
        (("view", *edge, "--step", "0", "--steps", "100000000"), "lower --steps"),
        (("view", "--run", "absent", "--step", "0"), "absent/run.json cannot be read"),
    ):
        run = call(*arguments)
        assert_refused(run, message)
        assert "choose another --out" not in run.stderr
    assert {path: path.stat().st_mtime_ns for path in golden.iterdir()} == before
    for arguments, message in (  # these commands open the order and write its cache
        (("view", *edge, "--steps", "3", "--batch-size", "8", "--step", "3"), "step 3: the run has the steps 0 .. 2"),
        (("view", *edge, "--steps", "3", "--batch-size", "8", "--step", "0", "--row", "8"), "--row 8"),
        (("view", *edge, "--steps", "3", "--batch-size", "8", "--step", "0", "--tokenizer", "edgeA.idx"), "tokenizer"),
    ):
        assert_refused(call(*arguments), message)


def test_help_has_examples():
    assert "prepare" in run_data(REPO, "--help").stdout
    for name in ("prepare", "info", "view"):
        assert f"example: python data.py {name}" in run_data(REPO, name, "--help").stdout


def test_view_of_a_run(corpus, run, tmp_path, call, capfd):
    """All settings come from the run, and the rows are compared with the hash that it recorded."""
    directory = run("--stop-at", "3", "--seed", "7")
    capfd.readouterr()
    view = partial(call, "view", "--run", directory)
    shown = view("--step", "2", "--row", "1")
    assert shown.stdout == call(
        "view", "--data", corpus, "--seed", "7", "--seq-len", "32", "--batch-size", "4", "--steps", "9",
        "--step", "2", "--row", "1",
    ).stdout  # fmt: skip
    assert shown.stderr == f"these rows are those that {directory} recorded for step 2\n"
    assert view("--step", "5").stderr == f"note: {directory} has no record of step 5 to compare with\n"
    assert_refused(view("--step", "9"), "step 9: the run has the steps 0 .. 8")
    assert_refused(view("--step", "2", "--seed", "1234"), f"--seed 1234: the run {directory} has 7; leave out --seed")

    for end in (".bin", ".idx"):
        shutil.copy(f"{corpus}{end}", tmp_path / f"moved{end}")
    with (tmp_path / "moved.bin").open("r+b") as file:
        file.write(bytes(10_000))
    moved = view("--step", "2", "--data", tmp_path / "moved")
    assert_refused(moved, f"--data {tmp_path}/moved is not the data of {directory}: the tokens in moved.bin")

    lines = (directory / "metrics.jsonl").read_text().splitlines()
    damaged = [lines[0], lines[1].replace('"batch_sha256": "', '"batch_sha256": "0'), "{", lines[2]]
    (directory / "metrics.jsonl").write_text("\n".join(damaged))
    assert_refused(view("--step", "1"), "step 1: these rows are not those of the run")
    assert view("--step", "0").returncode == 0

    stored = json.loads((directory / "run.json").read_text())
    for where, value, message in (
        (("settings", "seq_len"), "32", "run.json is damaged: seq_len is '32'"),
        (("settings", "seq_len"), True, "run.json is damaged: seq_len is 'True'"),
        (("settings", "steps"), 10**400, "--steps 1000"),
        (("data", "order_sha256"), 5, "run.json is damaged"),
    ):
        changed = json.loads(json.dumps(stored))
        changed[where[0]][where[1]] = value
        (directory / "run.json").write_text(json.dumps(changed))
        assert_refused(view("--step", "2"), message)


def test_view_of_a_run_that_knows_only_its_fixed_settings(corpus, run, tmp_path, call, capfd):
    """run.json that was recovered from a checkpoint has no other settings. Its path of the data is the one that the
    user gave, so it may be relative to another directory."""
    directory = run("--stop-at", "1")
    capfd.readouterr()
    stored = json.loads((directory / "run.json").read_text())
    fixed = {name: value for name, value in stored["settings"].items() if name in FIXED}
    for name in ("text", "demo"):
        stored["settings"] = {**fixed, "data": name}
        (directory / "run.json").write_text(json.dumps(stored))
        run_view = partial(call, "view", "--run", directory, "--step", "0", "--export")
        assert_refused(run_view("x.npy"), f"--data {name} of {directory}/run.json is not here")
        assert not (tmp_path / "runs").exists()  # where the demo corpus would be built
    assert run_view(tmp_path / "x.npy", "--data", corpus).returncode == 0
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), batch(data.open_rows(corpus, 37, 32), 0, 4)[0])


def test_info_describes_the_data_before_the_order(golden, call):
    for arguments, message in ((("--seed", "-1", "--seq-len", "64"), "--seed -1"), ((), "1857 tokens make no row")):
        shown = call("info", "--data", "edgeA", *arguments)
        assert shown.returncode == 1
        assert shown.stderr.startswith("error: ")
        assert message in shown.stderr
        assert "1,857" in shown.stdout
        assert hashlib.sha256((golden / "edgeA.bin").read_bytes()).hexdigest() in shown.stdout


def test_names_and_tokens_of_unknown_origin(tmp_path, call):
    """Names with terminal escapes; token ids that are negative, or that the tokenizer lacks."""
    prefix = tmp_path / "es\x1b[31mcape"
    rows = np.array([[0, 40, 41, 42], [0, -1, 41, 42], [0, 300, 41, 42], [0, 2**31 - 1, 41, 2]], "<i4")
    write_data(prefix, [rows.ravel()], "<i4", 4)
    byte_tokenizer().save(f"{prefix}.tokenizer.json")
    flags = ("--data", prefix, "--seq-len", "3", "--batch-size", "1", "--steps", "5")
    shown = call("info", *flags)
    assert shown.returncode == 0, shown.stderr
    assert "es\\x1b[31mcape.bin" in shown.stdout
    order = Order(prefix, 6, 3)
    lines = {tuple(order[step].tolist()): call("view", *flags, "--step", step) for step in range(5)}
    assert any(min(ids) < 0 for ids in lines)
    assert any(max(ids) > 2**30 for ids in lines)
    for ids, view in lines.items():
        assert view.returncode == 0, view.stderr
        text = view.stdout.partition("\n")[2]
        known = all(0 <= id < 245 for id in ids)
        assert ("not in the tokenizer" in view.stderr) == (not known)
        assert text == ((byte_tokenizer().decode(ids, False) if known else " ".join(map(str, ids))) + "\n")


def test_small_corpora_and_the_default_steps(corpus, call):
    """143,000 steps would be thousands of epochs of such a corpus, and their number decides the order."""
    info = call("info", "--data", corpus)
    assert re.search(r"^order of +one epoch", info.stdout, re.MULTILINE)
    assert re.search(r"^epochs +1$", info.stdout, re.MULTILINE)
    assert info.stderr.startswith("note: assumed as in train.py: seed 1234, seq_len 2048, batch_size 1024, steps 14")
    refused = call("view", "--data", corpus, "--step", "3")
    assert_refused(refused, "the number of epochs decides the order: give --run RUN, or --steps as in train.py")


def test_the_stored_hash_of_large_data(corpus, tmp_path, monkeypatch):
    for end in (".bin", ".idx"):
        shutil.copy(f"{corpus}{end}", tmp_path / f"large{end}")
    expected = hashlib.sha256((tmp_path / "large.bin").read_bytes()).hexdigest()
    assert expected in run_data(tmp_path, "info", "--data", "large", "--hash").stdout
    monkeypatch.setattr(data, "HASHED_AT_ONCE", 0)

    def found() -> str | None:
        return data.fingerprint(data.open_rows(tmp_path / "large", 10, 32))["bin_sha256"]

    assert found() == expected
    stored = tmp_path / "large.sha256.json"
    kept = stored.read_text()
    other = {**json.loads(kept), "sha256": "\x1b[31m"}
    for damage in ("", "[]", "{}", "[" * 100_000, '{"sha256": 3}', "\udcff", json.dumps(other), " " * 2**21):
        stored.write_bytes(damage.encode(errors="surrogateescape"))
        assert found() is None
        stored.write_text(kept)
    assert found() == expected
    stored.unlink()
    os.mkfifo(stored)
    assert found() is None
    stored.unlink()
    stored.write_text(kept)
    with monkeypatch.context() as patch:  # another user has stored it, who is not root
        if os.getuid() == 0:
            os.chown(stored, 1, 1)
        patch.setattr(os, "geteuid", lambda: 2)
        assert found() is None
    stored.unlink()
    stored.write_text(kept)

    (tmp_path / "large.bin").write_bytes((tmp_path / "large.bin").read_bytes())
    assert found() is None  # it may have changed
    now = (tmp_path / "large.bin").stat()
    identity = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
    stored.write_text(json.dumps({"sha256": expected, "files": [identity]}))
    for later, known in ((10**7, None), (10**9, expected)):  # a file may change again within a tick of the clock
        os.utime(stored, ns=(0, now.st_ctime_ns + later))
        assert found() == known


def test_the_hash_is_computed_once(corpus, tmp_path, monkeypatch, capsys):
    for end in (".bin", ".idx"):
        shutil.copy(f"{corpus}{end}", tmp_path / f"large{end}")
    time.sleep(0.2)  # a file may change within a tick of the clock, so a hash right after a change is not trusted
    expected = data.hash_once(IndexedTokens(tmp_path / "large"))
    assert expected == hashlib.sha256((tmp_path / "large.bin").read_bytes()).hexdigest()
    monkeypatch.setattr(IndexedTokens, "tokens_sha256", lambda self: pytest.fail("hashed again"))
    assert data.hash_once(IndexedTokens(tmp_path / "large")) == expected
    monkeypatch.undo()

    (tmp_path / "large.sha256.json").unlink()
    (tmp_path / "large.sha256.json").mkdir()  # a rename onto it fails, also for root
    assert data.hash_once(IndexedTokens(tmp_path / "large")) == expected
    note = capsys.readouterr().err
    assert note.startswith(f"note: {tmp_path}/large.sha256.json cannot be written")
    assert note.count("\n") == 1


def test_reader_that_closes_the_pipe(golden):
    command = [sys.executable, REPO / "data.py", "view", "--data", "synth500", "--step", "0", "--batch-size", "500"]
    command += ["--seq-len", "512", "--steps", "1"]
    run = subprocess.Popen(command, cwd=golden, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout.readline().startswith("--- step 0, row 0")
    os.close(run.stdout.detach().detach().fileno())
    assert run.stderr.read() == ""
    assert run.wait(timeout=60) == 0


# find, count, index


@pytest.fixture
def words(tmp_path):
    """A data set of three documents, and its order for --steps 4 --batch-size 2 --seq-len 8."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("ab cab", "cab cab ab", "x")))
    data.prepare([tmp_path / "text.jsonl"], tmp_path / "words")
    return data.open_rows(tmp_path / "words", data.requested_samples(4, 2), 8)


ASKED = ("--data", "words", "--steps", "4", "--batch-size", "2", "--seq-len", "8")


def test_find_prints_the_pieces_of_a_document(words, tmp_path):
    run = run_data(tmp_path, "find", *ASKED, "--document", 1, "--json")
    assert [json.loads(line) for line in run.stdout.splitlines()] == words.find(1, 2, 4) != []
    run = run_data(tmp_path, "find", *ASKED, "--document", 1)
    assert run.stdout.startswith("step ")
    assert "copies in the order" in run.stderr


def test_find_and_count_agree_with_the_rows(words, tmp_path):
    """A text with and without a space before it; every row that has it whole."""
    served = [words[i].tolist() for i in range(8)]
    run = run_data(tmp_path, "find", *ASKED, "--text", "cab", "--json")
    pieces = [piece for line in run.stdout.splitlines() if (piece := json.loads(line))["whole"]]
    (ids,) = [[*map(int, run.stderr.split(": ")[1].split(";")[0].split("\n")[0].split(", "))]]
    places = {(i // 2, i % 2, p) for i, row in enumerate(served) for p in range(9) if row[p : p + len(ids)] == ids}
    assert {(piece["step"], piece["row"], piece["position"]) for piece in pieces} == places != set()
    (tmp_path / "terms.txt").write_text("cab\nx\n")
    run = run_data(tmp_path, "count", *ASKED, "--terms", "terms.txt", "--at", "2,4", "--json")
    counted = [json.loads(line) for line in run.stdout.splitlines()]
    assert [(record["term"], record["step"]) for record in counted] == [("cab", 2), ("cab", 4), ("x", 2), ("x", 4)]
    assert counted[1]["occurrences"] == len(places)
    assert counted[1]["rows"] == len({place[:2] for place in places})


def test_an_index_changes_no_answer(words, tmp_path):
    pytest.importorskip("pydivsufsort")
    before = run_data(tmp_path, "find", *ASKED, "--text", "ab", "--json")
    run = run_data(tmp_path, "index", "--data", "words")
    assert run.returncode == 0, run.stderr
    after = run_data(tmp_path, "find", *ASKED, "--text", "ab", "--json")
    assert (after.stdout, after.stderr) == (before.stdout, before.stderr)
    assert after.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("find", "--document", "3"), "document 3: the data has the documents 0 .. 2"),
        (("find", "--tokens", "1,a"), "--tokens 1,a: give whole numbers"),
        (("find", "--tokens", "70000"), "70000 is no uint16"),
        (("find", "--text", ""), "has no tokens"),
        (("count", "--tokens", "1", "--at", "9"), "the run has the checkpoints 1 .. 4"),
        (("count", "--terms", "nowhere.txt"), "nowhere.txt cannot be read"),
    ],
)
def test_find_and_count_refuse_in_one_line(words, tmp_path, arguments, message):
    assert_refused(run_data(tmp_path, arguments[0], *ASKED, *arguments[1:]), message)
