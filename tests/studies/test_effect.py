"""The effect of a change is 0.0 before the change and without one, and not 0 after it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

from corpus.edits import EDIT, write_edits
from data import open_rows, requested_samples
from runtime.errors import UserError
from studies.effect import main

TEXT = np.arange(100, 133)  # the 33 tokens of a row


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open()))


@pytest.fixture
def edits(corpus, tmp_path) -> Path:
    """A file that writes TEXT over two rows of step 5, and does not count the last two tokens of a row of step 6."""
    rows = open_rows(corpus, requested_samples(9, 4), 32)
    numbers, positions = np.repeat([21, 23, 24], [33, 33, 2]), np.r_[0:33, 0:33, 31:33]
    found = np.zeros(len(numbers), EDIT)
    found["row"], found["position"] = numbers, positions
    found["old"] = rows.take(numbers)[np.arange(len(numbers)), positions]
    found["new"] = np.where(numbers == 24, found["old"], TEXT[positions])
    found["weight"] = np.where(numbers == 24, 0, 1)
    facts = {"order_sha256": rows.sha256, "seq_len": 32, "command": "test"}
    write_edits(tmp_path / "edits.parquet", facts, [found])
    return tmp_path / "edits.parquet"


def test_the_effect_begins_with_the_change(run, edits, tmp_path):
    """A branch without edits has no effect at all."""
    base = run("--save-every", "1", "--keep-state", "9", "--lr", "1e-2", out="base")
    start = ["--branch", base / "step2", "--save-every", "1"]
    run(*start, out="plain")
    run(*start, "--edits", edits, out="edited")
    run(*start, "--nudge", "3", out="nudged")
    probes = tmp_path / "probes.jsonl"
    probes.write_text("".join(json.dumps({"tokens": tokens}) + "\n" for tokens in (TEXT.tolist(), [5, 6, 7])))
    runs = [str(tmp_path / name) for name in ("base", "plain", "edited", "nudged")]
    main([*runs, "--probe", str(probes), "--out", str(tmp_path / "out"), "--device", "cpu"])
    lines = table(tmp_path / "out/effect.csv")
    steps = {name: sorted({int(line["step"]) for line in lines if line["run"] == name}) for name in ("plain", "edited")}
    assert steps == {"plain": list(range(2, 10)), "edited": list(range(2, 10))}
    nudged = [line for line in lines if line["run"] == "nudged"]
    assert {line["nudge"] for line in nudged} == {"3"}
    assert 0 < max(float(line["largest"]) for line in nudged) < 1e-3
    for line in [line for line in lines if line["nudge"] == "0"]:
        is_changed = line["run"] == "edited" and int(line["step"]) > 5
        assert (float(line["largest"]) > 0) == is_changed
        if is_changed and line["text"] == "0":
            assert float(line["effect"]) > 0.05  # nats: this branch has seen the text twice
    changes = [tuple(line.values()) for line in table(tmp_path / "out/changed.csv")]
    expected = [("edited", "5", "21", "33", "0"), ("edited", "5", "23", "33", "0"), ("edited", "6", "24", "0", "2")]
    assert changes == expected
    summary = [line for line in table(tmp_path / "out/summary.csv") if line["run"] == "edited"]
    assert [line["changed_rows"] for line in summary] == ["0", "0", "0", "0", "2", "3", "3", "3"]
    assert (tmp_path / "out/effect.svg").stat().st_size > 5000


def test_runs_that_cannot_be_compared(run, tmp_path):
    one, other = run("--steps", "1", out="one"), run("--steps", "4", out="other")
    (tmp_path / "p.jsonl").write_text('{"tokens": [1, 2]}')
    flags = ["--probe", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with pytest.raises(UserError, match="give a run, and one or more branches"):
        main([str(one), *flags])
    for step in (0, 1):
        (other / f"step{step}" / "manifest.json").unlink()
    with pytest.raises(UserError, match="have no step in common"):
        main([str(one), str(other), *flags])
