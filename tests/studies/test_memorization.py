"""Memorization: one pass says what generation says; planted texts, doses and effects are found as they were planted."""

import csv
import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pyarrow")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")
import pyarrow.parquet as pq

from corpus.indexed import HEADER, MAGIC
from corpus.order import row_digests
from data import open_rows
from model import SIZES, Pythia
from model.huggingface import save
from runtime.errors import UserError
from studies import figures, memorization
from studies.common import Run
from studies.memorization import (
    describe_rows,
    dose_lines,
    effect_lines,
    main,
    measure_rows,
    prediction_lines,
    read_starts,
    summary_of,
)

K = L = 16
MICRO = replace(SIZES["14m"], vocab=40, layers=2, hidden=32, heads=2, seq_len=64)


def greedy(model: Pythia, prompts: torch.Tensor, banned: int | None = None) -> torch.Tensor:
    """What the model writes, one forward pass of everything so far for each token, as the published script does."""
    tokens = prompts
    for _ in range(L):
        logits = model(tokens)[:, -1]
        if banned is not None:
            logits[:, banned] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(1, keepdim=True)], 1)
    return tokens[:, prompts.shape[1] :]


@pytest.fixture(scope="module")
def model() -> Pythia:
    """It writes various tokens, among them many ends of documents, by margins well above rounding."""
    model = Pythia(MICRO, seed=4).requires_grad_(False)
    model.embed *= 10
    model.unembed *= 4
    return model


