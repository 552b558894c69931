"""train.py --probes: the losses of given texts before each update; the training does not notice."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import records
from small_runs import assert_same_bits, launcher, trained

from model.huggingface import load
from runtime.errors import UserError

TEXTS = [list(range(5, 5 + n)) for n in (33, 2, 9)]


@pytest.fixture
def probes(tmp_path) -> Path:
    path = tmp_path / "probes.jsonl"
    path.write_text("".join(json.dumps({"tokens": text}) + "\n" for text in TEXTS))
    return path


def probe_losses(run_directory: Path) -> np.ndarray:
    """probe_loss.bin: float32 [records, tokens]."""
    return np.fromfile(run_directory / "probe_loss.bin", "<f4").reshape(-1, 32 + 1 + 8)


def checkpoint_losses(checkpoint: Path) -> np.ndarray:
    """The loss of every token of TEXTS but the first ones, of one text at a time."""
    model = load(checkpoint)
    for part in (model, *model.blocks):
        part.config = replace(part.config, gelu="tanh")
    with torch.no_grad():
        losses = [model(x[:, :-1], x[:, 1:], "none")[0] for x in (torch.tensor([text]) for text in TEXTS)]
    return torch.cat(losses).numpy()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_probes_do_not_change_the_training(precision, run, probes):
    flags = ["--precision", precision, "--micro-batch", "1", "--save-every", "1", "--lr", "0.01"]
    plain, probed = run(*flags, out="plain"), run(*flags, "--probes", probes, "--recompute", "full", out="probed")
    lines = records(probed)
    means = [line.pop("probe_loss") for line in lines]
    assert lines == records(plain)
    names = ["model.safetensors", "state/part-00001-of-00001.safetensors", "state/counters.json", "manifest.json"]
    for name in names:
        assert (probed / "step9" / name).read_bytes() == (plain / "step9" / name).read_bytes()
    losses = probe_losses(probed)
    assert losses.shape == (9, 41)
    np.testing.assert_allclose(losses.mean(1, dtype=np.float64), means, rtol=1e-12)
    if precision == "fp32":  # the checkpoints of the others are rounded
        expected = np.stack([checkpoint_losses(probed / f"step{step}") for step in range(9)])
        np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert abs(np.diff(losses[1:], axis=0)).max(1).min() > 1e-3


def test_probes_go_on_after_a_stop(run, probes, tmp_path, capsys):
    flags = ["--probes", probes, "--probe-every", "2"]
    whole = run(*flags, out="whole")
    run(*flags, "--stop-at", "4")
    with (tmp_path / "run/probe_loss.bin").open("ab") as file:
        file.write(b"\1" * 99)  # of later steps, before the run was killed
    cut = run(*flags, "--stop-at", "7")
    before = (cut / "probe_loss.bin").read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"tokens": [5, 6]}\n')
    for bad in (["--probes", other], ["--probes", probes], []):
        with pytest.raises(UserError, match=r"--probes: \S+ records .* sha256 \w{12}… and --probe-every 2: give both"):
            run(*bad)
    for damaged in (before[:-1], before[:3] + b"\x50" + before[4:]):
        (cut / "probe_loss.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"probe_loss\.bin: (it has|the probes of step 0 have) .*; move the file"):
            run(*flags)
        assert (cut / "probe_loss.bin").read_bytes() == damaged
    (cut / "probe_loss.bin").write_bytes(before)
    assert records(run(*flags)) == records(whole)
    assert (cut / "probe_loss.bin").read_bytes() == (whole / "probe_loss.bin").read_bytes()
    assert len(probe_losses(cut)) == 5


def test_a_run_may_begin_to_record_probes(run, probes):
    run("--stop-at", "4")
    late = run("--probes", probes, "--probe-every", "3")
    losses = probe_losses(late)
    assert np.isnan(losses).all(1).tolist() == [True, True, False]  # steps 0, 3, 6
    assert json.loads((late / "run.json").read_text())["probes"]["lengths"] == [33, 2, 9]


@pytest.mark.parametrize("text", [{"tokens": [1] * 34}, {"tokens": [1, 384]}])
def test_probes_that_the_model_cannot_read(text, run, probes):
    with probes.open("a") as file:
        file.write(json.dumps(text))
    with pytest.raises(UserError, match=r"--probes \S+: text 3 has \d+ tokens, the largest id is"):
        run("--probes", probes)


@pytest.mark.slow
def test_probes_on_two_ranks_that_share_the_weights(corpus, probes, tmp_path):
    launch, flags = launcher(corpus, tmp_path), ("--bitwise", "--micro-batch", 3, "--save-every", 1)
    plain = trained(launch(0, *flags, out="plain"))
    probed = trained(launch(2, *flags, "--shard", "full", "--probes", probes, out="probed"))
    assert_same_bits(plain / "step8", probed / "step8")
    expected = np.stack([checkpoint_losses(probed / f"step{step}") for step in range(8)])
    np.testing.assert_allclose(probe_losses(probed), expected, rtol=1e-6)


@pytest.mark.slow
def test_probes_of_a_compiled_run(run, probes):
    plain = records(run("--compile", out="plain"))
    probed = records(run("--compile", "--probes", probes, out="probed"))
    assert [{k: v for k, v in line.items() if k != "probe_loss"} for line in probed] == plain
