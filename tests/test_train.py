"""The trainer against transformers in an ordinary loop, and against itself stopped and resumed."""

import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
import transformers
from conftest import records, row_losses
from safetensors.torch import load_file

import data
import settings
import train
from checkpoint import verify
from checkpoints import manifest
from checkpoints.save import Saver
from corpus.order import Order
from model import SIZES, SUITE, Pythia
from model.huggingface import load, save
from parallel import gradients
from plan.memory import total_memory
from runtime.errors import UserError
from runtime.metrics import Metrics
from step import LossScaler, learning_rate

ROOT = Path(__file__).parents[1]


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, arguments)], capture_output=True, text=True, **options
    )


# Whole runs


def test_run_equals_transformers_in_an_ordinary_loop(run, corpus, tiny):
    """Losses, norms and final weights of the same rows, weights and rules, without our model, kernels or loop."""
    directory = run("--micro-batch", "2")
    ours = records(directory)
    gelu = {"hidden_act": "gelu_pytorch_tanh"}  # as trained; config.json says "gelu", as the published files do
    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(directory / "step0", **gelu)
    order = Order(corpus, math.ceil(9 * 4 * 1.005), 32, 1234)
    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step in range(9):
        rows = np.stack([order[i] for i in range(4 * step, 4 * step + 4)])
        tokens = torch.from_numpy(rows.astype(np.int64))
        logits = theirs(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        rate = max(5e-4 * (1 + math.cos(math.pi * (min(step, 8.91) - 0.09) / 9)), 1e-4) if step else 0.0
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert ours[step]["loss"] == pytest.approx(loss.item(), abs=2e-5)
        assert ours[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert ours[step]["lr"] == pytest.approx(rate, rel=1e-9)
        digests = b"".join(hashlib.sha256(row.tobytes()).digest() for row in rows)
        assert ours[step]["batch_sha256"] == hashlib.sha256(digests).hexdigest()
        assert (ours[step]["step"], ours[step]["tokens"]) == (step, (step + 1) * 4 * 32)
    final = load_file(directory / "step9" / "model.safetensors")
    for name, p in theirs.state_dict().items():
        torch.testing.assert_close(final[name.replace("lm_head", "embed_out")], p, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "precision", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("fp32", "bf16")), "fp16"]
)
def test_resume_is_exact_at_every_checkpoint(run, precision):
    """A run stopped after any of 1 .. 8 steps and resumed has the records and final bytes of the run never stopped."""
    flags = ("--precision", precision)
    whole = run(*flags, out="whole")
    expected = (
        (whole / "step9" / "model.safetensors").read_bytes(),
        (whole / "step9" / "state" / "part-00001-of-00001.safetensors").read_bytes(),
    )
    for k in range(1, 9):
        run(*flags, "--stop-at", k, out=f"cut{k}")
        cut = run(*flags, out=f"cut{k}")
        assert records(cut) == records(whole)
        assert (cut / "step9" / "model.safetensors").read_bytes() == expected[0]
        assert (cut / "step9" / "state" / "part-00001-of-00001.safetensors").read_bytes() == expected[1]
        starts = json.loads((cut / "run.json").read_text())["starts"]
        assert [start["step"] for start in starts] == [0, k]


def test_resume_from_step_zero_and_after_a_crash(run, capsys):
    """A run that was killed between checkpoints resumes from the newest and writes the later records again."""
    whole = run(out="whole")
    crashed = run("--stop-at", "7", out="crashed")
    for name in ("step7", "step4", "step2", "step1"):  # as if killed right after step 0 was saved
        shutil.rmtree(crashed / name)
    state = shutil.copytree(whole / "step0", crashed / "step0", dirs_exist_ok=True)
    assert state.exists()
    run("--stop-at", "3", "--keep-state", "9", out="again")
    shutil.rmtree(crashed / "step0")
    shutil.copytree(crashed.parent / "again" / "step0", crashed / "step0")
    (crashed / "metrics.jsonl").open("a").write('{"step": 7, "lo')  # cut off in the middle of a line
    assert records(run(out="crashed")) == records(whole)


def test_saved_steps_and_model_files(run):
    directory = run()
    assert manifest.saved_steps(directory) == [0, 1, 2, 4, 8, 9]
    assert manifest.steps_with_state(directory) == [8, 9]
    zero, one = (load_file(directory / f"step{n}" / "model.safetensors") for n in (0, 1))
    assert all(torch.equal(zero[name], one[name]) for name in zero)  # the first update has learning rate 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "step9")
    assert tokenizer.decode(tokenizer("def é")["input_ids"]) == "def é"


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        (("--save-every", "3"), [0, 1, 2, 3, 4, 6, 8, 9]),
        (("--save-every", "7", "--save-steps", "0,3:6:2"), [0, 1, 2, 3, 4, 5, 7, 8, 9]),
    ],
)
def test_more_checkpoints(flags, steps, run):
    """Beside the published ones. They change nothing else, and may change on resume."""
    directory = run(*flags)
    assert manifest.saved_steps(directory) == steps
    assert manifest.steps_with_state(directory) == [8, 9]
    assert records(directory) == records(run(out="plain"))
    run("--stop-at", "2", out="later")
    assert manifest.saved_steps(run(*flags, out="later")) == steps


