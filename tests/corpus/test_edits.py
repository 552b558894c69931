"""Edits files: applied to rows, in training, in `data.py view`; damaged and wrong ones."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import records
from megatron import assert_refused, copy_golden, run_data
from small_runs import STEPS, assert_same_training, launcher, metrics, trained

import data
from corpus import edits as edits_module
from corpus.edits import EDIT, Edits, write_edits
from runtime.errors import UserError
from train import parse, train


def facts(rows, command: str = "a test") -> dict:
    return {"order_sha256": rows.sha256, "seq_len": rows.seq_len, "command": command}


def edits_of(rows, places: dict[tuple[int, int], tuple[int, float]]) -> np.ndarray:
    """EDIT for {(row, position): (new token, weight)}."""
    lines = [(r, p, rows[r][p], new, weight) for (r, p), (new, weight) in sorted(places.items())]
    return np.array(lines, EDIT)


@pytest.fixture
def rows(tmp_path):
    return data.open_rows(copy_golden(tmp_path) / "synth500", 400, 64)


@pytest.fixture
def small_groups(monkeypatch):
    """Files with many row groups, of which few are in memory."""
    monkeypatch.setattr(edits_module, "GROUP", 7)
    monkeypatch.setattr(edits_module, "CACHED", 2)


def random_edits(rows, count: int) -> dict[tuple[int, int], tuple[int, float]]:
    rng = np.random.default_rng(0)
    places = zip(rng.integers(50, 90, count).tolist(), rng.integers(0, 65, count).tolist())
    return {(r, p): (int(rng.integers(0, 500)), 1.0 if p == 0 else float(rng.choice([0, 1, 2.5]))) for r, p in places}


def test_only_the_listed_tokens_and_weights_differ(rows, tmp_path, small_groups):
    places = random_edits(rows, 200)
    assert write_edits(tmp_path / "e.parquet", facts(rows), [edits_of(rows, places)]) == len(places)
    edited = data.open_rows(rows.data.prefix, 400, 64, edits=tmp_path / "e.parquet")
    for numbers in (np.arange(100), np.array([89, 3, 50]), np.array([60]), np.arange(90, 100)):
        tokens, weights = rows.take(numbers), np.ones((len(numbers), 64))
        for k, row in enumerate(numbers.tolist()):
            for position in range(65):
                new, weight = places.get((row, position), (tokens[k, position], 1))
                tokens[k, position], weights[k, position - 1] = new, weight if position else weights[k, -1]
        np.testing.assert_array_equal(edited.take(numbers), tokens)
        served = edited.weights(numbers)
        np.testing.assert_array_equal(np.ones_like(weights) if served is None else served, weights)
        assert (served is None) == (weights == 1).all()


def test_a_wrong_old_token_is_refused_with_its_place(rows, tmp_path):
    wrong = edits_of(rows, {(9, 3): (5, 1), (9, 4): (6, 1)})
    wrong["old"][1] += 1
    write_edits(tmp_path / "e.parquet", facts(rows), [wrong])
    edited = data.open_rows(rows.data.prefix, 400, 64, edits=tmp_path / "e.parquet", batch_size=4)
    data.batch(edited, 1, 4)
    message = rf"step 2, row 1 \(row 9 of the order\), position 4: .*expects token {wrong['old'][1]}, the data has"
    with pytest.raises(UserError, match=message):
        data.batch(edited, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 32}, "are for --seq-len 32, not 64"),
        ({"order_sha256": "ab" * 32}, r"are for the order with sha256 abababababab…, the order here has"),
        ({"row": 10**9}, "change row 1000000000, the order has"),
        ({"new": 70000}, r"a token id that uint16 cannot hold \(0 or 70000\)"),
    ],
)
def test_edits_of_other_rows_are_refused(rows, tmp_path, change, message):
    edits, about = edits_of(rows, {(9, 3): (5, 1)}), facts(rows)
    for name, value in change.items():
        (about if name in about else edits)[name] = value
    write_edits(tmp_path / "e.parquet", about, [edits])
    with pytest.raises(UserError, match=message):
        data.open_rows(rows.data.prefix, 400, 64, edits=tmp_path / "e.parquet")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ((9, 3, 0, 0, 1), "row 9, position 3: it does not come after the edit before it"),
        ((8, 4, 0, 0, 1), "row 8, position 4: it does not come after"),
        ((10, 65, 0, 0, 1), r"row 10, position 65: the position is not in 0 .. 64"),
        ((10, 0, 0, 0, 0.5), "row 10, position 0: position 0 is not a target"),
        ((10, 1, 0, 0, np.nan), "the weight is not a finite number"),
        ((10, 1, 0, 0, -1), "the weight is not a finite number of at least 0"),
        ((-1, 1, 0, 0, 1), "row -1, position 1: the row is negative"),
    ],
)
def test_edits_that_no_file_can_have(rows, tmp_path, monkeypatch, line, message):
    both = np.concatenate([edits_of(rows, {(9, 3): (5, 1)}), np.array([line], EDIT)])
    path = tmp_path / "e.parquet"
    with pytest.raises(ValueError, match=message):
        write_edits(path, facts(rows), [both])
    assert not path.exists()
    with monkeypatch.context() as patch:  # another program writes them
        patch.setattr(edits_module, "check", lambda *_: None)
        write_edits(path, facts(rows), [both])
    with pytest.raises(UserError, match=message):
        Edits(path)


def test_files_that_are_no_edits_are_refused_in_one_line(rows, tmp_path, small_groups, monkeypatch):
    path = tmp_path / "e.parquet"
    write_edits(path, facts(rows), [edits_of(rows, random_edits(rows, 50))])
    with pytest.raises(UserError, match="exists; choose another name"):
        write_edits(path, facts(rows), [])
    good = path.read_bytes()
    for raw in (b"", b"PAR1", good[:-100], good[:1000] + bytes(100) + good[1100:]):
        path.write_bytes(raw)
        with pytest.raises(UserError, match="not an edits file that works"):
            Edits(path)
    with pytest.raises(UserError, match=r"missing\.parquet: the edits file does not exist"):
        Edits(tmp_path / "missing.parquet")
    with pytest.raises(UserError, match=r"No such file.*nothing was written"):
        write_edits(tmp_path / "no" / "e.parquet", facts(rows), [])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"edits files need pyarrow: pip install -e '.\[data\]'"):
        Edits(path)


def damaged(raw: bytes, draw: random.Random) -> bytes:
    """A file with one to four faults, half of them in its last kilobyte, where parquet has its metadata."""
    changed = bytearray(raw)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(draw.choice((0, len(changed) - 1000)), len(changed))
        match draw.randrange(5):
            case 0:
                changed[at] ^= 1 << draw.randrange(8)
            case 1:
                changed[at : at + 8] = draw.choice((bytes(8), b"\xff" * 8, b"\xff\xff\xff\x7f" * 2, draw.randbytes(8)))
            case 2:
                del changed[at : at + draw.randrange(1, 100)]
            case 3:
                changed[at:at] = draw.randbytes(draw.randrange(1, 20))
            case 4:
                other = draw.randrange(len(changed))
                changed[at : at + 50] = changed[other : other + 50]
    return bytes(changed)


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_no_damage_gives_a_crash_or_a_wrong_edit(rows, tmp_path, small_groups, count):
    draw, refused = random.Random(count), 0
    edits = edits_of(rows, random_edits(rows, 60))
    write_edits(tmp_path / "good.parquet", facts(rows), [edits])
    raw, path = (tmp_path / "good.parquet").read_bytes(), tmp_path / "bad.parquet"
    for _ in range(count):
        path.write_bytes(damaged(raw, draw))
        try:
            opened = Edits(path)
            assert np.concatenate([*opened.groups()]).tobytes() == edits.tobytes()
            assert {name: getattr(opened, name) for name in facts(rows)} == facts(rows)
        except UserError as error:
            refused += str(error).startswith(f"{path}: not an edits file that works (")
    assert refused > 0.8 * count


# ---- training with edits ---------------------------------------------------------------------------------------------


@pytest.fixture
def edits_file(corpus, tmp_path):
    """edits_file(places, name) for the rows of the fixture `run`. Returns the path."""
    rows = data.open_rows(corpus, data.requested_samples(9, 4), 32)

    def write(places: dict, name: str = "e.parquet") -> Path:
        write_edits(tmp_path / name, facts(rows), [edits_of(rows, places)])
        return tmp_path / name

    return write


def without_hash(run_directory: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k != "edits_sha256"} for record in records(run_directory)]


def test_rows_before_the_first_edit_and_an_empty_file_change_no_bit(run, edits_file):
    plain = run(out="plain")
    empty = run("--edits", edits_file({}, "empty.parquet"), out="empty")
    assert without_hash(empty) == records(plain)
    assert (empty / "step9/model.safetensors").read_bytes() == (plain / "step9/model.safetensors").read_bytes()

    file = edits_file({(4 * 5 + 2, 7): (99, 1.0)})
    edited = run("--edits", file, out="edited")
    before, after = records(plain), without_hash(edited)
    assert after[:5] == before[:5]
    rows = np.array([record["row_losses"] for record in before]), np.array([record["row_losses"] for record in after])
    assert [tuple(place) for place in np.argwhere(rows[0][:6] != rows[1][:6])] == [(5, 2)]
    assert after[8]["loss"] != before[8]["loss"]
    sha256 = json.loads((edited / "run.json").read_text())["data"]["edits"]["sha256"]
    assert {record["edits_sha256"] for record in records(edited)} == {sha256}
    assert sha256 == Edits(file).sha256


def test_a_mask_changes_what_is_learned_and_not_what_is_seen(run, edits_file, corpus):
    rows = data.open_rows(corpus, data.requested_samples(9, 4), 32)
    masked = {(22, p): (int(rows[22][p]), 0.0) for p in range(1, 33)}
    plain, edited = run(out="plain"), run("--edits", edits_file(masked), out="edited")
    before, after = records(plain), without_hash(edited)
    kept = ("loss", "row_losses", "batch_sha256")
    assert after[:5] == before[:5]
    assert [after[5][name] for name in kept] == [before[5][name] for name in kept]
    assert after[5]["grad_norm"] != before[5]["grad_norm"]
    assert after[6]["loss"] != before[6]["loss"]


def test_a_run_resumes_with_its_own_edits_only(run, edits_file, tmp_path):
    file, other = edits_file({(30, 7): (99, 1.0)}), edits_file({(30, 7): (98, 1.0)}, "other.parquet")
    whole = run("--edits", file, out="whole")
    run("--edits", file, "--stop-at", "4")
    for flags, here in (([], "none"), (["--edits", other], f"sha256 {Edits(other).sha256[:12]}…")):
        with pytest.raises(UserError, match=rf"--edits \(sha256 {Edits(file).sha256[:12]}… there, {here} here\)"):
            run(*flags)
    file.rename(tmp_path / "moved.parquet")
    resumed = run("--edits", tmp_path / "moved.parquet")
    assert records(resumed) == records(whole)


def test_a_branch_has_the_edits_of_its_parent_or_its_own(run, edits_file, tmp_path, capsys):
    """A branch equals the run that it comes from, had that run had the edits."""

    def branch(*flags, out: str) -> Path:
        line = ["--branch", tmp_path / "run/step4", "--out", tmp_path / out, "--kernels", "torch", *flags]
        train(parse(list(map(str, line))))
        return tmp_path / out

    one, two = edits_file({(18, 7): (99, 1.0)}), edits_file({(18, 7): (99, 1.0), (30, 3): (98, 1.0)}, "two.parquet")
    parent = run("--edits", one, "--keep-state", "9")
    wanted, plain = run("--edits", two, out="wanted"), run(out="plain")
    assert records(branch(out="same")) == records(parent)[4:]
    capsys.readouterr()
    assert records(branch("--edits", two, out="own")) == records(wanted)[4:]
    sha256 = [Edits(file).sha256[:12] for file in (one, two)]
    assert f"other settings: --edits (sha256 {sha256[0]}… there, sha256 {sha256[1]}… here)" in capsys.readouterr().out
    assert records(branch("--edits", "", out="none")) == records(plain)[4:]


def test_edits_for_other_data_are_refused_before_the_first_step(run, edits_file, tmp_path):
    file = edits_file({(3, 3): (1, 1.0), (30, 7): (99, 1.0)})
    source = Edits(file)
    (wrong,) = (edits.copy() for edits in source.groups())
    wrong["old"][1] += 1
    about = {"order_sha256": source.order_sha256, "seq_len": 32, "command": ""}
    write_edits(tmp_path / "wrong.parquet", about, [wrong])
    with pytest.raises(UserError, match=r"step 7, row 2 \(row 30 of the order\), position 7: .*expects token"):
        run("--edits", tmp_path / "wrong.parquet")
    assert not (tmp_path / "run").exists()


def test_a_token_outside_the_vocabulary_is_refused(run, edits_file):
    with pytest.raises(UserError, match="step 7, row 30, position 7: token id 384 is outside the vocabulary of 384"):
        run("--edits", edits_file({(30, 7): (384, 1.0)}))


@pytest.mark.slow
def test_edits_and_weights_on_two_ranks(corpus, tmp_path):
    start = launcher(corpus, tmp_path)
    rows = data.open_rows(corpus, data.requested_samples(STEPS, 12), 32)
    places = {(r, p): (97, 1.0 if p % 2 else 0.0) for r in range(24, 90, 5) for p in range(3, 20)}
    write_edits(tmp_path / "e.parquet", facts(rows), [edits_of(rows, places)])
    one, two = (trained(start(n, "--edits", tmp_path / "e.parquet", out=f"{n}")) for n in (1, 2))
    assert_same_training(two, one)
    assert metrics(one)[4]["loss"] != metrics(trained(start(1, out="plain")))[4]["loss"]


# ---- commands --------------------------------------------------------------------------------------------------------


def test_view_shows_what_an_edited_run_saw(run, edits_file, corpus, tmp_path):
    file = edits_file({(22, 7): (99, 1.0)})
    directory = run("--edits", file, "--stop-at", "6")
    shown = run_data(tmp_path, "view", "--run", directory, "--step", "5", "--export", "a.npy")
    assert shown.returncode == 0, shown.stderr
    assert "are those that" in shown.stderr
    plain = data.open_rows(corpus, data.requested_samples(9, 4), 32)
    expected = data.batch(plain, 5, 4)[0]
    expected[2, 7] = 99
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy"), expected)

    planned = edits_file({(21, 7): (98, 1.0)}, "planned.parquet")
    shown = run_data(tmp_path, "view", "--run", directory, "--step", "5", "--edits", planned)
    assert f"was trained without {planned}" in shown.stderr
    assert shown.returncode == 0
    shown = run_data(tmp_path, "find", "--run", directory, "--tokens", "99")
    assert f"trained with the edits {file}" in shown.stderr
    planned.rename(file)
    refused = run_data(tmp_path, "view", "--run", directory, "--step", "5")
    assert_refused(refused, f"{file} is not as {directory} had it: give the edits of the run as --edits")
