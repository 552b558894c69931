"""Tokenizers: Pythia's without its merges, and tokenizer.json files."""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime.errors import UserError

END_OF_TEXT = "<|endoftext|>"  # id 0 in all of Pythia's data


def byte_tokenizer() -> Tokenizer:
    """The GPT-NeoX-20B tokenizer of Pythia without its merges, built from nothing: a token a byte.

    0 <|endoftext|>, 1 <|padding|>, 2 .. 244 the bytes that occur in UTF-8 (never C0, C1, F5 .. FF), by the code point
    of the character that GPT-2 writes for them. Each of these ids is the id of the same token in Pythia's tokenizer.
    """
    never = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}  # GPT-2 writes these as themselves
    tokens = [END_OF_TEXT, "<|padding|>", *sorted({*pre_tokenizers.ByteLevel.alphabet()} - never)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """A tokenizer.json, or UserError."""
    try:
        return Tokenizer.from_str(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"{path}: not a readable tokenizer.json ({str(error).splitlines()[0]})") from None


def can_cut(tokenizer: Tokenizer) -> bool:
    """Whether text may be cut before white space that follows something else, without a change to its tokens.

    The byte-level pre-tokenizer of GPT-2 splits there in any case: its pattern has white space only at the front of a
    pre-token. NFC composes nothing with a space or newline. An added token must neither contain such a place nor eat
    the white space beside it. Other tokenizers (Llama 3: punctuation keeps its newline) get each document in one piece.
    """
    spec = json.loads(tokenizer.to_str())
    splitter, normalizer = spec["pre_tokenizer"] or {}, spec["normalizer"] or {"type": "NFC"}
    return (
        splitter.get("type") == "ByteLevel"
        and splitter.get("use_regex", True)
        and not splitter["add_prefix_space"]
        and normalizer["type"] == "NFC"
        and not any(t["lstrip"] or t["rstrip"] or re.search(r"\S\s", t["content"]) for t in spec["added_tokens"])
    )
