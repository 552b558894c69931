"""The command `data.py edit swap`: pronouns of one gender become those of the other, and no row changes its length.

Every spelling of a pronoun (with and without a space before it; he, He, HE) is a few tokens of the tokenizer, mostly
one. Where the counterpart has as many, it takes their place; where it has not, the pronoun stays and is counted. A
pronoun is a whole word: not `he` in `Mic|he|lle`, ` her` in ` her|ald`, or `him_2`. It stays at the ends of a row, too,
where the rest of the word or the next word may be in another row, and is counted.

Two words have two counterparts: his is her (his book) or hers (it is his); her is his (her book) or him (saw her). They
are determiners if the word behind them follows at once and is not a function word. On the pairs of WinoBias (Zhao et
al. 2018, arXiv:1804.06876), which differ in gender only, this rule is right for more than 95%.
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from corpus.edit_makers import ROWS, step_range, write
from corpus.edits import EDIT
from corpus.order import Rows
from corpus.tokenizer import load_tokenizer, tokenizer_errors
from runtime.errors import UserError

# A pronoun, and its counterpart: as a determiner and standing alone, if these differ.
TO_FEMALE = {"he": ["she"], "him": ["her"], "himself": ["herself"], "his": ["her", "hers"]}
TO_MALE = {"she": ["he"], "hers": ["his"], "herself": ["himself"], "her": ["his", "him"]}
DIRECTIONS = {"m2f": TO_FEMALE, "f2m": TO_MALE, "both": TO_FEMALE | TO_MALE}
LOOKAHEAD = 24  # tokens behind a pronoun that decide what it is
FUNCTION_WORDS = """a an the this that these those and or but nor so yet if than as in on at to from for with by of off
out up down over under about after before because since until while when where who which what why how is was are were be
been am has have had do does did will would can could shall should may might must not n t again too also either ever
never then there here back away alone today yesterday tomorrow some any it he she they we you i home instead"""
NOT_OWNED, POSSESSIVE = set(FUNCTION_WORDS.split()), {"my", "your", "his", "her", "its", "our", "their"}
NEXT_WORDS = re.compile(r"""(?:  ?|\n| ["“]|-)([A-Za-z]+)(?: ([A-Za-z]+))?""")


class Form(NamedTuple):
    """One spelling of a pronoun."""

    word: str  # in lower case
    text: str
    ids: list[int]
    others: list[tuple[str, str, list[int]]]  # word, text and ids of its one or two counterparts


def forms_of(tokenizer: Tokenizer, pairs: dict[str, list[str]]) -> dict[int, list[Form]]:
    """All spellings of the pronouns, by their first token."""
    forms: dict[int, list[Form]] = {}
    for word, others in pairs.items():
        for spelled in (str.lower, str.capitalize, str.upper):
            for space in (" ", ""):
                texts = [space + spelled(w) for w in (word, *others)]
                ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
                form = Form(word, texts[0], ids[0], list(zip(others, texts[1:], ids[1:])))
                forms.setdefault(ids[0][0], []).append(form)
    return forms


class Swap:
    """Swaps the pronouns of rows, and counts what it does: swapped, skipped, and the decisions between two words."""

    def __init__(self, tokenizer: Tokenizer, direction: str):
        self.forms = forms_of(tokenizer, DIRECTIONS[direction])
        ids = range(tokenizer.get_vocab_size())
        self.texts = dict(zip(ids, tokenizer.decode_batch([[id] for id in ids], skip_special_tokens=False)))
        self.swapped, self.skipped, self.decided = Counter(), Counter(), Counter()

    def edits(self, numbers: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The edits (EDIT, sorted) of rows [n], whose tokens are [n, seq_len + 1]."""
        found, candidates = [], np.isin(tokens, list(self.forms))
        for number, row, places in zip(numbers.tolist(), tokens, candidates):
            ids, end = row.tolist(), 0
            for begin in np.flatnonzero(places).tolist():
                form = self._form(ids, begin) if begin >= end else None
                if form:
                    end = begin + len(form.ids)
                    new = self._counterpart(form, ids, begin)
                    found += (
                        (number, begin + k, old, id, 1) for k, (old, id) in enumerate(zip(form.ids, new)) if old != id
                    )
        return np.array(found, EDIT)

    def _form(self, ids: list[int], begin: int) -> Form | None:
        """The pronoun that starts at a token, if one does and is a whole word."""
        for form in self.forms[ids[begin]]:
            end = begin + len(form.ids)
            if ids[begin:end] != form.ids:
                continue
            before = "" if begin == 0 or form.text[0] == " " else self.texts.get(ids[begin - 1], "")
            after = self.texts.get(ids[end], "") if end < len(ids) else ""
            if not is_word_part(before[-1:]) and not is_word_part(after[:1]):
                return form
        return None

    def _counterpart(self, form: Form, ids: list[int], begin: int) -> list[int]:
        """The ids that take the place of a pronoun; none if it stays."""
        end = begin + len(form.ids)
        is_cut, other = end == len(ids) or (begin == 0 and form.text[0] != " "), form.others[0]
        if len(form.others) == 2:
            behind = "".join(self.texts.get(id, "") for id in ids[end : end + LOOKAHEAD])
            words = NEXT_WORDS.match(behind)
            rest = behind[words.end(1) :] if words else behind.strip()
            is_cut |= end + LOOKAHEAD >= len(ids) and not rest
            other = form.others[0 if words and is_owned(*words.groups()) else 1]
        if is_cut:
            self.skipped["at an end of a row"] += 1
            return []
        if (new := len(other[2])) != (old := len(form.ids)):
            self.skipped[f"{form.text.strip()} -> {other[1].strip()}: {old} tokens would be {new}"] += 1
            return []
        self.swapped[f"{form.word} -> {other[0]}"] += 1
        if len(form.others) == 2:
            self.decided[f"{form.word} -> {other[0]}"] += 1
        return other[2]


def is_word_part(character: str) -> bool:
    return character.isalnum() or character in tuple("_@")


def is_owned(word: str, next_word: str | None) -> bool:
    """Whether a word can belong to somebody: `his book`. Also in `his and her book`."""
    both = word.lower() in ("and", "or") and (next_word or "").lower() in POSSESSIVE
    return both or word.lower() not in NOT_OWNED


def swap(args: argparse.Namespace, rows: Rows, file: object) -> None:
    """Turn masculine pronouns into feminine ones, or the other way, token for token, from --from-step on. Prints how
    many were swapped, skipped (and why), and decided where a word has two counterparts."""
    if not file:
        raise UserError(f"{rows.data.prefix} has no tokenizer beside it; give --tokenizer tokenizer.json")
    steps, tokenizer = step_range(args, rows), load_tokenizer(file)
    with tokenizer_errors(file):
        swapper = Swap(tokenizer, args.direction)

    def blocks() -> Iterator[np.ndarray]:
        served = range(steps.start * args.batch_size, steps.stop * args.batch_size)
        for first in range(served.start, served.stop, ROWS):
            numbers = np.arange(first, min(first + ROWS, served.stop))
            yield swapper.edits(numbers, rows.take(numbers))

    write(args, rows, blocks())
    print(json.dumps({name: dict(getattr(swapper, name)) for name in ("swapped", "skipped", "decided")}, indent=1))
