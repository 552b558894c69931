"""The text of a plan: the machine, the table of memory, the command, the days."""

import json
import shlex
from dataclasses import replace
from itertools import product

import pytest

import train
from model import SIZES
from plan import time
from plan.memory import RECOMPUTED_ACTIVATIONS, Job, choose_shard, total_memory
from plan.report import parse_machine, report
from plan.time import GPUS, fastest, known_rates, step_seconds
from runtime.errors import UserError

JOB = Job(SIZES["14m"], 1024, 8, 2048, "bf16", "none", "auto")


def plan(size: str, machine: str) -> str:
    return report(replace(JOB, config=SIZES[size]), 143_000, parse_machine(machine, 1024))


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
    ("size", "machine"), [("12b", "16xA100-40GB"), ("14m", "1x3090"), ("6.9b", "1x4090"), ("1b", "")]
)
def test_text(size, machine, monkeypatch):
    lines = plan(size, machine).split("\n")
    assert len(lines) <= 46
    assert max(map(len, lines)) <= 120
    if size == "6.9b":
        assert "Nothing fits 1x4090. The smallest that does is 8x4090" in lines
        return
    launcher, flags = "\n".join(lines).replace("\\\n", "").split("train.py ")
    ranks = launcher.split("torchrun ")[1].split()
    world = int(ranks[ranks.index("--nproc-per-node") + 1]) * (2 if "--nnodes 2" in launcher else 1)
    assert world == int((machine or "8xH100").split("x")[0])
    monkeypatch.setenv("WORLD_SIZE", str(world))
    s = train.parse(shlex.split(flags.split("\n")[0]))  # the command works
    m = parse_machine(machine, 1024)
    rates, _ = known_rates(SIZES[size], "bf16", m.gpu)
    best = fastest(replace(JOB, config=SIZES[size], world_size=world), GPUS[m.gpu].memory, rates)
    assert (s.size, s.shard, s.recompute, s.micro_batch) == (size, best.shard, best.recompute, best.micro_batch)


def table(lines: list[str], title: str) -> list[list[str]]:
    """The rows below a title and a header."""
    first = next(i for i, line in enumerate(lines) if line.startswith(title)) + 2
    return [line.replace(",", "").split() for line in lines[first : [*lines, ""].index("", first)]]


def test_numbers_of_the_table_of_days_belong_together():
    lines = plan("12b", "8x4090").split("\n")
    rows = table(lines, "All sizes on 8x4090")
    assert [row[0] for row in rows] == list(SIZES)
    assert ["12b", "nothing", "fits"] in rows
    for name, shard, recompute, micro_batch, gigabytes, *numbers, source in (row for row in rows if "fits" not in row):
        days, hours = map(float, numbers)
        rates, _ = known_rates(SIZES[name], "bf16", "4090")
        best = fastest(Job(SIZES[name], 1024, 8, 2048, "bf16", world_size=8), 24e9, rates)
        assert (shard, recompute, int(micro_batch)) == (best.shard, best.recompute, best.micro_batch)
        assert float(gigabytes) == pytest.approx(total_memory(best) / 1e9, abs=0.051)
        assert days == pytest.approx(143_000 * step_seconds(best, rates) / 86400, abs=0.0051)
        assert hours == pytest.approx(24 * days * 8, rel=1e-3, abs=24 * 0.006 * 8)
        assert source == "assumed"
    assert any("Communication between ranks is not included" in line for line in lines)


def test_table_of_memory():
    rows = table(plan("12b", "16xA100-40GB").split("\n"), "GB by --shard")
    assert [row[0] for row in rows] == ["grad", "none", "hybrid", "full"]
    columns = list(product(RECOMPUTED_ACTIVATIONS, (1, 2, 4, 8)))
    for shard, *sizes in rows:
        for (recompute, micro_batch), text in zip(columns, sizes, strict=True):
            job = Job(SIZES["12b"], 1024, micro_batch, 2048, "bf16", recompute, world_size=16)
            size = total_memory(choose_shard(job, 40e9, (shard,)))
            assert text == f"{size / 1e9:.1f}" + "*" * (size > 0.92 * 40e9)


def test_text_tells_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "RESULTS", tmp_path)
    result = {"gpu": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 2.9e12, "product_flops_per_s": {"1b": 601e12}}
    (tmp_path / "roofline-h100.json").write_text(json.dumps(result))
    lines = plan("1b", "").split("\n")
    for rate in ("matmul         601 TFLOP/s", "copy           2.9 TB/s"):
        assert any(rate in line and line.endswith("measured (bench/results/roofline-h100.json)") for line in lines)
    assert sum("assumed from the data sheet" in line for line in lines) == 1
    assert [row[0] for row in table(lines, "All sizes on 8xH100") if row[-1] == "measured"] == ["1b"]
