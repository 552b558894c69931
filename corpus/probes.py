"""Probes: texts of the user whose loss is measured while a model learns, by train.py --probes and by studies/."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from corpus.tokenizer import tokenizer_errors
from runtime.errors import UserError
from runtime.files import READ_ERRORS, open_regular, reason


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
