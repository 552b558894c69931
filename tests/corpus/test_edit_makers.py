"""`data.py edit`: plant, mask, drop, show and undo, on the rows of nine steps of four rows of 32 tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

import data
from corpus.edits import Edits
from runtime.errors import UserError

SERVED = 36  # rows


@pytest.fixture
def rows(corpus):
    return data.open_rows(corpus, data.requested_samples(9, 4), 32)


@pytest.fixture
def edit(corpus, tmp_path, monkeypatch, capsys):
    """edit(action, *arguments) -> (the file that it makes, what it prints)."""
    monkeypatch.chdir(tmp_path)

    def run(action: str, *arguments, out: str = "e.parquet") -> tuple[Path, str]:
        order = ["--data", corpus, "--steps", 9, "--batch-size", 4, "--seq-len", 32]
        made = [] if action == "show" else ["--out", out]
        data.main(list(map(str, ["edit", action, *arguments, *made, *(order if action != "undo" else [])])))
        return tmp_path / out, capsys.readouterr().out

    return run


def edited(rows, file: Path):
    return data.open_rows(rows.data.prefix, data.requested_samples(9, 4), 32, edits=file)


def changed(rows, file: Path) -> set[tuple[int, int]]:
    """The places (row, position) of the served rows that differ."""
    served = np.arange(SERVED)
    return {(r, p) for r, p in np.argwhere(rows.take(served) != edited(rows, file).take(served)).tolist()}


PLANTS = [
    {"text": "ZEMBLA", "times": 9, "from_step": 2},
    {"tokens": [300, 301, 302], "times": 4, "steps": [3, 8], "position": 5},
    {"tokens": [303] * 33, "steps": [4]},
]


def test_plants_are_where_and_as_often_as_asked_and_never_two_in_one_place(edit, rows, tmp_path):
    (tmp_path / "plants.jsonl").write_text("".join(json.dumps(plant) + "\n" for plant in PLANTS))
    file, printed = edit("plant", "--plants", "plants.jsonl")
    places = [json.loads(line) for line in printed.splitlines()]
    assert [p["line"] for p in places] == [1] * 9 + [2] * 4 + [3]
    assert [p["step"] for p in places] == [2, 2, 3, 4, 5, 5, 6, 7, 8, 3, 3, 8, 8, 4]  # spread evenly
    texts, covered = edited(rows, file), []
    for place in places:
        row, begin = 4 * place["step"] + place["row"], place["position"]
        plant = PLANTS[place["line"] - 1]
        expected = plant.get("tokens") or [ord(letter) - 31 for letter in "ZEMBLA"]  # as in Pythia's tokenizer
        assert texts[row][begin : begin + place["tokens"]].tolist() == expected
        assert begin == plant.get("position", begin)
        covered += [(row, begin + k) for k in range(place["tokens"])]
    assert len(covered) == len({*covered}) == Edits(file).count
    assert changed(rows, file) <= {*covered}

    again, printed_again = edit("plant", "--plants", "plants.jsonl", out="again.parquet")
    assert printed_again == printed
    assert (again.read_bytes() == file.read_bytes()) == (Edits(again).command == Edits(file).command)
    _, other = edit("plant", "--plants", "plants.jsonl", "--draw-seed", "1", out="other.parquet")
    assert other != printed


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ({"text": "a", "tokens": [1]}, "line 1: give text or tokens"),
        ({"times": 2}, "line 1: give text or tokens"),
        ({"tokens": [1], "step": 3}, "line 1: unknown: step"),
        ({"tokens": [1.5]}, "are whole numbers"),
        ({"tokens": [70000]}, "line 1: 70000 is no uint16"),
        ({"tokens": [1], "steps": [9]}, r"step 9 is not in 0 .. 8"),
        ({"tokens": [1], "from_step": 9}, "in 0 steps, position None: do not fit"),
        ({"tokens": [1] * 34}, "1 times 34 tokens, in 9 steps, position None: do not fit"),
        ({"tokens": [1] * 10, "position": 24}, "position 24: do not fit"),
        ({"tokens": [1] * 33, "steps": [3], "times": 5}, "no free place in step 3 for one more copy"),
        ([1], "line 1: 'list' object"),
    ],
)
def test_plants_that_cannot_be(edit, tmp_path, plant, message):
    (tmp_path / "plants.jsonl").write_text(json.dumps(plant))
    with pytest.raises(UserError, match=message):
        edit("plant", "--plants", "plants.jsonl")
    assert not (tmp_path / "e.parquet").exists()


def test_a_mask_covers_every_token_of_a_document_and_no_other(edit, rows):
    document = rows.pieces(13)[0][0]
    file, _ = edit("mask", "--documents", document, "--from-step", 1, "--weight", 0.25)
    expected = np.ones((SERVED, 32), np.float32)
    for row in range(4, SERVED):
        position = 0
        for number, _, count in rows.pieces(row):
            for p in range(max(position, 1), position + count):
                expected[row, p - 1] = 0.25 if number == document else 1
            position += count
    assert (expected != 1).any()
    np.testing.assert_array_equal(edited(rows, file).weights(np.arange(SERVED)), expected)
    assert changed(rows, file) == set()


def test_dropped_documents_are_in_no_row_and_nothing_else_moves(edit, rows):
    document = rows.pieces(13)[0][0]
    with_it = {4 * piece["step"] + piece["row"] for piece in rows.find(document, 4, 9)}
    file, _ = edit("drop", "--documents", document)
    served, spare = edited(rows, file).take(np.arange(SERVED)), [rows[i].tolist() for i in range(SERVED, len(rows))]
    for row in range(SERVED):
        assert (served[row].tolist() in spare) == (row in with_it)
        assert (served[row] == rows[row]).all() == (row not in with_it)
    assert len({served[row].tobytes() for row in with_it}) == len(with_it) > 1
    assert all(number != document for i in spare_rows(rows, served, with_it) for number, _, _ in rows.pieces(i))

    file, _ = edit("drop", "--rows", "3,30", "--to-step", 5, out="rows.parquet")
    assert {row for row, _ in changed(rows, file)} == {3}
    with pytest.raises(UserError, match="36 rows are to be replaced, but only 0 rows are left"):
        edit("drop", "--documents", ",".join(map(str, range(60))), out="all.parquet")


def spare_rows(rows, served: np.ndarray, replaced: set[int]) -> list[int]:
    """The numbers of the rows that took the place of others."""
    number_of = {rows[i].tobytes(): i for i in range(SERVED, len(rows))}
    return [number_of[served[row].tobytes()] for row in replaced]


def test_show_and_undo(edit, rows, tmp_path, monkeypatch):
    (tmp_path / "plants.jsonl").write_text(json.dumps(PLANTS[0]))
    file, _ = edit("plant", "--plants", "plants.jsonl")
    masked, _ = edit("mask", "--tokens", ",".join(map(str, rows[7][3:9])), out="masked.parquet")
    edits = next(Edits(file).groups())
    row, position = edits["row"][0], edits["position"][0]
    _, printed = edit("show", file)
    lines = printed.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith(f"step {row // 4}, row {row % 4}, position {position}: ")
    assert "-]{+ZEMBLA+}" in lines[0]
    _, printed = edit("show", masked, "--from-step", "1", "--to-step", "2")
    assert ", weight 0: " in printed
    assert "{=" in printed
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert "\x1b[32mZEMBLA\x1b[0m" in edit("show", file)[1]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in edit("show", file)[1]

    for made in (file, masked):
        undone, _ = edit("undo", made, out=f"undone-{made.name}")
        served = np.arange(SERVED)
        tokens = edited(rows, made).take(served)
        Edits(undone).apply(served, tokens)
        np.testing.assert_array_equal(tokens, rows.take(served))
        weights = Edits(undone).weights(served)
        assert weights is None
