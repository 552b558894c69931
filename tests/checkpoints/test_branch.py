"""--branch: a run that goes on from another run's checkpoint, in a directory of its own."""

import hashlib
import json
import re
import shutil

import pytest
import torch
from conftest import records
from megatron import write_data
from safetensors.torch import load_file

import train
from checkpoints.branch import read_parent
from data import batch, open_rows, requested_samples
from model.huggingface import load
from model.sizes import END_OF_TEXT
from runtime.errors import UserError


def content(checkpoint) -> dict:
    """Weights, moments and counters of a checkpoint."""
    names = ["model.safetensors", "state/part-00001-of-00001.safetensors", "state/counters.json"]
    return {name: (checkpoint / name).read_bytes() for name in names}


@pytest.fixture
def branch(tmp_path, run):
    """branch(*flags, out="branch", step=4) starts a branch of the run "run", with no setting but these flags."""

    def start(*flags, out: str = "branch", step: int = 4):
        line = ["--branch", tmp_path / f"run/step{step}", "--out", tmp_path / out, "--kernels", "torch", *flags]
        train.train(train.parse(list(map(str, line))))
        return tmp_path / out

    return start


@pytest.mark.parametrize("flags", [["--micro-batch", "2"], ["--precision", "fp16"]])
def test_a_branch_without_changes_ends_with_the_bits_of_its_parent(run, branch, flags, capsys):
    parent = run(*flags, "--keep-state", "9", "--lr", "0.01")
    capsys.readouterr()
    child = branch("--keep-state", "9")
    assert "a branch of" in (printed := capsys.readouterr().out)
    assert "other settings" not in printed
    assert content(child / "step9") == content(parent / "step9")
    assert content(child / "step4") == content(parent / "step4")
    assert records(child) == records(parent)[4:]
    origin = json.loads((child / "run.json").read_text())["parent"]
    manifest = (parent / "step4/manifest.json").read_bytes()
    assert origin["step"] == 4
    assert origin["manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert origin["settings"]["lr"] == 0.01


def test_what_differs_from_the_parent_is_said(run, branch, capsys):
    parent = run("--keep-state", "9")
    capsys.readouterr()
    child = branch("--lr", "0.5", "--schedule", "cosine")
    assert "with other settings: --lr (0.001 there, 0.5 here), --schedule (published there, cosine here)" in (
        capsys.readouterr().out
    )
    ours, theirs = (load_file(path / "step9/model.safetensors") for path in (child, parent))
    assert any((ours[name] != theirs[name]).any() for name in ours)
    assert records(child)[0]["loss"] == records(parent)[4]["loss"]  # the same weights met the same rows


def test_the_document_mask_is_recorded_and_a_branch_may_leave_it_out(run, branch, corpus, capsys):
    flags = "--gelu", "none", "--seq-len", "512", "--steps", "4"
    parent = run("--document-mask", *flags, "--keep-state", "9")
    model, tokens = load(parent / "step0"), batch(open_rows(corpus, requested_samples(4, 4), 512), 0, 4)[0]
    assert (tokens[:, :-1] == END_OF_TEXT).any(axis=1).sum() > 1
    model.document_mask, tokens = True, torch.from_numpy(tokens.astype(int))
    expected = model(tokens[:, :-1], tokens[:, 1:], "none").mean(dim=1).tolist()
    assert records(parent)[0]["row_losses"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match=r"other settings: --document-mask \(True there, False here\)"):
        run(*flags)
    capsys.readouterr()
    child = branch("--no-document-mask", step=2)
    assert "with other settings: --document-mask (True there, False here)\n" in capsys.readouterr().out
    assert records(child)[0]["row_losses"] != records(parent)[2]["row_losses"]
    assert json.loads((child / "run.json").read_text())["settings"]["document_mask"] is False


def test_a_nudge_moves_so_many_weights_by_one_rounding_step(run, branch):
    """It is part of the branch: a resumed branch has it once, and a branch of the branch does not have it again."""
    parent = run("--keep-state", "9", "--lr", "0.01")
    same, whole = branch("--nudge", "0", out="same"), branch("--nudge", "3", out="whole")
    assert content(same / "step9") == content(parent / "step9")
    assert content(whole / "step9")["model.safetensors"] != content(parent / "step9")["model.safetensors"]
    child = branch("--nudge", "3", "--stop-at", "6")
    before, after = (load_file(path / "step4/model.safetensors") for path in (parent, child))
    moved = {name: after[name] != before[name] for name in before}
    assert sum(int(places.sum()) for places in moved.values()) == 3
    for name, places in moved.items():
        assert not places.any() or before[name].dim() == 2
        above = torch.nextafter(before[name], torch.tensor(torch.inf))
        assert torch.equal(after[name], torch.where(places, above, before[name]))
    assert json.loads((child / "run.json").read_text())["settings"]["nudge"] == 3
    branch()
    assert content(child / "step9") == content(whole / "step9")
    next_one = child.with_name("next")
    train.train(train.parse(["--branch", str(child / "step8"), "--out", str(next_one), "--kernels", "torch"]))
    assert content(next_one / "step9") == content(child / "step9")
    with pytest.raises(UserError, match="--nudge 99999: the blocks have 24576 weights"):
        branch("--nudge", "99999", out="new")
    with pytest.raises(UserError, match=r"--nudge 3 must be .* needs --branch"):
        run("--nudge", "3", out="new")


def test_a_branch_resumes_without_its_parent(run, branch, tmp_path):
    parent = run("--keep-state", "9")
    whole = branch("--lr", "0.5", out="whole")
    child = branch("--lr", "0.5", "--stop-at", "6")
    shutil.rmtree(parent)
    branch()  # the settings are those that the branch has recorded
    assert content(child / "step9") == content(whole / "step9")
    assert records(child) == records(whole)
    with pytest.raises(UserError, match=r"is a run with other settings: --lr \(0.5 there, 0.1 here\)"):
        branch("--lr", "0.1")
    (child / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        branch()


def test_a_branch_is_recovered_with_its_parent(run, branch):
    run("--keep-state", "9")
    child = branch("--stop-at", "6")
    before = json.loads((child / "run.json").read_text())
    (child / "run.json").unlink()
    branch()
    after = json.loads((child / "run.json").read_text())
    assert after["parent"] == before["parent"]
    assert [record["step"] for record in records(child)] == [4, 5, 6, 7, 8]


def test_a_branch_that_was_killed_before_its_first_step(run, branch):
    run("--keep-state", "9")
    child = branch("--stop-at", "5")
    (child / "metrics.jsonl").write_text("")
    shutil.rmtree(child / "step5")
    branch()
    assert [record["step"] for record in records(child)] == [4, 5, 6, 7, 8]


def test_what_a_branch_cannot_change(run, branch, tmp_path):
    parent = run("--keep-state", "9")
    for flags, message in (
        (["--seed", "7"], r"--seed 7: \S+/run/step4 has 1234, which a branch keeps; leave out --seed"),
        (["--batch-size", "8"], r"--batch-size 8: .* has 4"),
        (["--seq-len", "16"], r"--seq-len 16: .* has 32"),
        (["--size", "70m"], r"--size 70m: .* has 14m"),
        (["--precision", "fp16"], r"--precision fp16 needs a loss scale"),
        (["--init-from", parent / "step2"], r"--branch and --init-from both say"),
    ):
        with pytest.raises(UserError, match=message):
            branch(*flags)
        assert not (tmp_path / "branch/run.json").exists()
    write_data(tmp_path / "other", [[1, 2, 3] * 3000])
    with pytest.raises(UserError, match=r"--data \S+other is not the data of \S+: the order of the data"):
        branch("--data", tmp_path / "other")


def test_what_is_no_parent(run, branch, tmp_path):
    parent = run("--keep-state", "2")
    with pytest.raises(UserError, match=r"step4 lacks state: a run cannot resume from it"):
        branch()
    with pytest.raises(UserError, match=r"step3/manifest.json is missing"):
        branch(step=3)
    with pytest.raises(UserError, match="--branch needs --out"):
        train.parse(["--branch", str(parent / "step9")])
    with pytest.raises(UserError, match=re.escape(f"{parent} is a run with other settings: --branch")):
        branch(out="run", step=8)
    part = parent / "step8/state/part-00001-of-00001.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match="part-00001"):
        branch(step=8)


def test_settings_of_a_manifest_are_checked(run, branch, monkeypatch):
    parent = run("--keep-state", "9")
    good = read_parent(parent / "step4")
    for name, value in (("lr", "fast"), ("size", "15m"), ("steps", True)):
        bad = type(good)(good.directory, good.step, good.settings | {name: value}, good.data)
        monkeypatch.setattr("checkpoints.branch.read_parent", lambda directory, bad=bad: bad)
        with pytest.raises(UserError, match=f"its manifest has {name} "):
            branch()
