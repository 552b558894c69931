"""The text of a plan: the machine, the table of memory, the command, the days."""

import json
import re
import shlex
from dataclasses import replace
from itertools import product

import pytest

import train
from model import SIZES, SUITE
from plan import time
from plan.memory import RECOMPUTED_ACTIVATIONS, Job, choose_shard, total_memory
from plan.report import details, parse_machine, summary
from plan.time import GPUS, fastest, known_rates, step_seconds
from runtime.errors import UserError


def summary_of(size: str, machine: str, data: str = "--data PREFIX", **given) -> list[str]:
    return summary(job_on(size, machine, **given), parse_machine(machine, 1024), 143_000, 1e-3, data).split("\n")


def details_of(size: str, machine: str) -> list[str]:
    return details(job_on(size, machine), parse_machine(machine, 1024), 143_000, 1e-3).split("\n")


def job_on(size: str, machine: str, **given) -> Job:
    """A job that leaves open what is not given."""
    m = parse_machine(machine, 1024)
    job = Job(SIZES[size], 1024, 0, 2048, "fp16", "auto", "auto", m.world_size, m.local_world_size)
    return replace(job, **given)


def fastest_on(machine: str, job: Job) -> Job | None:
    gpu = parse_machine(machine, 1024).gpu
    return fastest(job, GPUS[gpu].memory, known_rates(job.config, job.precision, gpu)[0])


def test_machines(monkeypatch):
    assert parse_machine("16xA100-40GB", 1024) == ("A100-40GB", 16, 8)
    assert parse_machine("4x3090", 1024) == ("3090", 4, 4)
    assert str(parse_machine("", 1024)) == "8xH100"
    assert str(parse_machine("", 12)) == "4xH100"
    monkeypatch.setenv("WORLD_SIZE", "12")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    assert parse_machine("", 1020) == ("H100", 12, 6)
    assert parse_machine("2xL40S", 1020).world_size == 2
    for text, message in (
        ("8xB52", "one of H200, H100, A100-80GB, A100-40GB, L40S, 4090, 3090, such as"),
        ("H100", "a number and one of"),
        ("0xH100", "a number and one of"),
        ("12xH100", "whole nodes of 8"),
        ("8xH100", "--batch-size 1020 does not divide among 8 ranks"),
    ):
        with pytest.raises(UserError, match=f"--plan-for {text}: .*{message}"):
            parse_machine(text, 1020)


@pytest.mark.parametrize(
    ("size", "machine"), [("12b", "16xA100-40GB"), ("14m", "1x3090"), ("1b", ""), ("2.8b", "4xL40S")]
)
def test_the_command_and_the_days_come_first(size, machine, monkeypatch):
    """On one short screen: a command that works, and names the fastest setting that fits."""
    lines = summary_of(size, machine)
    assert len(lines) <= 10
    assert max(map(len, lines)) <= 120
    launcher, flags = "\n".join(lines[1:4]).replace("\\\n", "").split("\n")[0].split("train.py ")
    ranks = launcher.split()
    world = int(ranks[ranks.index("--nproc-per-node") + 1]) if ranks[0] == "torchrun" else 1
    world *= int(ranks[ranks.index("--nnodes") + 1]) if "--nnodes" in ranks else 1
    assert world == int((machine or "8xH100").split("x")[0])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = train.parse(shlex.split(flags))  # the command works
    best = fastest_on(machine, job_on(size, machine))
    assert (s.size, s.shard, s.recompute, s.micro_batch) == (size, best.shard, best.recompute, best.micro_batch)
    days = 143_000 * step_seconds(best, known_rates(SIZES[size], "fp16", parse_machine(machine, 1024).gpu)[0]) / 86400
    line = next(line for line in lines[2:4] if line.startswith("  time"))
    assert float(line.split()[1].replace(",", "")) == pytest.approx(days, abs=0.0051)
    assert f"{SIZES[size].parameters:,} parameters, fp16" in "\n".join(lines)
    assert f"{total_memory(best) / 1e9:.1f} GB a rank" in "\n".join(lines)


