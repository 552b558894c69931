"""The trainer against transformers in an ordinary loop, and against itself stopped and resumed."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import records
from safetensors.torch import load_file

import train
from checkpoint import verify
from checkpoints import manifest
from corpus.order import Order
from model import SIZES, Pythia
from model.huggingface import load, save
from parallel import gradients
from plan.memory import Job
from plan.report import parse_machine, report
from runtime.errors import UserError
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
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
        train.train(train.parse([str(part) for part in (*line, "--kernels", kernels, "--out", out)]))
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
        train.parse(["--size", "14m", "--kernels", "triton"])
    assert train.parse(["--size", "14m", "--kernels", "triton", "--plan"]).plan  # a plan may be for another machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="where the default is bf16")
@pytest.mark.parametrize("fast", [True, False])
def test_default_precision_on_a_cpu(fast, monkeypatch):
    monkeypatch.setattr(train, "supports_bf16_matmul", lambda: fast)
    assert train.parse(["--size", "14m"]).precision == "fp32"
    assert train.parse(["--size", "14m", "--demo"]).precision == ("bf16" if fast else "fp32")
    assert train.parse(["--size", "14m", "--demo", "--precision", "fp16"]).precision == "fp16"


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
        model.blocks[1].mlp_out.bias[3] = math.nan
    save(model, tmp_path / "broken", torch.float32)
    with pytest.raises(UserError, match=r"step 0, rows 0 to 3: loss nan.*last good checkpoint is .*step0"):
        run("--init-from", tmp_path / "broken", out="run")
    assert manifest.verify_checkpoint(tmp_path / "run" / "step0") == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


def test_a_gradient_that_is_not_finite_stops_before_the_update(run, monkeypatch, tmp_path):
    real, calls = gradients.squared_norm, []

    def broken(parameters):
        calls.append(0)
        return real(parameters) * (math.inf if len(calls) == 6 else 1.0)

    monkeypatch.setattr(gradients, "squared_norm", broken)
    with pytest.raises(UserError, match=r"step 5, rows 20 to 23: loss [\d.]+, gradient norm inf.*step4 *$"):
        run()
    monkeypatch.setattr(gradients, "squared_norm", real)
    assert records(run()) == records(run(out="whole"))


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


def test_a_second_signal_stops_at_once():
    script = "import signal, time, train\nstop = train.StopSignal()\nsignal.raise_signal(2)\ntime.sleep(1.1)\n"
    script += "assert stop.requested\nsignal.raise_signal(2)\nprint('alive')"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130
    assert "alive" not in done.stdout


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

    (directory / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged"):
        run()


def test_finished_and_paused_runs_say_so(run, capsys):
    run("--stop-at", "3")
    assert "paused at step 3 of 9; the same command without --stop-at continues the run" in capsys.readouterr().out
    run("--stop-at", "2")
    assert "is at step 3" in capsys.readouterr().out
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
def test_plan_knows_every_size(size):
    s = train.parse(["--size", size, "--plan"])
    job = Job(SIZES[size], s.batch_size, s.micro_batch, s.seq_len, s.precision, s.recompute, s.shard)
    text = report(job, s.steps, parse_machine("", s.batch_size))
    assert f"{SIZES[size].parameters:,}" in text
    assert "299,892,736,000" in text


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
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged"):
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

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run("--log", "wandb", out="other")


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


def test_profile_of_a_run_that_ends_before_the_trace(run):
    directory = run("--profile", "100")
    assert (directory / "profile" / "step2-rank0.json").exists()
