"""Fixtures: a Pythia that trains in a test, text for it, and the choice of the kernels."""

import gc
import json
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fake_streams
import numpy as np
import pytest
import torch

# More than one thread gains little for small models, and on a busy machine the threads of a process wait for each
# other. Processes that a test starts inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without a GPU the tests run the kernels in Triton's interpreter. Triton reads this variable when a kernel is defined,
# that is in the imports below. Afterwards it would only slow down other tests and the processes that they start.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import train
from corpus.prepare import prepare
from kernels import backend
from model import SIZES

os.environ.pop("TRITON_INTERPRET", None)
INTERPRETED, backend.INTERPRETED = backend.INTERPRETED, False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: run `pytest -m gpu` where there is one"))


@pytest.fixture(scope="session", autouse=True)
def references() -> None:
    """Ops run their torch reference, unless a test asks for Triton."""
    backend.choose("torch")


@pytest.fixture
def triton_kernels(monkeypatch) -> Iterator[None]:
    """Ops run their Triton kernels: on the GPU if there is one, else in Triton's interpreter."""
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(backend, "INTERPRETED", True)
    backend.choose("triton")
    yield
    backend.choose("torch")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def streams(monkeypatch) -> list:
    """The log of a fake torch.cuda: see fake_streams.py."""
    return fake_streams.install(monkeypatch)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """The prefix of a data set: 60 documents of random words, one token per byte."""
    folder = tmp_path_factory.mktemp("corpus")
    words = random.Random(0)
    vocabulary = ["".join(words.choices("abcdefghij ", k=words.randint(1, 9))) for _ in range(50)]
    with (folder / "text.jsonl").open("w") as file:
        for _ in range(60):
            file.write(json.dumps({"text": " ".join(words.choices(vocabulary, k=100))}) + "\n")
    prepare([folder / "text.jsonl"], folder / "text")
    return folder / "text"


@pytest.fixture
def tiny(monkeypatch):
    """Size 14m shrunk to two layers of 32 with a vocabulary of 384."""
    config = replace(SIZES["14m"], layers=2, hidden=32, vocab=384)
    monkeypatch.setitem(SIZES, "14m", config)
    return config


@pytest.fixture
def run(tiny, corpus, tmp_path):
    """run(*flags, out="a") trains in this process: nine steps of four rows of 32 tokens. Returns the run directory."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def start(*flags: str, out: str = "run") -> Path:
        line = ["--size", "14m", "--data", str(corpus), "--out", str(tmp_path / out), "--steps", "9"]
        line += ["--batch-size", "4", "--seq-len", "32", "--precision", "fp32", "--kernels", "torch", *map(str, flags)]
        train.train(train.parse(line))
        return tmp_path / out

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def row_losses(run_directory: Path) -> np.ndarray:
    """row_loss.bin: float32 [steps, batch]."""
    batch = json.loads((run_directory / "run.json").read_text())["settings"]["batch_size"]
    return np.fromfile(run_directory / "row_loss.bin", "<f4").reshape(-1, batch)


def records(run_directory: Path) -> list[dict]:
    """metrics.jsonl without the values that depend on the clock, and the row losses of every step."""
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "data_seconds", "compute_seconds", "tokens_per_s", "mfu")
    rows = row_losses(run_directory).tolist()
    kept = [{k: v for k, v in line.items() if k not in clock} for line in lines]
    return [record | {"row_losses": rows[record["step"]]} for record in kept]


@pytest.fixture(autouse=True)
def _free_gpu_memory() -> Iterator[None]:
    """Give the memory of a test back to the GPU: other processes of pytest-xdist may need it."""
    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True)
def _fixed_threads():
    """The order of a sum depends on the number of threads. Tests that compare bits need a fixed number."""
    torch.set_num_threads(1)