def test_row_losses_are_those_of_the_checkpoint_before_the_step(run, corpus):
    """Row j of step t has the mean loss that checkpoint t gives this row; the mean over j is the loss of the step."""
    directory = run("--save-every", "1", "--micro-batch", "2", "--lr", "0.01")
    rows = data.open_rows(str(corpus), data.requested_samples(9, 4), 32, 1234)
    losses = row_losses(directory)
    assert losses.shape == (9, 4)
    for step, record in enumerate(records(directory)):
        model = load(directory / f"step{step}")
        model.config = replace(model.config, gelu="tanh")
        for block in model.blocks:
            block.config = model.config
        tokens = torch.from_numpy(data.batch(rows, step, 4)[0].astype(np.int64))
        with torch.no_grad():
            expected = model(tokens[:, :-1], tokens[:, 1:], "none").double().mean(dim=1)
        np.testing.assert_allclose(losses[step], expected, rtol=1e-6)
        assert losses[step].astype(float).mean() == pytest.approx(record["loss"], rel=1e-6)
    assert (losses.max(axis=1) - losses.min(axis=1) > 1e-3).all()  # the order of the rows is tested


@pytest.mark.parametrize("damage", ["shorter", "another value", "shifted"])
def test_damaged_row_losses_are_kept(damage, run):
    directory = run("--stop-at", "4")
    path = directory / "row_loss.bin"
    before = row_losses(directory).copy()
    if damage == "another value":
        before[2, 1] += 0.01
    path.write_bytes({"shorter": before[:3], "shifted": np.roll(before, 1)}.get(damage, before).tobytes())
    damaged = path.read_bytes()
    reason = {"shorter": "it has 48 bytes, the checkpoint of step 4 needs 64"}.get(damage, r"the rows of step \d have")
    with pytest.raises(UserError, match=rf"^{path}: {reason}.*; move the file away to go on without"):
        run()
    assert path.read_bytes() == damaged


def test_row_losses_after_the_old_file_was_moved_away(run, capsys):
    directory = run("--stop-at", "4")
    (directory / "row_loss.bin").unlink()
    run("--stop-at", "6")
    assert "row_loss.bin is missing: the losses of the rows of steps 0 to 3 are not there" in capsys.readouterr().out
    resumed, whole = row_losses(run()), row_losses(run(out="whole"))
    assert np.isnan(resumed[:4]).all()
    assert np.array_equal(resumed[4:], whole[4:])


def test_row_losses_of_a_branch_begin_with_its_first_step(run, tmp_path):
    parent = run("--keep-state", "9")
    train.train(train.parse(["--branch", f"{parent}/step4", "--out", str(tmp_path / "new"), "--kernels", "torch"]))
    assert np.isnan(row_losses(tmp_path / "new")[:4]).all()
    assert np.array_equal(row_losses(tmp_path / "new")[4:], row_losses(parent)[4:])


def test_micro_batches_add_up_to_the_batch(run):
    whole, parts = records(run("--micro-batch", "4", out="a")), records(run("--micro-batch", "1", out="b"))
    for one, four in zip(whole, parts):
        assert one["loss"] == pytest.approx(four["loss"], abs=1e-5)
        assert one["batch_sha256"] == four["batch_sha256"]


@pytest.mark.parametrize("recompute", ["cheap", "full"])
def test_recompute_trains_the_same_bits_and_may_change_on_resume(run, recompute):
    expected = records(run(out="none"))
    run("--stop-at", "5", out="other")
    assert records(run("--recompute", recompute, out="other")) == expected


def test_training_on_the_triton_kernels_is_the_same_training(run, tiny, monkeypatch, triton_kernels):
    monkeypatch.setitem(SIZES, "14m", replace(tiny, hidden=64))  # head_dim 16: the smallest that tensor cores take
    flags = ("--stop-at", "3", "--batch-size", "1", "--recompute", "cheap")
    ours, definitions = (records(run("--kernels", kernels, *flags, out=kernels)) for kernels in ("triton", "torch"))
    assert len(ours) == 3
    for one, other in zip(ours, definitions):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ["14m", "70m"])
def test_two_hundred_steps_on_both_kernels(size, tmp_path):
    """Losses differ by no more than they do if the same rows are added up in another order."""

    def losses(kernels: str, micro_batch: int) -> np.ndarray:
        out = tmp_path / f"{kernels}-{micro_batch}"
        line = ["--size", size, "--demo", "--steps", 200, "--batch-size", 32, "--micro-batch", micro_batch]
        line += ["--precision", "bf16", "--kernels", kernels, "--out", out]  # float16 would skip different updates
        train.train(train.parse([str(part) for part in line]))
        return np.array([record["loss"] for record in records(out)])

    ours, definitions, noise = losses("triton", 16), losses("torch", 16), losses("torch", 8)
    assert definitions[-20:].mean() < definitions[0] - 4  # the model has learned
    for part in (slice(0, 50), slice(50, 200)):  # rounding errors grow with the steps
        allowed = 2 * np.abs(noise - definitions)[part].mean() + 1e-4
        assert np.abs(ours - definitions)[part].mean() <= allowed
        assert abs((ours - definitions)[part].mean()) <= allowed


def test_triton_kernels_are_refused_where_they_cannot_run():
    if torch.cuda.is_available():
        pytest.skip("here they can run")
    with pytest.raises(UserError, match=r"--kernels triton: the Triton kernels need .* a CUDA device"):
        train.parse(["--size", "14m", "--demo", "--kernels", "triton"])
    assert train.parse(["--size", "14m", "--kernels", "triton", "--plan"]).plan  # a plan may be for another machine


