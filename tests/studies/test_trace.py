"""The trace of rows is row_loss.bin; the probe of a row has the loss that training recorded for it."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import row_losses

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import pyarrow.parquet as pq

from data import open_rows, requested_samples
from runtime.errors import UserError
from studies.figures import draw_rows
from studies.trace import documents_of, main, parts_of_training


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_rows_and_probes_of_a_run(run, corpus, tmp_path):
    """Row j of step 8 has under checkpoint 8 the loss that training recorded before update 8."""
    trained, out = run(out="trained"), tmp_path / "out"
    losses, rows = row_losses(trained), open_rows(corpus, requested_samples(9, 4), 32)
    main([str(trained), "--out", str(out), "--every", "2"])
    items = pq.read_table(out / "items.parquet").to_pydict()
    assert items["row"] == list(range(0, 36, 2))
    np.testing.assert_array_equal(items["loss"], losses.ravel()[::2])
    np.testing.assert_allclose(items["excess"], (losses - losses.mean(1, keepdims=True)).ravel()[::2], atol=1e-6)
    assert items["document"] == [rows.pieces(i)[0][0] for i in range(0, 36, 2)]
    assert len(table(out / "summary.csv")) == 18
    assert json.loads((out / "manifest.json").read_text())["order_sha256"] == {"trained": rows.sha256}

    probes = [{"tokens": rows[32 + j].tolist()} for j in range(4)] + [{"text": "abc"}]
    (tmp_path / "probes.jsonl").write_text("".join(json.dumps(probe) + "\n" for probe in probes))
    main(
        [str(trained), "--out", str(tmp_path / "probed"), "--probe", str(tmp_path / "probes.jsonl"), "--device", "cpu"]
    )
    found = {(line["step"], int(line["text"])): float(line["nll"]) for line in table(tmp_path / "probed/probes.csv")}
    assert len(found) == 5 * len({step for step, _ in found})
    np.testing.assert_allclose([found["8", j] for j in range(4)], losses[8], rtol=1e-6)
    nll = np.stack(pq.read_table(tmp_path / "probed/items.parquet")["nll"].to_pylist()).astype(float)
    assert np.isnan(nll).sum(1).tolist() == [0, 0, 0, 0, 30] * (len(found) // 5)  # 32 targets; those of "abc" are two
    for name in ("out/rows", "probed/probes"):
        assert (tmp_path / f"{name}.svg").stat().st_size > 5000


def test_probes_of_the_training_are_those_of_the_checkpoints(run, tmp_path):
    probes = tmp_path / "probes.jsonl"
    probes.write_text('{"tokens": [7, 8, 9, 10]}\n{"text": "ab"}\n{"tokens": [5, 6, 7]}\n')
    trained = run("--probes", probes, "--probe-every", "4", "--lr", "0.01", out="trained")
    main([str(trained), "--out", str(tmp_path / "dense")])
    main([str(trained), "--out", str(tmp_path / "offline"), "--probe", str(probes), "--device", "cpu"])
    dense, offline = (
        {(line["step"], line["text"]): float(line["nll"]) for line in table(tmp_path / name / "probes.csv")}
        for name in ("dense", "offline")
    )
    assert [*dense] == [(step, text) for step in "048" for text in "012"]
    assert dense == pytest.approx({key: offline[key] for key in dense}, rel=1e-6)
    assert (tmp_path / "dense/probes.svg").stat().st_size > 5000


def test_what_was_seen_before_is_told_apart(tmp_path):
    count = 1000
    row = np.arange(count)
    items = {"row": row, "step": row // 10, "document": row % 20, "epoch": row % 2, "copy": row % 5 // 4}
    loss = 5 - row / count - 0.5 * items["epoch"] - 0.25 * items["copy"] + (items["document"] == 3)
    items |= {"loss": loss, "excess": loss - (5 - row / count)}
    lines = parts_of_training(items)
    assert [sum(line["rows"] for line in lines), lines[0]["first_step"], lines[-1]["last_step"]] == [1000, 0, 99]
    sights = np.mean([line["excess_first_sight"] - line["excess_later_sight"] for line in lines])
    assert sights == pytest.approx(0.5 - 0.1, abs=1e-9)  # document 3 is odd, as all later sights are
    assert np.mean([line["excess_first_copy"] - line["excess_later_copy"] for line in lines]) > 0.2
    draw_rows(tmp_path, lines)
    assert (tmp_path / "copies.svg").stat().st_size > 5000
    worst = documents_of(items)[0]
    assert (worst["document"], worst["rows"]) == (3, 50)
    assert worst["excess"] == pytest.approx(np.mean(items["excess"][items["document"] == 3]))


def test_a_damaged_row_loss(run, tmp_path):
    trained = run("--steps", "2", out="trained")
    (trained / "row_loss.bin").unlink()
    with pytest.raises(UserError, match=r"row_loss\.bin cannot be read: No such file"):
        main([str(trained), "--out", str(tmp_path / "out")])