def test_given_flags_stay_and_the_plan_says_if_they_do_not_fit():
    lines = summary_of("6.9b", "", recompute="cheap")
    best = fastest_on("", job_on("6.9b", "", recompute="cheap"))
    assert lines[2].endswith(f"--shard {best.shard} --recompute cheap --micro-batch {best.micro_batch}")
    lines = summary_of("6.9b", "", micro_batch=32, recompute="none")
    assert re.fullmatch(
        r"--shard full --recompute none --micro-batch 32 does not fit 8xH100: \d+\.\d GB .* 73.6 fit.", lines[0]
    )
    assert lines[1:] == summary_of("6.9b", "")
    lines = summary_of("6.9b", "1x4090")
    assert lines[0] == "Nothing fits 1x4090. The smallest that does is 8x4090"
    assert not any("train.py" in line for line in lines)
    lines = summary_of("6.9b", "1x4090", recompute="none")
    assert "does not fit 1x4090" in lines[0]
    assert lines[1] == "Nothing fits 1x4090. The smallest that does is 8x4090"


def test_details_are_as_wide_as_a_page():
    for size, machine in (("12b", "16xA100-40GB"), ("6.9b", "1x4090")):
        assert max(map(len, details_of(size, machine))) <= 120


def table(lines: list[str], title: str) -> list[list[str]]:
    """The rows below a title and a header."""
    first = next(i for i, line in enumerate(lines) if line.startswith(title)) + 2
    return [line.replace(",", "").split() for line in lines[first : [*lines, ""].index("", first)]]


def test_numbers_of_the_table_of_days_belong_together():
    lines = details_of("12b", "8x4090")
    rows = table(lines, "All sizes on 8x4090")
    assert [row[0] for row in rows] == list(SUITE)
    assert ["12b", "nothing", "fits"] in rows
    for name, shard, recompute, micro_batch, gigabytes, *numbers, source in (row for row in rows if "fits" not in row):
        days, hours = map(float, numbers)
        rates, _ = known_rates(SIZES[name], "fp16", "4090")
        best = fastest(job_on(name, "8x4090"), 24e9, rates)
        assert (shard, recompute, int(micro_batch)) == (best.shard, best.recompute, best.micro_batch)
        assert float(gigabytes) == pytest.approx(total_memory(best) / 1e9, abs=0.051)
        assert days == pytest.approx(143_000 * step_seconds(best, rates) / 86400, abs=0.0051)
        assert hours == pytest.approx(24 * days * 8, rel=1e-3, abs=24 * 0.006 * 8)
        assert source == "assumed"
    assert any("Communication between ranks is not included" in line for line in lines)


def test_table_of_memory():
    rows = table(details_of("12b", "16xA100-40GB"), "GB by --shard")
    assert [row[0] for row in rows] == ["grad", "none", "hybrid", "full"]
    columns = list(product(RECOMPUTED_ACTIVATIONS, (1, 2, 4, 8)))
    for shard, *sizes in rows:
        for (recompute, micro_batch), text in zip(columns, sizes, strict=True):
            job = Job(SIZES["12b"], 1024, micro_batch, 2048, "fp16", recompute, world_size=16)
            size = total_memory(choose_shard(job, 40e9, (shard,)))
            assert text == f"{size / 1e9:.1f}" + "*" * (size > 0.92 * 40e9)


def test_text_tells_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "RESULTS", tmp_path)
    result = {"gpu": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 2.9e12, "product_flops_per_s": {"1b": 601e12}}
    (tmp_path / "roofline-h100.json").write_text(json.dumps(result))
    lines = details_of("1b", "")
    for rate in ("matmul         601 TFLOP/s", "copy           2.9 TB/s"):
        assert any(rate in line and line.endswith("measured (bench/results/roofline-h100.json)") for line in lines)
    assert sum("assumed from the data sheet" in line for line in lines) == 1
    assert [row[0] for row in table(lines, "All sizes on 8xH100") if row[-1] == "measured"] == ["1b"]
