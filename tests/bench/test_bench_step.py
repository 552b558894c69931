"""bench.step: the peers are the network of Tripod, an arm is measured, and the command reports all arms."""

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.autograd import DeviceType

from bench.arm import WARM_UP, Arm, ArmFailed, Runner, count_calls
from bench.peers import PACKAGES, build_peer, obstacle
from bench.step import Comparison, check_equal, parse, summarize
from bench.timing import repeat_while_disturbed
from model import SIZES, Pythia
from parallel.gradients import squared_norm
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ours():
    """A small Pythia. Its biases and LayerNorms have random values, not the initial zeros and ones."""
    model = Pythia(replace(SIZES["14m"], layers=2, hidden=48, heads=3, vocab=512, seq_len=32, rotary_fraction=0.5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.mark.parametrize("peer", [pytest.param(p, marks=pytest.mark.gpu) if p == "liger" else p for p in PACKAGES])
def test_peers_are_our_network(peer, ours, device):
    if found := obstacle(peer):
        pytest.skip(f"{PACKAGES[peer]}: {found}")
    network, loss_of = build_peer(peer, ours.to(device))
    tokens = torch.randint(512, (3, 33), generator=torch.Generator().manual_seed(1)).to(device)
    ours.zero_grad()
    loss = ours(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    theirs = loss_of(network, tokens[:, :-1], tokens[:, 1:])
    theirs.backward()
    assert network.training
    assert theirs.item() == pytest.approx(loss.item(), abs=1e-5)
    norms = [squared_norm(list(model.parameters())).sqrt().item() for model in (network, ours)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in ours.parameters())


def test_liger_needs_a_gpu(monkeypatch):
    monkeypatch.setattr("bench.peers.find_spec", lambda package: package == "liger_kernel" or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [obstacle(peer) for peer in ("liger", "hf")] == ["needs a GPU", "not installed"]


def test_a_different_network_is_refused():
    step = {"loss": 10.8, "gradient_norm": 2.0}
    check_equal("fp32", "plain", step, step)
    for other in ({"loss": 10.8003}, {"gradient_norm": 2.01}, {"loss": float("nan")}, {"gradient_norm": float("nan")}):
        with pytest.raises(ArmFailed, match="plain is another network"):
            check_equal("fp32", "plain", step | other, step)


# ---- one arm


@pytest.fixture
def runner(tiny, monkeypatch):
    """runner(arm, *flags) -> the Runner of an arm with a small model, in this process."""
    monkeypatch.setattr("bench.arm.VOCAB_USED", tiny.vocab)

    def build(arm: str, *flags: str) -> Runner:
        return Runner(parse(["--batch", "2", "--seq-len", "32", *flags, "--arm", arm]), torch.device("cpu"))

    return build


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_arms_make_equal_steps(precision, runner):
    tripod, plain = (runner(arm, "--precision", precision).warm_up()["warm_up"] for arm in ("tripod", "plain"))
    assert len(tripod) == len(plain) == WARM_UP
    for ours, theirs in zip(tripod, plain):  # equal after updates too: clipping and AdamW are the same
        check_equal(precision, "plain", theirs, ours)
    assert tripod[0]["loss"] != tripod[1]["loss"]


def test_micro_steps_are_one_step(runner):
    """Two micro-steps of two rows have the gradients of one of four rows, for Tripod and for a peer."""
    draw = torch.Generator().manual_seed(0)
    batch = torch.randint(384, (4, 33), generator=draw)
    for name in ("tripod", "plain"):
        one, two = (runner(name, "--micro-steps", n).step for n in ("1", "2"))
        whole = [value.item() for value in one(batch[None])]
        assert [value.item() for value in two(batch.view(2, 2, 33))] == pytest.approx(whole, rel=1e-6)
    assert next(runner("plain", "--micro-steps", "3").batches).shape == (3, 2, 33)


def test_recompute_does_not_change_the_loss(runner):
    losses = [runner("tripod", "--recompute", r).warm_up()["warm_up"][-1]["loss"] for r in ("none", "cheap", "full")]
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-6)] * 2


def test_runner_measures_and_counts(runner, monkeypatch):
    arm = runner("plain")
    arm.warm_up()
    monkeypatch.setattr("bench.arm.SHORTEST", 2.5 * arm.step_seconds)
    measurement = arm.measure()
    assert measurement["steps"] == 3
    assert arm.step_seconds == measurement["seconds"] / 3 > 0
    assert arm.peak_bytes() > 1e7
    if not torch.cuda.is_available():
        assert arm.count() == {"calls": None}


def events(*calls: tuple[str, float]) -> list[SimpleNamespace]:
    """Events of a profiler: a step from 10 to 20 on the host, its copy on the device, and calls of (name, start)."""
    step = SimpleNamespace(name="step", device_type=DeviceType.CPU, time_range=SimpleNamespace(start=10, end=20))
    shadow = SimpleNamespace(name="step", device_type=DeviceType.CUDA, time_range=SimpleNamespace(start=0, end=90))
    others = [
        SimpleNamespace(name=name, device_type=DeviceType.CPU, time_range=SimpleNamespace(start=start, end=start + 1))
        for name, start in calls
    ]
    return [*others[:1], shadow, step, *others[1:]]


def test_only_calls_within_the_step_are_counted():
    launches = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuLaunchKernel", "cudaGraphLaunch"]
    syncs = ["cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"]
    others = ["aten::mm", "cudaMemcpyAsync", "cudaLaunchHostFunc", "cudaEventRecord", "cudaMalloc", "cudaMemsetAsync"]
    inside = [(name, 15.0) for name in launches + syncs + others]
    outside = [("cudaLaunchKernel", 9.5), ("cudaDeviceSynchronize", 20.0)]  # calls of the profiler itself
    assert count_calls(events(*outside, *inside)) == {"launches": 5, "syncs": 4}
    assert count_calls(events(("aten::mm", 12.0))) is None


# ---- the handle of an arm, and the comparison


def arm_of(script: str, monkeypatch, seconds: float = 60) -> Arm:
    """An Arm whose process runs this script."""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **rest: popen([sys.executable, "-c", script], **rest))
    return Arm("plain", {"measurements": []}, [], "tuned", time.monotonic() + seconds)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('print(\'{"failed": "OutOfMemoryError: CUDA out of memory. Tried to allocate 3 GiB"}\')', "^out of memory$"),
        ('print(\'{"failed": "ValueError: no such shape"}\')', "^ValueError: no such shape$"),
        ("import os; os.kill(os.getpid(), 9)", "killed, probably for lack of memory"),
        ("raise SystemExit(3)", "^exit status 3$"),
    ],
)
def test_a_failed_arm_reports_the_reason(script, message, monkeypatch):
    with arm_of(script, monkeypatch) as arm, pytest.raises(ArmFailed, match=message):
        arm.warm_up()


