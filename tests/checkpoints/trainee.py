"""Shared by the tests of checkpoints: a model with its optimizer, and a run with two checkpoints to damage."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Barrier

import pytest
import torch

from checkpoints import resume, save
from checkpoints.manifest import verify_checkpoint
from checkpoints.resume import restore
from checkpoints.save import Saver
from corpus.tokenizer import byte_tokenizer
from model import SIZES, Pythia
from model.huggingface import Export
from runtime import manifests
from runtime.errors import UserError
from runtime.ranks import Dist
from step import make_optimizer

TINY = replace(SIZES["14m"], vocab=384, layers=2)
MICRO = replace(SIZES["14m"], vocab=40, layers=1, hidden=16, heads=2, seq_len=32)
COUNTERS = {"updates": 3, "scaler": {"scale": 4096.0, "hysteresis": 2, "clean_steps": 3}}

MODEL, MANIFEST = "model.safetensors", "manifest.json"
PARTS = ["state/part-00001-of-00002.safetensors", "state/part-00002-of-00002.safetensors"]
FILES = ["config.json", MODEL, "state/counters.json", *PARTS, "tokenizer.json", "tokenizer_config.json"]


@dataclass(frozen=True)
class ThreadRank(Dist):
    """One of several ranks that are threads of this process. They exchange strings through a shared list."""

    board: list = field(default_factory=list)
    meeting: Barrier | None = None

    def all_gather_str(self, text):
        self.board[self.rank] = text
        self.meeting.wait(60)
        texts = list(self.board)
        self.meeting.wait(60)
        return texts

    def with_own_group(self):
        return self


def share_of_rows(p, rank, world):
    return slice(len(p) * rank // world, len(p) * (rank + 1) // world)


class Trainee:
    """A model and its optimizer. The gradients of a step depend on the number of the step only."""

    def __init__(self, config=MICRO, steps=0, seed=0):
        self.model = Pythia(config, seed)
        self.optimizer = make_optimizer(self.model, 1e-2)
        self.train(0, steps)

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def savers(self, run, world=1, dtype=torch.float16, tokenizer=None, **options):
        """One Saver for each rank; each rank writes its share of the rows of every tensor."""
        arguments, export = (run, self.model, self.optimizer), Export(dtype, tokenizer=tokenizer)
        if world == 1:
            return [Saver(*arguments, Dist(), export, **options)]
        board, barrier, savers = [None] * world, Barrier(world), []
        for rank in range(world):
            dist = ThreadRank(rank, world, board=board, meeting=barrier)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(save, "saved_rows", partial(share_of_rows, rank=rank, world=world))
                savers.append(Saver(*arguments, dist, export, **options))
        return savers

    def save(self, run, step, dtype=torch.float16, world=1, **options):
        savers = self.savers(run, world, dtype, **options)
        for saver in savers:
            saver.save(step, COUNTERS)
        for saver in savers:
            saver.finish()
        return run / f"step{step}"

    def restore(self, directory):
        return restore(directory, self.model, self.optimizer)

    def bits(self):
        """All bits that training depends on, by name: weights, both moments, Adam's step."""
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach().numpy().tobytes()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{name} {key}"] = value.numpy().tobytes()
        return found


def two_checkpoints(folder):
    """A run with valid checkpoints of steps 1 and 2: with a tokenizer, and with two parts each."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    trainee = Trainee()
    for step in (1, 2):
        trainee.train(step - 1, step)
        trainee.save(folder / "run", step, world=2, tokenizer=folder / "tokenizer.json")
    return folder / "run"


def header_of(path):
    """The length of a safetensors file's header in bytes, and its content."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@contextmanager
def refusals():
    """refused(directory, *words): restore raises one line that contains all words, and changes no bit of the model.

    verify_checkpoint, which restore calls, must report the same line. With as_listed=True it must report nothing: the
    files are as the manifest says.
    """
    victim = Trainee(steps=5, seed=9)
    before = victim.bits()
    reports = []

    def watched(directory, dist=Dist()):  # noqa: B008
        reports.append(verify_checkpoint(directory, dist))
        return reports[-1]

    def check(directory, *words, as_listed=False):
        reports.clear()
        with pytest.raises(UserError) as caught:
            victim.restore(directory)
        message = str(caught.value)
        for word in words:
            assert word in message
        assert "\n" not in message
        (lines,) = reports
        assert bool(lines) != as_listed
        assert as_listed or lines[0] in message
        assert victim.bits() == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "verify_checkpoint", watched)
        patch.setattr(
            manifests, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1)
        )  # faster than starting many threads
        yield check