@pytest.mark.parametrize("fast", [True, False])
def test_default_precision_on_a_cpu(fast, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(settings, "supports_bf16_matmul", lambda: fast)
    assert train.parse(["--size", "14m", "--data", "x"]).precision == "fp32"
    assert train.parse(["--size", "14m", "--demo"]).precision == ("bf16" if fast else "fp32")
    assert train.parse(["--size", "14m", "--demo", "--precision", "fp16"]).precision == "fp16"


@pytest.mark.parametrize("size", SUITE)
def test_default_precision_on_gpus_is_the_published_one(size, monkeypatch):
    published = "bf16" if size == "1b" else "fp16"
    assert train.parse(["--size", size, "--plan"]).precision == published
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train.parse(["--size", size, "--data", "x"]).precision == published
    assert train.parse(["--size", size, "--demo"]).precision == published
    assert train.parse(["--size", size, "--demo", "--precision", "bf16"]).precision == "bf16"


def test_the_first_line_names_the_precision(run, tiny, monkeypatch, capsys):
    run("--precision", "fp16")
    assert re.search(r"\d parameters on 1 x \w+, fp16; step 0 to 9 of 9", capsys.readouterr().out)
    run("--precision", "fp32", out="other")
    assert re.search(r"\d parameters on 1 x \w+, fp32 \(published: fp16\); step 0 to 9 of 9", capsys.readouterr().out)


class GPUs(train.Dist):
    """Ranks that each have an H100, as far as the choice of a setting asks."""

    def all_reduce_max(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def all_gather_str(self, text: str) -> list[str]:
        return [text] * self.world_size


@pytest.fixture
def gpus(monkeypatch):
    """gpus(8) -> a Dist of that many H100s. Everything before the first tensor on a GPU works with it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=85_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def ranks(world_size: int) -> GPUs:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        return GPUs(0, world_size, torch.device("cuda", 0), min(world_size, 8))

    return ranks


@pytest.mark.parametrize("size", ["14m", "1.4b", "6.9b", "12b"])
@pytest.mark.parametrize("flags", [(), ("--bitwise",), ("--recompute", "cheap"), ("--precision", "bf16")])
def test_a_plain_command_takes_what_the_plan_suggests(size, flags, gpus, capsys, tmp_path):
    line = ["--size", size, "--data", "x", "--out", str(tmp_path / "run"), *flags]
    suggested = train.plan_text(train.parse([*line, "--plan"])).split("train.py ")[1].split("\n")[0]
    ranks = gpus(8)
    plain = train.fit_gpus(train.parse(line), ranks)
    given = train.fit_gpus(train.parse([*shlex.split(suggested), "--out", str(tmp_path / "run"), *flags]), ranks)
    assert plain == given
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert said.startswith(f"this run takes --shard {plain.shard} --recompute {plain.recompute} --micro-batch")
    shard, whole_gradients = train.choose_sharding(plain, SIZES[size], ranks)
    assert shard == plain.shard
    assert total_memory(replace(train.make_job(plain, 8, 8), whole_gradients=whole_gradients)) < 0.92 * 80e9


def test_settings_that_do_not_fit_gpus(gpus, capsys, tmp_path):
    line = ["--size", "12b", "--data", "x", "--out", str(tmp_path / "run")]
    ranks = gpus(1)
    with pytest.raises(UserError, match=r"12b does not fit: .* use more GPUs .* or give these three flags"):
        train.fit_gpus(train.parse(line), ranks)
    flags = ["--shard", "none", "--recompute", "full", "--micro-batch", "1"]
    s = train.parse([*line, *flags])
    assert train.fit_gpus(s, ranks) == s  # the way around: everything is given
    assert re.match(
        r"warning: .*--micro-batch 1 needs 2\d\d\.\d GB a rank .* may end without memory", capsys.readouterr().out
    )


def test_a_resumed_run_on_gpus_keeps_its_micro_batch(gpus, tmp_path):
    (tmp_path / "run").mkdir()
    record = tmp_path / "run" / "run.json"

    def write(micro_batch: object) -> None:
        record.write_text(json.dumps({"settings": {"micro_batch": micro_batch}, "data": {}, "starts": []}))

    line = ["--size", "1.4b", "--data", "x", "--out", str(tmp_path / "run")]
    plain = train.fit_gpus(train.parse(line), gpus(8)).micro_batch
    for recorded, expected in ((2, 2), (plain // 2, plain // 2), ("8", plain), (-1, plain), (None, plain)):
        write(recorded)
        assert train.fit_gpus(train.parse(line), gpus(8)).micro_batch == expected
    for damaged in ("", "[]", "{", '{"settings": 3}'):  # check_same_run refuses it later
        record.write_text(damaged)
        assert train.fit_gpus(train.parse(line), gpus(8)).micro_batch == plain

    write(32)
    assert train.fit_gpus(train.parse(line), gpus(64)).micro_batch == 8  # 32 does not divide its rows
    with pytest.raises(UserError, match=r"--micro-batch 32 does not divide the 16 rows of a rank"):
        train.fit_gpus(train.parse([*line, "--bitwise"]), gpus(64))
    write(4)
    assert {train.fit_gpus(train.parse([*line, "--bitwise"]), gpus(n)).micro_batch for n in (2, 4, 8, 16)} == {4}


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a run on a CPU")
def test_weights_of_a_bf16_run_on_a_cpu_are_saved_in_float32(run):
    weights = load_file(run("--precision", "bf16") / "step9" / "model.safetensors")
    weight = weights["gpt_neox.layers.0.attention.dense.weight"]
    assert weight.dtype == torch.float32
    assert not torch.equal(weight, weight.bfloat16().float())


def test_float16_overflow_skips_update_and_schedule_not_the_data(run, monkeypatch):
    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (2.0**30, 1000, 2))
    directory = run("--precision", "fp16", "--steps", "40")
    rows = records(directory)
    overflowed = [r for r in rows if r["grad_norm"] is None]
    assert 2 <= len(overflowed) < 40
    assert [r["loss_scale"] for r in rows[:4]] == [2.0**30, 2.0**30, 2.0**29, 2.0**28]
    updates = 0
    settings = train.Settings(size="14m", steps=40, lr=1e-3)
    for r in rows:
        assert r["lr"] == learning_rate(updates, settings.steps, settings.lr, settings.schedule)
        updates += r["grad_norm"] is not None
    assert len({r["batch_sha256"] for r in rows}) == 40
    counters = json.loads((directory / "step40" / "state" / "counters.json").read_text())
    assert counters["updates"] == counters["adam_step"] == updates


def test_fifty_overflows_in_a_row_end_the_run(run, monkeypatch):
    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (2.0**120, 1000, 2))
    with pytest.raises(UserError, match=r"50 steps in a row.*--precision bf16"):
        run("--precision", "fp16", "--steps", "60")


def test_a_loss_that_is_not_finite_stops_before_the_update(run, tiny, tmp_path):
    model = Pythia(tiny)
    with torch.no_grad():
        model.blocks[1].mlp_out.weight.fill_(3e38)  # finite, or --init-from refuses it
    save(model, tmp_path / "broken", torch.float32)
    with pytest.raises(UserError) as error:
        run("--init-from", tmp_path / "broken", out="run")
    assert str(error.value) == (
        "step 0, rows 0 to 3: loss nan, gradient norm nan; stopped before the update: "
        f"the weights after 0 steps (checkpoint {tmp_path}/run/step0) are bad, or these rows are"
    )
    assert manifest.verify_checkpoint(tmp_path / "run" / "step0") == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_gradient_that_is_not_finite_stops_before_the_update(run, monkeypatch, tmp_path):
    real, calls = gradients.squared_norm, []

    def broken(parameters):
        calls.append(0)
        return real(parameters) * (math.inf if len(calls) == 6 else 1.0)

    monkeypatch.setattr(gradients, "squared_norm", broken)
    expected = (
        r"step 5, rows 20 to 23: loss [\d.]+, gradient norm inf; stopped before the update: its gradient is bad, or "
    )
    expected += r"these rows are; with \S+/run/step4 and with \S+/run/step2 the loss was finite$"
    with pytest.raises(UserError, match=expected):
        run()
    monkeypatch.setattr(gradients, "squared_norm", real)
    assert records(run()) == records(run(out="whole"))


@pytest.mark.parametrize(
    ("bad_step", "weights", "checked"), [(4, r"4 steps \(checkpoint \S+/run/step4\)", "step2"), (5, "5 steps", "step4")]
)
def test_weights_that_are_not_finite_are_not_called_good(bad_step, weights, checked, run, monkeypatch):
    """The forward pass of a step finds them, after the checkpoint with these weights was saved."""
    real, calls = Pythia.forward, iter(range(100))

    def broken(*arguments):
        loss, losses = real(*arguments)
        return loss * (math.nan if next(calls) == bad_step else 1.0), losses

    monkeypatch.setattr(Pythia, "forward", broken)
    with pytest.raises(
        UserError, match=rf"the weights after {weights} are bad, or .*; with \S+/run/{checked}.* was finite"
    ):
        run("--micro-batch", "4")


def test_init_from(run, tiny, tmp_path):
    start = Pythia(tiny, seed=77)
    save(start, tmp_path / "start", torch.float32)
    directory = run("--init-from", tmp_path / "start")
    zero = load(directory / "step0")
    assert all(torch.equal(a, b) for a, b in zip(zero.parameters(), start.parameters()))
    save(Pythia(replace(tiny, layers=3)), tmp_path / "deeper", torch.float32)
    with pytest.raises(UserError, match="is not a 14m: layers is 3"):
        run("--init-from", tmp_path / "deeper", out="other")
    assert not (tmp_path / "other" / "run.json").exists()


def test_a_resumed_run_does_not_need_the_directory_of_init_from(run, tiny, tmp_path):
    save(Pythia(tiny, seed=77), tmp_path / "start", torch.float32)
    whole = run("--init-from", tmp_path / "start", out="whole")
    run("--init-from", tmp_path / "start", "--stop-at", "3")
    shutil.rmtree(tmp_path / "start")
    assert records(run("--init-from", tmp_path / "start")) == records(whole)
    with pytest.raises(UserError, match="start"):
        run("--init-from", tmp_path / "start", out="new")


@pytest.mark.slow
def test_compiled_run_is_close(run):
    expected, compiled = records(run(out="a")), records(run("--compile", out="b"))
    for one, other in zip(expected, compiled):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(run, monkeypatch, capsys, number):
    real, calls = gradients.squared_norm, []

    def squared_norm(parameters):
        calls.append(0)
        if len(calls) == 5:
            signal.raise_signal(number)
            signal.raise_signal(number)  # the terminal sends it, and torchrun sends it again
        return real(parameters)

    monkeypatch.setattr(gradients, "squared_norm", squared_norm)
    directory = run(out="cut")
    assert manifest.saved_steps(directory)[-1] == 5
    assert "paused at step 5 of 9; the same command continues the run" in capsys.readouterr().out
    monkeypatch.setattr(gradients, "squared_norm", real)
    assert records(run(out="cut")) == records(run(out="whole"))


@pytest.mark.parametrize(  # step 3 has no checkpoint yet
    ("step", "flags"), [(0, ()), (3, ("--bitwise",)), (3, ("--precision", "fp16")), (4, ())]
)
def test_a_signal_inside_a_long_step_drops_it(step, flags, run, monkeypatch, capsys):
    """No other micro-step runs, the last finished step is saved, and the run continues with the same bits."""
    whole = run("--micro-batch", 1, *flags, out="whole")
    real, calls = Pythia.forward, []

    def forward(*arguments):
        calls.append(0)
        if len(calls) == 4 * step + 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Pythia, "forward", forward)
        patch.setattr(train, "LONG_STEP", 0.0)
        directory = run("--micro-batch", 1, *flags, out="cut")
    assert len(calls) == 4 * step + 2
    assert f"paused at step {step} of 9; the same command continues the run" in capsys.readouterr().out
    assert manifest.saved_steps(directory)[-1] == step
    assert records(directory) == records(whole)[:step]
    run("--micro-batch", 1, *flags, out="cut")
    assert records(directory) == records(whole)
    for file in ("model.safetensors", "state/part-00001-of-00001.safetensors"):
        assert (directory / "step9" / file).read_bytes() == (whole / "step9" / file).read_bytes()


def test_a_short_step_is_finished(run, monkeypatch):
    """Nothing is asked between its micro-steps."""
    asked = []
    monkeypatch.setattr(train, "inside_long_step", lambda step, *_: lambda *_: asked.append(step) or True)
    run("--micro-batch", 1)
    assert asked == [0] * 3  # how long the first step takes is not known


def test_a_second_signal_stops_at_once():
    script = "import signal, time, train\nstop = train.StopSignal()\nsignal.raise_signal(2)\ntime.sleep(1.1)\n"
    script += "assert stop.requested\nsignal.raise_signal(2)\nprint('alive')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert "alive" not in done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("moment", "seconds"),
    [("imports", 0.2), ("set-up", 0), *(pytest.param("imports", n / 4, marks=pytest.mark.slow) for n in range(40))],
)
def test_interrupt_of_a_start(moment, seconds, tmp_path, corpus):
    """Ctrl-C at any moment, also during the imports, ends a run without a traceback."""
    line = [sys.executable, ROOT / "train.py", "--size", "14m", "--data", corpus, "--steps", 1000]
    line += ["--batch-size", 1, "--seq-len", 16, "--out", tmp_path / "run"]
    with subprocess.Popen([*map(str, line)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        libraries = Path(f"/proc/{job.pid}/maps")
        while not ("libtorch" in libraries.read_text() if moment == "imports" else (tmp_path / "run/.lock").exists()):
            assert job.poll() is None, job.stderr.read()
            time.sleep(0.005)
        time.sleep(seconds)
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=120)
    assert job.returncode in (-signal.SIGINT, 130, 0)
    assert "Traceback" not in errors
    assert "Error" not in errors


def test_interrupt_of_torchrun_from_a_terminal(tmp_path, corpus):
    """Ctrl-C reaches torchrun and the trainer; the trainer saves, and the same command resumes."""
    line = [Path(sys.executable).with_name("torchrun"), ROOT / "train.py", "--size", "14m", "--data", corpus]
    line += ["--steps", "1000", "--batch-size", "1", "--seq-len", "16", "--out", tmp_path / "run"]
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        until = time.monotonic() + 60
        while not (tmp_path / "run" / "step2" / "manifest.json").exists():
            assert job.poll() is None, job.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        os.killpg(job.pid, signal.SIGINT)
        out, _ = job.communicate(timeout=60)
    last = manifest.saved_steps(tmp_path / "run")[-1]
    assert f"paused at step {last} of 1000" in out
    assert len(records(tmp_path / "run")) == last
    assert manifest.verify_checkpoint(tmp_path / "run" / f"step{last}") == []


# Bad input: one line of error, nothing written


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--size", "3b"], "--size.*3b.*14m.*12b"),
        ([], "--size"),
        (["--size", "14m", "--stpes", "3"], "--stpes"),
        (["--size", "14m", "--steps", "many"], "--steps.*many"),
        (["--size", "14m", "--steps", "0"], "--steps must be positive"),
        (["--size", "14m", "--batch-size", "-4"], "--batch-size must be positive"),
        (["--size", "14m", "--batch-size", "6", "--micro-batch", "4"], "--micro-batch 4.*3 or 6"),
        (["--size", "14m", "--lr", "-1"], "--lr must be positive"),
        (["--size", "14m", "--lr", "0"], "--lr must be positive, not 0"),
        (["--size", "14m", "--lr", "nan"], "--lr must be positive"),
        (["--size", "14m", "--lr", "inf"], "--lr must be positive"),
        (["--size", "14m", "--dem"], "--dem"),
        (["--size", "14m", "--batch", "4"], "--batch"),
        (["--size", "pythia-3B"], "--size.*3b.*14m.*12b"),
        (["--size", "14m", "--micro-batch", "-1"], "--micro-batch -1"),
        (["--size", "14m", "--save-every", "-1"], "--save-every must be a number of steps"),
        (["--size", "14m", "--profile", "-1"], "--profile must be a number of steps"),
        (["--size", "14m", "--save-steps", "1,x"], "--save-steps: 'x' is neither a step nor FIRST:LAST:EVERY"),
        (["--size", "14m", "--steps", "99", "--save-steps", "5,100"], "--save-steps: '100' lies past step 99"),
        (["--size", "14m", "--stop-at", "143001"], "--stop-at 143001.*143000"),
        (["--size", "14m", "--precision", "fp8"], "--precision.*fp8"),
        (["--size", "14m", "--log", "tensorboard,mlflow"], "--log.*mlflow"),
    ],
)
def test_bad_settings(flags, message):
    with pytest.raises(UserError, match=message):
        train.parse(flags)


def test_bad_settings_are_one_line(tmp_path):
    done = command("--size", "3b", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: argument --size: invalid choice: '3b'")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_data_must_be_named():
    """A forgotten --data must not start 143,000 steps on the demo corpus."""
    with pytest.raises(UserError, match=r"--size 31m --demo` .* `python train.py --size 31m --data PREFIX`") as error:
        train.parse(["--size", "31m"])
    assert "\n" not in str(error.value)
    assert (
        train.parse(["--size", "31m", "--demo"]).data == train.parse(["--size", "31m", "--data", "demo"]).data == "demo"
    )


@pytest.mark.parametrize("name", ["1.4b", "1.4B", "pythia-1.4b", "Pythia-1.4B", "EleutherAI/pythia-1.4b"])
def test_names_of_a_size(name):
    s = train.parse(["--size", name, "--demo"])
    assert (s.size, s.out) == ("1.4b", "runs/pythia-1.4b")


def test_demo_sets_defaults_only():
    s = train.parse(["--size", "70m", "--demo"])
    assert (s.data, s.steps, s.batch_size, s.seq_len, s.out) == ("demo", 60, 16, 256, "runs/pythia-70m")
    s = train.parse(["--steps", "7", "--size", "70m", "--demo", "--lr", "1e-4", "--data", "other"])
    assert (s.data, s.steps, s.batch_size, s.lr) == ("other", 7, 16, 1e-4)


def test_a_token_outside_the_vocabulary(run, tiny, monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "14m", replace(tiny, vocab=100))
    with pytest.raises(
        UserError, match=r"step 0, row \d+, position \d+: token id \d+ is outside the vocabulary of 100"
    ):
        run()
    assert not (tmp_path / "run" / "run.json").exists()


def test_data_that_is_missing_or_too_short(run, tmp_path):
    with pytest.raises(UserError, match=r"nothing"):
        run("--data", tmp_path / "nothing")
    with pytest.raises(UserError, match=r"row"):
        run("--seq-len", 10_000_000)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_of_something_else(run, corpus, tmp_path):
    directory = run("--stop-at", "2")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"--seed \(1234 there, 5 here\), --lr \(0.001 there, 0.1 here\)"):
        run("--seed", "5", "--lr", "0.1")
    other = tmp_path / "other"
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{corpus}{suffix}", f"{other}{suffix}")
    run("--data", other, "--stop-at", "2")  # the same data in another place is the same run
    from corpus.prepare import prepare

    (tmp_path / "more.txt").write_text("some other text " * 500)
    prepare([tmp_path / "more.txt"], tmp_path / "more")
    with pytest.raises(UserError, match="the order of the data"):
        run("--data", tmp_path / "more")
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="not a run directory"):
        run(out="home")
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("damage", ["{", "", None])
def test_a_lost_run_json_is_made_anew_from_a_checkpoint(damage, run, tmp_path, capsys):
    """It has the settings and data of the run again, so that it refuses others. Without checkpoints nothing helps."""
    directory = run("--stop-at", "3")
    path, before = directory / "run.json", json.loads((directory / "run.json").read_text())
    path.unlink() if damage is None else path.write_text(damage)
    with pytest.raises(UserError, match=r"--seed \(1234 there, 5 here\)"):
        run("--seed", "5")
    after = json.loads(path.read_text())
    assert after["settings"].items() <= before["settings"].items()
    assert after["settings"].keys() == settings.FIXED | {"data", "edits", "micro_batch"}
    assert (after["data"] | {"modified_ns": before["data"]["modified_ns"]}, after["starts"]) == (before["data"], [])
    assert records(run()) == records(run(out="whole"))
    assert (damage is None) == (not (directory / "run.json.damaged").exists())
    assert "is written again from the newest checkpoint" in capsys.readouterr().out

    for step in directory.glob("step*"):
        shutil.rmtree(step)
    path.unlink() if damage is None else path.write_text(damage)
    files = {p: p.read_bytes() for p in directory.iterdir()}
    with pytest.raises(UserError, match="not a run directory" if damage is None else r"run\.json is damaged"):
        run()
    assert {p: p.read_bytes() for p in directory.iterdir()} == files


def swapped_tokens(monkeypatch, from_step: int) -> None:
    """From this step on, the data has other tokens of the same number: no length and no order shows it."""
    real = data.batch

    def batch(rows, step, *arguments):
        tokens = real(rows, step, *arguments)
        return tokens[..., ::-1].copy() if step >= from_step else tokens

    monkeypatch.setattr(data, "batch", batch)


@pytest.mark.parametrize("changed", [2, 3, 5])
def test_other_tokens_are_noticed_at_a_resume(changed, run, monkeypatch):
    """A run of six steps falls back to step 3. Steps 2 and 3 are compared before anything is written, 5 later."""
    directory = run("--stop-at", "6", "--keep-state", "9")
    run("--stop-at", "3", out="other")  # for its step3
    for step in (4, 6):
        shutil.rmtree(directory / f"step{step}")
    shutil.copytree(directory.parent / "other" / "step3", directory / "step3")
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    swapped_tokens(monkeypatch, changed)
    with pytest.raises(UserError) as error:
        run()
    assert re.fullmatch(
        rf"step {changed}: the data is not that of the run: {directory}/metrics.jsonl has batch_sha256 "
        r"[0-9a-f]{12}…, the batch is now [0-9a-f]{12}…; put the data back as it was, or choose another --out",
        str(error.value),
    )
    if changed < 5:
        assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before
    else:
        assert manifest.saved_steps(directory)[-1] < 6
        assert [record["step"] for record in records(directory)] == [0, 1, 2, 3, 4]
    monkeypatch.undo()


# Disks that fail, directories that move


def at_step(monkeypatch, step: int, event) -> None:
    """Call event() in the forward pass of a step of one micro-batch."""
    real, calls = Pythia.forward, iter(range(100))

    def forward(*arguments):
        if next(calls) == step:
            event()
        return real(*arguments)

    monkeypatch.setattr(Pythia, "forward", forward)


@pytest.mark.parametrize(("step", "newest"), [(5, 4), (7, 4)])
def test_metrics_on_a_full_disk(step, newest, run, monkeypatch, tmp_path):
    """The run ends in the next step, or when it would save: no checkpoint covers a record that is not there.

    The checkpoint that is written at this time needs only earlier records: it is completed.
    """
    opened, real = [], Metrics.__init__
    failed, record, complete = Event(), Metrics.record, Saver._complete

    def remember(self, *arguments):
        real(self, *arguments)
        opened.append(self)

    def fill() -> None:
        old, opened[0].file = opened[0].file, Path("/dev/full").open("ab")  # noqa: SIM115 (closed by Metrics)
        opened[0].file.fileno = old.fileno  # what was written before can still be flushed

    def record_and_tell(*arguments, **values):
        try:
            record(*arguments, **values)
        except UserError:
            failed.set()
            raise

    def complete_late(saver, final, *arguments):
        if final.name == "step4" and step == 5:
            assert failed.wait(60)
        return complete(saver, final, *arguments)

    monkeypatch.setattr(Metrics, "__init__", remember)
    monkeypatch.setattr(Metrics, "record", record_and_tell)
    monkeypatch.setattr(Saver, "_complete", complete_late)
    at_step(monkeypatch, step, fill)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written \(No space left on device\): make it"):
        run("--micro-batch", "4")
    assert manifest.saved_steps(tmp_path / "run")[-1] == newest
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(step))
    assert [record["step"] for record in records(run("--micro-batch", "4"))] == list(range(9))


def test_a_run_directory_that_is_replaced_while_it_is_used(run, monkeypatch, tmp_path):
    directory, moved = tmp_path / "run", tmp_path / "moved"

    def replace_directory() -> None:
        while not (directory / "step4").exists():  # a thread writes it
            time.sleep(0.01)
        directory.rename(moved)
        directory.mkdir()
        (directory / "thesis.tex").write_text("precious")

    at_step(monkeypatch, 5, replace_directory)
    with pytest.raises(
        UserError, match=rf"{directory} was moved or replaced while the run used it; nothing was written"
    ):
        run("--micro-batch", "4")
    assert [path.name for path in directory.iterdir()] == ["thesis.tex"]
    assert manifest.saved_steps(moved)[-1] == 4


def test_standard_output_on_a_full_disk(tmp_path, corpus):
    line = [
        "--size",
        "14m",
        "--data",
        corpus,
        "--steps",
        1,
        "--batch-size",
        1,
        "--seq-len",
        16,
        "--out",
        tmp_path / "run",
    ]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "train.py", *map(str, line)], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr


def test_finished_and_paused_runs_say_so(run, capsys):
    run("--stop-at", "3")
    assert "paused at step 3 of 9; the same command without --stop-at continues the run" in capsys.readouterr().out
    run("--stop-at", "2")
    assert "is paused at step 3 of 9" in capsys.readouterr().out
    run()
    assert "finished" in capsys.readouterr().out
    before = (run() / "run.json").read_bytes()
    assert "is finished" in capsys.readouterr().out
    assert (run() / "run.json").read_bytes() == before


def test_a_damaged_checkpoint_is_skipped(run, capsys):
    directory = run("--stop-at", "4")
    file = directory / "step4" / "state" / "part-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert records(run()) == records(run(out="whole"))
    said = capsys.readouterr().out
    assert re.search(rf"{file} is damaged in tensor .*: going back to step 2", said)
    assert "step 2 to 9 of 9" in said
    assert verify(directory)


# Plans, records, loggers


@pytest.mark.parametrize("size", SIZES)
def test_plan_knows_every_size(size, monkeypatch):
    text = train.plan_text(train.parse(["--size", size, "--plan"]))
    assert f"{SIZES[size].parameters:,}" in text
    assert "299,892,736,000" in text
    assert text.count("\n") < 10
    verbose = train.plan_text(train.parse(["--size", size, "--plan", "--verbose"]))
    assert verbose.startswith(text)
    assert verbose.count("\n") > 40


def test_plan_of_other_settings():
    def plan(*flags: str) -> str:
        return train.plan_text(train.parse(["--size", "410m", "--plan", *flags]))

    assert re.search(r"learning rate +0\.0003 ", plan())
    assert re.search(r"learning rate +0\.003 ", plan("--demo"))  # that of the demo
    assert "train.py --size 410m --demo --shard" in plan("--demo")
    assert "train.py --size 410m --data 'my data' --shard" in plan("--data", "my data")
    assert "train.py --size 410m --demo --data x --shard" in plan("--data", "x", "--demo")
    assert "--micro-batch 2\n" in plan("--micro-batch", "2")
    assert "does not fit 8x4090" in plan("--recompute", "none", "--micro-batch", "128", "--plan-for", "8x4090")
    with pytest.raises(UserError, match=r"--micro-batch 256 does not divide the 128 rows of a rank .* 8 ranks"):
        plan("--micro-batch", "256")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_plan_of_the_largest_is_small(tmp_path):
    # VmHWM instead of ru_maxrss: a child process inherits the latter from its parent.
    script = "import sys; sys.path.insert(0, sys.argv.pop(1)); import train; train.main()\n"
    script += "print(next(line for line in open('/proc/self/status') if 'VmHWM' in line))"
    line = [sys.executable, "-c", script, ROOT, "--size", "12b", "--plan"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert "11,846,072,320" in done.stdout
    assert int(done.stdout.split()[-2]) < 1_000_000  # kilobytes
    assert list(tmp_path.iterdir()) == []


def test_every_flag_has_help():
    done = command("--help")
    assert done.returncode == 0
    for f in fields(train.Settings):
        assert "--" + f.name.replace("_", "-") in done.stdout
        assert len(f.metadata["help"]) > 10


def test_damaged_records_are_kept(run):
    directory = run("--stop-at", "3")
    (directory / "metrics.jsonl").write_text("not json\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1: it is not a JSON object"):
        run()
    assert (directory / "metrics.jsonl").read_text() == "not json\n"


def test_loggers(run, monkeypatch, tmp_path):
    logged = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, key, value, step):
            logged.append((key, value, step))

    wandb = type(sys)("wandb")
    wandb.init = lambda **options: logged.append(options["config"]["size"])
    wandb.log = lambda values, step: logged.append((step, values["loss"]))
    tensorboard = type(sys)("torch.utils.tensorboard")
    tensorboard.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    losses = [(r["step"], r["loss"]) for r in records(run("--log", "tensorboard,wandb"))]
    assert logged[0] == "14m"
    assert [entry for entry in logged if len(entry) == 2] == losses
    assert [(step, value) for key, value, step in (e for e in logged if len(e) == 3) if key == "loss"] == losses

    def full(self, key, value, step):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Writer.add_scalar = full
    with pytest.raises(UserError, match=r"tensorboard cannot be written \(No space left on device\)"):
        run("--log", "tensorboard", out="full")

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run("--log", "wandb", out="other")
    assert not (tmp_path / "other").exists()
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run("--log", "tensorboard", out="other")
    assert not (tmp_path / "other").exists()


def test_every_run_has_its_own_curves_at_wandb(run, monkeypatch, tmp_path):
    """Two runs of the same name in different places have two ids, a resumed run keeps its own."""
    ids, wandb = [], type(sys)("wandb")
    wandb.init = lambda **options: ids.append((options["name"], options["id"], options["resume"]))
    wandb.log = lambda values, step: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for out, stop in (("a/run", 2), ("a/run", 4), ("b/run", 2)):
        run("--log", "wandb", "--stop-at", stop, out=out)
    (first, resumed, other) = ids
    assert first == resumed
    assert first[0] == other[0] == "run"
    assert first[1] != other[1]
    assert re.fullmatch("[0-9a-f]{32}", other[1])
    (tmp_path / "b" / "run" / "wandb-id").write_text("not an id")
    with pytest.raises(UserError, match=r"b/run/wandb-id is damaged: delete it"):
        run("--log", "wandb", out="b/run")

    def no_key(**options):
        raise RuntimeError("api_key not configured")

    wandb.init = no_key
    with pytest.raises(UserError, match=r"--log wandb: api_key not configured; WANDB_MODE=offline"):
        run("--log", "wandb", out="c/run")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has mallopt")
def test_freed_memory_is_reused():
    """Of eight large tensors, allocated one after the other, some cause no page faults.

    Their number depends on the position of the heap: usually seven, three have been seen.
    """
    script = (
        "import resource, sys, torch, train\n"
        "if sys.argv[1] == 'reuse': train.reuse_freed_memory()\n"
        "for _ in range(8): torch.ones(30_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"
    )
    faults = {}
    for mode in ("reuse", "default"):
        line = [sys.executable, "-c", script, mode]
        faults[mode] = int(subprocess.run(line, cwd=ROOT, capture_output=True, text=True).stdout)
    assert faults["default"] - faults["reuse"] > 30_000_000 * 4 / 4096


def test_profile(run, capsys):
    """The trace has the requested steps, as chrome://tracing shows them. Without the flag there is no trace."""
    directory = run("--profile", "2", "--stop-at", "6")
    assert f"profile of 2 steps: {directory}/profile/step2-rank0.json" in capsys.readouterr().out
    events = json.loads((directory / "profile" / "step2-rank0.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    assert {name for name in names if name.startswith("ProfilerStep#")} == {"ProfilerStep#2", "ProfilerStep#3"}
    assert any("rotary_attention" in name or "short_attention" in name for name in names)
    assert records(run()) == records(run(out="whole"))
    assert len(list((directory / "profile").iterdir())) == 1
    assert not (directory.parent / "whole" / "profile").exists()


@pytest.mark.parametrize(
    ("flags", "traced"),
    [
        (("--profile", "3"), 3),
        (("--profile", "8"), 7),
        (("--profile", "3", "--stop-at", "3"), 1),
        (("--profile", "3", "--stop-at", "2"), 0),
    ],
)
def test_profile_says_how_many_steps_it_has(flags, traced, run, capsys):
    """Also when the run ends before the trace is complete."""
    directory = run(*flags)
    said, file = capsys.readouterr().out, directory / "profile" / "step2-rank0.json"
    if not traced:
        assert re.search(r"--profile 3: no trace, because it leaves out two steps and the run made only 2\n", said)
        assert not file.exists()
        return
    asked = int(flags[1])
    note = f" ({asked} were asked for, but the run ended)" if traced < asked else ""
    assert f"profile of {traced} step{'s' * (traced > 1)}{note}: {file}\n" in said
    events = json.loads(file.read_text())["traceEvents"]
    names = [event["name"] for event in events]
    attention = [name for name in names if name in ("tripod::short_attention", "tripod::linear_rotary_attention")]
    assert len(attention) == 2 * traced  # two layers


def test_damage_of_the_order_ends_the_run(run, monkeypatch):
    """A start trusts an order that was checked before; a thread reads it again."""
    monkeypatch.setattr(Order, "verify", lambda self: (_ for _ in ()).throw(UserError("shuffle_idx.npy has changed")))
    with pytest.raises(UserError, match=r"shuffle_idx\.npy has changed"):
        run()
