"""Runs of a Pythia with two layers under torchrun, and comparisons of their directories."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import row_losses
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
STEPS = 8

# train.py with a small Pythia, as a script for torchrun.
SMALL = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv.pop(1))
import train
from runtime.errors import run_command
from model import SIZES
SIZES["14m"] = replace(SIZES["14m"], layers=2, hidden=32, vocab=390)  # 390 rows do not divide by 4
run_command(train.main)
"""


def launcher(corpus: Path, folder: Path) -> Callable[..., tuple[subprocess.CompletedProcess, Path]]:
    """launch(world_size, *flags, out="a") -> (finished process, run directory): twelve rows of 32 tokens a step.

    world_size = 0 is one process without torchrun.
    """
    (folder / "small.py").write_text(SMALL)

    def launch(world_size: int, *flags, out: str) -> tuple[subprocess.CompletedProcess, Path]:
        torchrun = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", world_size]
        command = torchrun if world_size else [sys.executable]
        command += [folder / "small.py", ROOT, "--size", "14m", "--data", corpus, "--out", folder / out]
        command += ["--steps", STEPS, "--batch-size", 12, "--seq-len", 32, "--lr", 1e-2, "--precision", "fp32", *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, env=environment)
        return done, folder / out

    return launch


def trained(result: tuple[subprocess.CompletedProcess, Path]) -> Path:
    """The run directory of a launch, which must have succeeded."""
    done, directory = result
    assert done.returncode == 0, done.stderr
    return directory


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def assert_same_training(ours: Path, one_rank: Path) -> None:
    """Two runs have equal rows and initial weights, and the same losses but for rounding."""
    for a, b in zip(metrics(ours), metrics(one_rank), strict=True):
        assert a["batch_sha256"] == b["batch_sha256"]
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6)
    np.testing.assert_allclose(row_losses(ours), row_losses(one_rank), rtol=2e-6)
    files = [directory / "step0" / "model.safetensors" for directory in (ours, one_rank)]
    assert files[0].read_bytes() == files[1].read_bytes()


def state(directory: Path) -> dict[str, torch.Tensor]:
    """All weights and moments of a checkpoint, read from its parts with the safetensors library alone."""
    pieces: dict[str, list] = {}
    for part in (directory / "state").glob("*.safetensors"):
        with safe_open(part, framework="pt") as tensors:
            for name, rows in tensors.metadata().items():
                if name != "format":
                    first, last = map(int, rows.split(" of ")[0].split(":"))
                    pieces.setdefault(name, []).append((first, last, tensors.get_tensor(name)))
    for name, rows in pieces.items():
        ends = [0, *(last for _, last, _ in sorted(rows, key=lambda piece: piece[0]))]
        assert [first for first, _, _ in sorted(rows, key=lambda piece: piece[0])] == ends[:-1], name
    return {name: torch.cat([t for _, _, t in sorted(rows, key=lambda p: p[0])]) for name, rows in pieces.items()}


def assert_same_bits(a: Path, b: Path) -> None:
    """Two checkpoints hold the same weights and moments."""
    ours, theirs = state(a), state(b)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 3 * 28  # weights and two moments
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def exact_records(directory: Path) -> list[tuple]:
    """What must be equal in every bit."""
    rows = row_losses(directory)
    return [(m["step"], m["loss"], m["grad_norm"], m["batch_sha256"], *rows[m["step"]]) for m in metrics(directory)]