def test_an_arm_is_killed_at_its_deadline(monkeypatch):
    with arm_of("import time; time.sleep(600)", monkeypatch, seconds=0.2) as arm:
        with pytest.raises(ArmFailed, match="the time was over"):
            arm.warm_up()
    assert arm.process.returncode == -signal.SIGKILL


def test_a_disturbed_measurement_is_repeated():
    foreign = iter([0.5, 0.2, 0.3, 0.05, 0.0])

    def measure() -> dict:
        return {"foreign_cpu": next(foreign)}

    measurements = repeat_while_disturbed(measure, attempts=3, pause=0)
    assert [(m["foreign_cpu"], m["kept"]) for m in measurements] == [(0.5, False), (0.2, True), (0.3, False)]
    assert repeat_while_disturbed(measure, attempts=3, pause=0) == [{"foreign_cpu": 0.05, "kept": True}]
    unknown = {"foreign_cpu": None}
    assert repeat_while_disturbed(lambda: unknown, attempts=3, pause=0) == [unknown | {"kept": True}]


class FakeArm:
    """An arm without a process. `behaviour` maps "NAME" to its loss or error, or "NAME at" to the turn that fails."""

    behaviour: ClassVar[dict] = {}

    def __init__(self, name, record, arguments, allocator, deadline):
        self.name, self.record = name, record

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def end(self):
        pass

    def answer(self):
        pass

    def warm_up(self):
        loss = self.behaviour.get(self.name, 10.0)
        if isinstance(loss, str):
            raise ArmFailed(loss)
        self.record |= {
            "warm_up": [{"loss": loss, "gradient_norm": 1.0, "seconds": 1.0}],
            "peak_bytes": 1,
            "threads": 2,
        }

    def measure(self, turn):
        if self.behaviour.get(f"{self.name} at") == turn:
            raise ArmFailed("broke")
        measurement = {"steps": 2, "seconds": 2.0, "page_faults": 0, "foreign_cpu": 0.0, "turn": turn, "kept": True}
        self.record["measurements"].append(measurement)

    def count(self):
        pass


