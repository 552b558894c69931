"""The checkpoint stream, and the tables of a study: whole, measured once, the same on any number of ranks."""

import json
import shutil
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoints"))
import pyarrow.parquet as pq
from trainee import ThreadRank, Trainee, flip

from checkpoints.manifest import choose_steps, drop_state
from corpus.order import digest, row_digests
from model.huggingface import load
from runtime.errors import UserError
from runtime.ranks import Dist
from studies.common import Study, find_run, stream, study_parser, write_csv

ITEMS = {"row": np.arange(11) * 3, "token": np.arange(11, dtype=np.int32) % 40}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run with checkpoints 1, 2, 3."""
    trainee, run = Trainee(), tmp_path_factory.mktemp("studies") / "run"
    for step in (1, 2, 3):
        trainee.train(step - 1, step)
        trainee.save(run, step, dtype=torch.float32, keep_state=9)
    return run


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def studied(saved, tmp_path_factory) -> Path:
    """The tables of that run."""
    study(saved, out := tmp_path_factory.mktemp("studied") / "out")
    return out


@dataclass(frozen=True)
class ThreadRanks(ThreadRank):
    """Ranks that are threads and can exchange tensors too."""

    tensors: list = field(default_factory=list)

    def all_gather(self, x):
        self.tensors[self.rank] = x
        self.meeting.wait(60)
        together = torch.stack(list(self.tensors))
        self.meeting.wait(60)
        return together


def measure_with(measured: list):
    """compute(step, model, items): the logit of every token after itself. It remembers which items it got."""

    def compute(step, model, items):
        measured.extend(items["row"].tolist())
        tokens = torch.from_numpy(items["token"].astype(np.int64))[:, None]
        logits = model(tokens)[:, 0].gather(1, tokens)[:, 0]
        return {"logit": logits.numpy(), "positive": (logits > 0).numpy()}

    return compute


def study(run: Path, out: Path, dist=Dist(), measured=None, settings=None, flags=()) -> list[dict] | None:  # noqa: B008
    args = study_parser("toy", "").parse_args([str(run), "--out", str(out), "--device", "cpu", *flags])
    toy = Study("toy", args, settings or {}, dist)
    numbers = toy.sample(11)
    items = {name: values[numbers] for name, values in ITEMS.items()}
    toy.measure(toy.runs[0], items, measure_with([] if measured is None else measured), batch=2)
    return toy.finish(lambda run, step, columns: {"mean": float(np.mean(columns["logit"]))})


# ---- the stream


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_stream_is_the_checkpoints_in_one_model(copy, dtype):
    models = []
    for step, model in stream(copy, [1, 2, 3], torch.device("cpu"), dtype):
        models.append(model)
        expected = load(copy / f"step{step}", dtype)
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs), name
            assert ours.dtype == dtype
    assert len({id(model) for model in models}) == 1
    assert not any(p.requires_grad for p in models[0].parameters())


def test_a_damaged_checkpoint_is_not_used(copy):
    flip(copy / "step2/model.safetensors")
    checkpoints = stream(copy, [1, 2, 3], torch.device("cpu"), torch.float32)
    assert next(checkpoints)[0] == 1
    with pytest.raises(UserError, match=r"step2/model\.safetensors is damaged"):
        next(checkpoints)


def test_a_checkpoint_of_another_shape_is_refused(copy):
    Trainee(replace(Trainee().model.config, layers=2)).save(copy, 4, dtype=torch.float32)
    with pytest.raises(UserError, match=r"step4 is another model than .*step3"):
        list(stream(copy, [3, 4], torch.device("cpu"), torch.float32))


def test_a_checkpoint_of_ours_gets_the_gelu_of_its_training(copy):
    Trainee().save(copy, 5, record={"settings": {"gelu": "tanh"}})
    Trainee().save(copy, 6, record={"settings": {"gelu": "none"}})
    found = [next(stream(copy, [step], torch.device("cpu"), torch.float32))[1].config.gelu for step in (1, 5, 6)]
    assert found == ["none", "tanh", "none"]  # step1 does not say how it was trained


# ---- --steps and the rows


@pytest.mark.parametrize(
    ("text", "steps"), [("all", [0, 5, 10, 20]), ("final", [20]), ("5,0", [0, 5]), ("0:20:10,5", [0, 5, 10, 20])]
)
def test_steps(text, steps):
    assert choose_steps(text, [0, 5, 10, 20], "x has no") == steps


def test_steps_that_are_not_there(copy):
    for text, message in (
        ("2,7", r"--steps 2,7: '7' lies past step 3"),
        ("0:3:1", r"run has no step0$"),
        ("x", r"--steps x: 'x' is neither"),
    ):
        with pytest.raises(UserError, match=message):
            find_run(copy, text, None)
    with pytest.raises(UserError, match="has no checkpoints stepN"):
        find_run(copy / "step1", "all", None)


def test_the_rows_of_a_run(run, copy):
    ours = run("--steps", "2", out="trained")
    found = find_run(ours, "all", None)
    assert (found.asked.steps, found.asked.batch_size, found.rows.seq_len) == (2, 4, 32)
    recorded = json.loads((ours / "metrics.jsonl").read_text().splitlines()[1])["batch_sha256"]
    assert digest(row_digests(found.rows.take(np.arange(4, 8)))) == recorded
    with pytest.raises(UserError, match=r"run has no run\.json: give its data as --data"):
        _ = find_run(copy, "all", None).rows


# ---- the tables


def test_the_tables_are_right(copy, studied):
    columns = pq.read_table(studied / "items.parquet").to_pydict()
    lines = [line.split(",") for line in (studied / "summary.csv").read_text().splitlines()]
    assert [line[:2] for line in lines] == [["run", "step"], ["run", "1"], ["run", "2"], ["run", "3"]]
    assert columns["run"] == ["run"] * 33
    assert columns["step"] == [1] * 11 + [2] * 11 + [3] * 11
    assert columns["row"] == ITEMS["row"].tolist() * 3
    for k, step in enumerate((1, 2, 3)):
        model, tokens = load(copy / f"step{step}"), torch.from_numpy(ITEMS["token"].astype(np.int64))[:, None]
        with torch.no_grad():
            logits = model(tokens)[:, 0].gather(1, tokens)[:, 0]
        ours = columns["logit"][11 * k : 11 * (k + 1)]
        np.testing.assert_allclose(ours, logits, rtol=1e-5, atol=1e-6)
        assert columns["positive"][11 * k : 11 * (k + 1)] == (logits > 0).tolist()
        assert float(lines[1 + k][2]) == pytest.approx(np.mean(ours))
    record = json.loads((studied / "manifest.json").read_text())
    assert list(record["weights_sha256"]) == ["run/step1", "run/step2", "run/step3"]
    assert set(record["files"]) == {"items.parquet", "summary.csv"}


@pytest.mark.parametrize("world", [2, 7])
def test_the_tables_do_not_depend_on_the_number_of_ranks(world, copy, studied, tmp_path):
    """7 ranks share 6 batches: one has nothing to do."""
    board, tensors, barrier = [None] * world, [None] * world, Barrier(world)
    done, failed = [[] for _ in range(world)], []

    def work(rank: int) -> None:
        dist = ThreadRanks(rank, world, board=board, meeting=barrier, tensors=tensors)
        try:
            study(copy, tmp_path / "many", dist, done[rank])
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    for name in ("items.parquet", "summary.csv"):
        assert (tmp_path / "many" / name).read_bytes() == (studied / name).read_bytes()
    assert sorted(row for rows in done for row in rows) == sorted(ITEMS["row"].tolist() * 3)  # nothing twice


def test_what_is_there_is_not_measured_again(copy, studied, tmp_path):
    study(copy, tmp_path / "out", flags=["--steps", "1,3"])
    drop_state(copy / "step1")  # as training does
    study(copy, tmp_path / "out", measured=(again := []))
    assert len(again) == 11  # step 2 joins
    assert (tmp_path / "out/items.parquet").read_bytes() == (studied / "items.parquet").read_bytes()


@pytest.mark.parametrize("change", ["weights", "settings", "items", "damage", "cut"])
def test_what_has_changed_is_measured_again(change, copy, studied, tmp_path):
    out = shutil.copytree(studied, tmp_path / "out")
    part, settings, flags = out / "parts/run-step2.parquet", {}, []
    if change == "weights":
        shutil.rmtree(copy / "step2")
        Trainee(seed=5).save(copy, 2, dtype=torch.float32)
    elif change == "settings":
        settings = {"k": 1}
    elif change == "items":
        flags = ["--limit", "5"]
    elif change == "damage":
        flip(part)
    else:
        part.write_bytes(part.read_bytes()[:-9])
    study(copy, out, measured=(again := []), settings=settings, flags=flags)
    assert len(again) == {"settings": 33, "items": 15}.get(change, 11)
    same = change != "weights" and change != "items"
    assert ((out / "items.parquet").read_bytes() == (studied / "items.parquet").read_bytes()) == same


def test_a_sample(copy, tmp_path):
    study(copy, tmp_path / "out", flags=["--steps", "final", "--every", "3", "--limit", "2"])
    assert pq.read_table(tmp_path / "out/items.parquet")["row"].to_pylist() == [0, 9]


def test_flags_that_do_not_fit(copy, tmp_path):
    for flags, message in (
        (["--every", "0"], "--every and --limit must be positive"),
        (["--steps", "9"], "past step 3"),
        (["--device", "abacus"], "--device abacus: "),
    ):
        with pytest.raises(UserError, match=message):
            study(copy, tmp_path / "out", flags=flags)
    with pytest.raises(UserError, match="two runs have the same name"):
        Study("toy", study_parser("toy", "").parse_args([str(copy), str(copy)]), {}, Dist())


def test_numbers_of_a_csv_have_all_their_digits(tmp_path):
    write_csv(tmp_path / "x.csv", [{"a": 0.1 + 0.2, "b": "x,y"}, {"a": np.float64(1), "b": ""}])
    assert (tmp_path / "x.csv").read_text() == 'a,b\n0.30000000000000004,"x,y"\n1.0,\n'
