"""Probes: texts of the user whose loss is measured while a model learns, by train.py --probes and by studies/."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from corpus.tokenizer import load_tokenizer, tokenizer_errors
from runtime.errors import UserError
from runtime.files import READ_ERRORS, open_regular, reason
from runtime.manifests import checksums
from runtime.ranks import Dist
from runtime.row_loss import RowLosses
from runtime.run_directory import read_run


@dataclass(frozen=True)
class Probes:
    """The probes of a run. Without texts nothing is measured."""

    texts: list[list[int]] = field(default_factory=list)  # tokens
    sha256: str = ""  # of the file
    every: int = 1  # they are measured before each Nth step

    @property
    def tokens(self) -> int:
        """How many tokens have a loss: all but the first of each text."""
        return sum(len(text) - 1 for text in self.texts)

    def record(self) -> dict:
        """What run.json says about them."""
        return {"sha256": self.sha256, "every": self.every, "lengths": [len(text) for text in self.texts]}


def read_probes(file: Path, tokenizer: Callable[[], Tokenizer]) -> list[list[int]]:
    """The tokens of every probe of a .jsonl file. Raises UserError that names the first wrong line."""
    probes, number = [], 0
    try:
        with open_regular(file) as opened:
            for line in opened:
                number += 1
                probe = json.loads(line)
                if "text" in probe:
                    if not isinstance(probe["text"], str):
                        raise ValueError("text is not a string")
                    with tokenizer_errors(f"{file}, line {number}, with the tokenizer"):
                        probe["tokens"] = tokenizer().encode(probe["text"]).ids
                tokens = probe["tokens"]
                if len(tokens) < 2 or not all(type(token) is int and token >= 0 for token in tokens):
                    raise ValueError("a probe needs two tokens or more, ids that are not negative")
                probes.append(tokens)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {reason(error)}") from None
    except READ_ERRORS as error:
        raise UserError(
            f'{file}, line {number}: {error!r}; each line is {{"text": ..}} or {{"tokens": [..]}}'
        ) from None
    if not probes:
        raise UserError(f"{file} has no probes")
    return probes


def pad(texts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as arrays: tokens int64 [texts, longest], and which have a loss: bool [texts, longest - 1]."""
    lengths = np.array([len(text) for text in texts])
    tokens = np.zeros((len(texts), lengths.max()), np.int64)
    for padded, text in zip(tokens, texts):
        padded[: len(text)] = text
    return tokens, np.arange(1, tokens.shape[1]) < lengths[:, None]


def share_probes(file: Path, every: int, tokenizer_file: Path | None, longest: int, vocab: int, dist: Dist) -> Probes:
    """The probes of a file, which the main rank reads for all ranks. Raises UserError if one is longer than `longest`
    tokens, or has an id of `vocab` or above."""

    def tokenizer() -> Tokenizer:
        if not tokenizer_file:
            raise UserError(f'--probes {file}: the data has no tokenizer beside it: give {{"tokens": [..]}}')
        return load_tokenizer(tokenizer_file)

    def read() -> str:
        texts = read_probes(file, cache(tokenizer))
        for i, text in enumerate(texts):
            if len(text) > longest or max(text) >= vocab:
                raise UserError(
                    f"--probes {file}: text {i} has {len(text)} tokens, the largest id is {max(text)}; the model reads"
                    f" {longest} tokens, its ids end at {vocab - 1}"
                )
        return json.dumps(asdict(Probes(texts, checksums(file)["sha256"], every)))

    return Probes(**json.loads(dist.all_gather_str(dist.run_on_main(read) or "")[0]))


def refuse_other_probes(run_dir: Path, probes: Probes) -> None:
    """Raise UserError if the run has recorded the losses of other probes than these. A run may begin to record some."""
    stored = read_run(run_dir).get("probes") if (run_dir / "run.json").exists() else None
    if stored is not None and stored != probes.record():
        known = stored if isinstance(stored, dict) else {}
        raise UserError(
            f"--probes: {run_dir} records the losses of a file with sha256 {str(known.get('sha256'))[:12]}… and "
            f"--probe-every {str(known.get('every'))[:12]}: give both as before, or choose another --out"
        )


class ProbeLog:
    """Measures the losses of probes, on all ranks, and writes them to a file on the main rank.

    compute(tokens [texts, seq + 1]) -> losses [texts, seq] on the device of `dist`; it gets at most `at_once` tokens,
    or one text. Raises UserError if the file cannot be written.
    """

    def __init__(
        self,
        probes: Probes,
        compute: Callable[[Tensor], Tensor],
        at_once: int,
        dist: Dist,
        path: Path,
        start: int,
        stack: ExitStack,
    ):
        self.probes, self.compute, self.file = probes, compute, None
        if not probes.texts:
            return
        tokens, self.counts = pad(probes.texts)
        self.tokens = torch.from_numpy(tokens).to(dist.device).split(max(1, at_once // tokens.shape[1]))
        self.losses = torch.empty(self.counts.shape, pin_memory=dist.device.type == "cuda")  # [texts, longest - 1]
        written = partial(RowLosses, path, -(-start // probes.every), probes.tokens)
        self.file = dist.run_on_main(lambda: stack.enter_context(written()))

    def measure(self, step: int) -> None:
        """Before the update of a step. A GPU has written the losses when loss and grad_norm can be read."""
        if self.probes.texts and step % self.probes.every == 0:
            for tokens, losses in zip(self.tokens, self.losses.split(len(self.tokens[0]))):
                losses.copy_(self.compute(tokens), non_blocking=True)

    def record(self, step: int) -> dict[str, float]:
        """On the main rank: append what was measured. Returns its mean for metrics.jsonl. Raises UserError."""
        if not self.file or step % self.probes.every:
            return {}
        losses = self.losses.numpy()[self.counts]
        self.file.record(losses)
        return {"probe_loss": losses.mean(dtype=np.float64).item()}