@pytest.mark.parametrize("mode", ["--alone", "--no-alone"])
def test_a_failed_arm_does_not_affect_the_others(mode, monkeypatch):
    monkeypatch.setattr("bench.step.Arm", FakeArm)
    monkeypatch.setattr("bench.step.obstacle", lambda peer: "not installed" if peer == "liger" else "")
    fails = {"hf": "out of memory", "litgpt": 11.0, "plain+compile at": 1}
    monkeypatch.setattr(FakeArm, "behaviour", fails)
    s, saved = parse(["--rounds", "3", mode]), []
    comparison = Comparison(s, [], "tuned", math.inf, lambda: saved.append(json.dumps(comparison.records)))
    comparison.run()
    records = comparison.records
    assert records["hf"] == {"missing": "out of memory"}
    assert records["liger"] == {"missing": "not installed"}
    assert "litgpt is another network" in records["litgpt"]["missing"]
    assert records["plain+compile"]["stopped"] == "broke"
    assert len(records["plain+compile"]["measurements"]) == 1
    rounds = 6 if mode == "--alone" else 3
    assert len(records["tripod"]["measurements"]) == len(records["plain"]["measurements"]) == rounds
    assert len({text for text in saved if "plain" in text}) > 5  # saved after every measurement


def test_a_time_limit_reduces_the_rounds(monkeypatch):
    monkeypatch.setattr("bench.step.Arm", FakeArm)
    s = parse(["--rounds", "1000", "--against", "plain", "--no-compile", "--alone", "--seconds", "1"])
    comparison = Comparison(s, [], "tuned", time.monotonic(), lambda: None)
    comparison.run()
    assert [len(record["measurements"]) for record in comparison.records.values()] == [1, 1]


def test_summary():
    s = parse(["--batch", "1", "--micro-steps", "2", "--seq-len", "50", "--rounds", "2"])
    timings = [(2, 4.0, 0), (1, 1.0, 1), (5, 5.0, 2), (1, 4.0, 3)]  # steps, seconds, turn
    kept = [
        {"steps": n, "seconds": t, "page_faults": 10 * n, "foreign_cpu": 0.5 * (turn == 3), "turn": turn, "kept": True}
        for n, t, turn in timings
    ]
    lost = kept[0] | {"seconds": 100.0, "kept": False, "foreign_cpu": 0.5}
    summary = summarize(s, {"warm_up": [{"seconds": 7.0}], "measurements": [lost, *kept]})
    assert summary == {
        "tokens_per_s": 100 / 1.5,
        "tokens_per_s_min": 25.0,
        "tokens_per_s_max": 100.0,
        "seconds_per_step": 1.5,
        "first_step_seconds": 7.0,
        "page_faults_per_step": 10,
        "measurements": 5,
        "disturbed": 2,
        "disturbed_kept": 1,
        "second_pass_over_first": pytest.approx(1.5 / 2.5 - 1),
    }


# ---- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "plain,jax"], "--against knows hf, litgpt, liger, plain, not jax"),
        (["--seconds", "nan"], "--seconds must be positive, not nan"),
        (["--rounds", "0"], "--rounds must be positive, not 0"),
        (["--seq-len", "-1"], "--seq-len must be positive, not -1"),
        (["--json", "nowhere/at/all.json"], "there is no directory nowhere/at"),
        (["--size", "13m"], "invalid choice"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        parse(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [["--no-alone"], ["--alone"], ["--alone", "--seconds", "300"]])
def test_command(mode, tmp_path):
    command = [sys.executable, "-m", "bench.step", "--no-compile", "--json", str(tmp_path / "a.json"), *mode]
    command += ["--size", "14m", "--batch", "1", "--seq-len", "16", "--precision", "fp32", "--rounds", "1"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["settings"]["seq_len"] == 16
    assert report["machine"]["versions"]["torch"] == torch.__version__
    assert report["gemm_flops_per_s"] > 0
    arms, passes = report["runs"]["tuned"], 2 if mode == ["--alone"] else 1
    assert list(arms) == ["tripod", "hf", "litgpt", "liger", "plain"]
    for name, arm in arms.items():
        if name != "tripod" and obstacle(name):
            assert arm == {"missing": obstacle(name)}
            assert f"{name:<16}{obstacle(name)}" in run.stdout
            continue
        assert arm["warm_up"][0]["loss"] == pytest.approx(arms["tripod"]["warm_up"][0]["loss"], abs=1e-4)
        kept = [m for m in arm["measurements"] if m["kept"]]
        assert len(kept) == passes
        assert all(m["steps"] > 0 and m["seconds"] > 0 and m["page_faults"] >= 0 for m in kept)
        summary = arm["summary"]
        assert summary["tokens_per_s_min"] <= summary["tokens_per_s"] <= summary["tokens_per_s_max"]
        assert arm["peak_bytes"] > 1e8
    assert ("second pass over first" in run.stdout) == (passes == 2)


def test_compile_means_the_plain_network():
    assert parse(["--against", "hf,compile,plain"]).against == ["hf", "plain"]