@pytest.fixture(scope="module")
def tokens(model) -> torch.Tensor:
    """512 rows [512, k + l]: half of them go on as the model would. Some of both have ends of documents."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(MICRO.vocab, (512, K), generator=draw)
    rows = torch.cat([prompts, greedy(model, prompts)], 1)
    wrong = torch.arange(0, 512, 2)
    rows[wrong, torch.randint(K, K + L, (256,), generator=draw)] = torch.randint(MICRO.vocab, (256,), generator=draw)
    assert (rows[1::2, K:] == 0).any(1).sum() > 20
    return rows


# ---- one pass


@pytest.mark.parametrize(("batch", "rows"), [(7, 40), (512, 512)])
def test_one_pass_says_what_generation_says(batch, rows, model, tokens, monkeypatch):
    monkeypatch.setattr("studies.likelihood.VOCAB_CHUNK", 16)
    tokens = tokens[:rows]
    parts = [measure_rows(model, part, K, score=True) for part in tokens.split(batch)]
    found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    right = greedy(model, tokens[:, :K]) == tokens[:, K:]
    assert found["memorized"].tolist() == right.all(1).tolist()
    assert 0.4 * rows < found["memorized"].sum() < 0.6 * rows
    assert found["first_miss"].tolist() == right.long().cumprod(1).sum(1).tolist()
    np.testing.assert_array_equal(found["score"], right.float().mean(1))
    logits = model(tokens[:, :-1])[:, K - 1 :]
    nll = F.cross_entropy(logits.flatten(0, 1), tokens[:, K:].flatten(), reduction="none").view(-1, L).mean(1)
    np.testing.assert_allclose(found["nll"], nll, rtol=1e-5)
    true = tokens[:, K:, None]
    margin = (logits.gather(2, true) - logits.scatter(2, true, -torch.inf).amax(2, keepdim=True)).amin((1, 2))
    np.testing.assert_allclose(found["margin"], margin, rtol=1e-4, atol=1e-5)


def test_paper_exact_is_the_published_setting(model, tokens, tmp_path):
    """transformers suppresses <|endoftext|> up to min_length. So no row with one in its continuation can count."""
    import transformers

    save(model, tmp_path, torch.float32)
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(tmp_path)
    rows = tokens[:128]
    options = {"max_length": K + L, "min_length": K + L, "do_sample": False, "pad_token_id": 0, "eos_token_id": 0}
    written = theirs.generate(rows[:, :K], attention_mask=torch.ones_like(rows[:, :K]), **options)[:, K:]
    found = measure_rows(model, rows, K, banned=0, score=True)
    np.testing.assert_array_equal(found["score"], (written == rows[:, K:]).float().mean(1))
    end, free = (rows[:, K:] == 0).any(1).numpy(), measure_rows(model, rows, K)["memorized"]
    assert found["memorized"].tolist() == (free & ~end).tolist()
    assert (free & end).sum() > 3


def test_a_token_that_the_model_lacks(model):
    with pytest.raises(UserError, match="token id 40 is not one of the 40"):
        measure_rows(model, torch.full((1, K + L), 40), K)


# ---- the rows


def test_rows_and_where_they_come_from(corpus, tmp_path):
    """A run of 300 steps of four rows, on two epochs of the corpus."""
    rows, found = open_rows(corpus, 1200, 32), Run(tmp_path, [0])
    vars(found).update(rows=rows, asked=Namespace(batch_size=4, steps=300))
    numbers = np.arange(0, len(rows), 37)
    tokens = read_starts(rows, numbers, 8)
    items = describe_rows(found, numbers, row_digests(tokens))
    assert rows.epochs > 1
    seen_copies: dict[tuple, int] = {}
    for i, number in enumerate(numbers.tolist()):
        start = tuple(rows[number][:8].tolist())
        assert tuple(tokens[i].tolist()) == start
        assert items["seen_at"][i] == (number // 4 if number < 1200 else -1)
        assert items["document"][i] == rows.pieces(number)[0][0]
        assert items["copy"][i] == seen_copies.get(start, 0)
        seen_copies[start] = seen_copies.get(start, 0) + 1
        if number < len(rows) // 4 * 4:
            pieces = rows.find(items["document"][i], batch_size=4)
            (piece,) = [p for p in pieces if (p["step"], p["row"], p["position"]) == (number // 4, number % 4, 0)]
            assert items["epoch"][i] == piece["epoch"]
    assert set(items["epoch"]) >= {0, 1}
    with pytest.raises(UserError, match="are 34 tokens together, a row has 33"):
        read_starts(rows, numbers, 34)


# ---- the tables


def made(rows: int, **columns) -> dict[str, np.ndarray]:
    """Items of rows that are seen at steps 0, 1, 2 ...; the last tenth never is."""
    number = np.arange(rows)
    seen_at = np.where(number < rows * 9 // 10, number // 10, -1)
    names = {"row": number, "seen_at": seen_at, "same_as": number, "copy": np.zeros(rows, int), "margin": np.ones(rows)}
    names |= {"epoch": np.zeros(rows, int), "memorized": np.zeros(rows, bool), "nll": np.ones(rows)}
    return names | columns


def test_the_effect_of_training_is_found_beside_a_drift():
    """Rows get easier by 1 nat from checkpoint to checkpoint; those just seen by 0.5 more, which halves each time."""
    draw, items = np.random.default_rng(0), {}
    for step in (0, 10, 20, 30):
        plain = made(400)
        age = (step - plain["seen_at"] // 10 * 10) / 10 - 1  # of the first checkpoint that has seen a row: 0
        effect = np.where((plain["seen_at"] >= 0) & (age >= 0), 0.5 ** (age + 1), 0)
        items[step] = plain | {"nll": 9 - step / 10 - effect + draw.normal(0, 0.01, 400)}
    lines = effect_lines("a", items)
    assert [(e["cohort"], e["step"]) for e in lines] == [(10, 10), (10, 20), (10, 30), (20, 20), (20, 30), (30, 30)]
    for e in lines:
        expected = 0.5 ** ((e["step"] - e["cohort"]) / 10 + 1)
        assert e["effect"] == pytest.approx(expected, abs=4 * e["error"])
        assert e["error"] < 0.01
        assert (e["rows"], e["controls"]) == (100, 400 - 10 * e["step"])


def test_doses_and_predictions():
    items = made(100, same_as=np.r_[np.arange(40), np.arange(30), np.arange(10), np.arange(20, 40)])
    items["copy"] = np.r_[np.zeros(40, int), np.ones(30, int), np.full(10, 2), np.ones(20, int)]
    items["memorized"] = items["same_as"] < 10
    by_dose = {line["dose"]: line for line in dose_lines("a", 8, items)}
    assert {d: (line["texts"], line["memorized"]) for d, line in by_dose.items()} == {
        1: (10, 0),
        2: (20, 0),
        3: (10, 10),
    }
    early, final = items | {"memorized": items["row"] < 20}, items | {"memorized": items["row"] % 2 == 0}
    other = items | {"row": items["row"] + 1}
    lines = prediction_lines({("s", 5): early, ("other", 5): other, ("t", 9): final})
    assert [(line["run"], line["step"], line["rows"]) for line in lines] == [("s", 5, 50), ("t", 9, 90)]
    assert (lines[0]["precision"], lines[0]["recall"], lines[1]["f1"]) == (0.5, 0.4, 1.0)


def test_the_summary_tells_memory_from_what_is_easy():
    items = made(1000)
    items["memorized"] = (items["row"] % 10 == 0) | ((items["row"] % 10 == 1) & (items["row"] < 500))
    items["nll"] = 5 - items["row"] / 1000
    line = summary_of(items, 50, 20, reference=np.full(1000, 4.0) - items["row"] / 1000)
    assert (line["rows"], line["memorized"], line["rate"]) == (500, 100, 0.2)
    assert (line["rows_unseen"], line["rate_unseen"], line["excess"]) == (500, 0.1, 0.1)
    assert line["low"] < 0.2 < line["high"]
    assert line["order_rho"] == pytest.approx(1)  # the later a row was seen, the likelier it is
    assert np.isnan(line["order_rho_corrected"]) or abs(line["order_rho_corrected"]) < 1  # so it is without training
    assert line["dispersion"] == 0  # the same in every slice


# ---- the command


def write_rows(folder: Path, rows: np.ndarray) -> Path:
    """A pre-shuffled directory of rows [rows, seq_len + 1]."""
    folder.mkdir()
    count, width = rows.shape
    with (folder / "document.idx").open("wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, count, count + 1))
        file.write(np.full(count, width, "<i4").tobytes() + (np.arange(count) * 2 * width).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())
    (folder / "document.bin").write_bytes(rows.astype("<u2").tobytes())
    return folder


DOSES = {1: 40, 2: 10, 16: 2, 64: 2}  # how often a text is in the data, and how many such texts


@pytest.fixture
def planted(run, tmp_path) -> Path:
    """A run on random rows of 33 tokens, some of them many times."""
    draw = np.random.default_rng(1)
    texts = [(draw.integers(1, 64, 33), dose) for dose, count in DOSES.items() for _ in range(count)]
    rows = np.stack([text for text, dose in texts for _ in range(dose)] + list(draw.integers(1, 64, (60, 33))))
    rows = np.concatenate([draw.permutation(rows[:220]), rows[220:]])  # the last 60 are never served
    data = write_rows(tmp_path / "data", rows)
    flags = ["--steps", "55", "--lr", "1e-2", "--save-every", "25"]
    return run("--data", str(data), *flags)


def table(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open()))


def test_planted_texts_are_found(planted, tmp_path, monkeypatch):
    """Every dose is found as planted; only texts of many copies are memorized, and no row that was never served."""
    flags = [str(planted), "--k", "8", "--l", "16", "--slice", "10", "--out", str(tmp_path / "out"), "--device", "cpu"]
    main([*flags, "--steps", "0,25,55"])
    doses = {int(line["dose"]): line for line in table(tmp_path / "out/doses.csv") if line["step"] == "55"}
    assert {dose: int(line["texts"]) for dose, line in doses.items()} == {0: 60, **DOSES}
    assert [float(doses[dose]["rate"]) for dose in (0, 1, 2)] == [0, 0, 0]
    assert float(doses[64]["rate"]) == 1
    assert len(pq.read_table(tmp_path / "out/items.parquet")) == 3 * 280
    record = json.loads((tmp_path / "out/manifest.json").read_text())
    assert list(record["order_sha256"]) == ["run"]
    for name in ("rate", "effect", "doses", "position", "qq"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5000
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}
    monkeypatch.setattr(memorization, "measure_rows", None)
    monkeypatch.setattr(figures, "draw_memorization", lambda *_: None)  # it takes as long as all the rest
    main([*flags, "--steps", "0,25,55"])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if path.is_file()}


def train_on(rows: np.ndarray, seed: int) -> Pythia:
    """A model that has seen rows [3200, 65] once, 16 at a time."""
    model = Pythia(replace(MICRO, hidden=64, heads=4, vocab=256), seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    batches = torch.from_numpy(rows.astype(np.int64)).split(16)
    for step, x in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - 0.9 * step / len(batches))
        model(x[:, :-1], x[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


@pytest.mark.slow
def test_the_order_of_training_leaves_a_signal():
    """On source code, against a model that has seen the same rows in another order; nothing on shuffled positions."""
    draw = np.random.default_rng(0)
    source = b"".join(path.read_bytes() for path in sorted(Path(json.__file__).parents[1].glob("*.py")))
    rows = draw.permutation(np.frombuffer(source, np.uint8)[: 65 * 20_000].reshape(-1, 65))[:3200]
    models = train_on(rows, 1), train_on(draw.permutation(rows), 2)
    tokens = torch.from_numpy(rows.astype(np.int64))
    ours, other = (np.concatenate([measure_rows(m, part, 1)["nll"] for part in tokens.split(256)]) for m in models)
    number, plain = np.arange(3200), made(3200, nll=ours)
    plain["seen_at"] = number // 16

    def p_value(order: np.ndarray) -> float:
        return summary_of(plain | {"row": order}, 200, 512, reference=other)["order_p_corrected"]

    assert summary_of(plain, 200, 512, reference=other)["order_rho_corrected"] > 0.05  # late rows are likelier
    assert p_value(number) < 1e-3
    assert sum(p_value(draw.permutation(number)) > 0.05 for _ in range(100)) >= 88  # 95 are expected
