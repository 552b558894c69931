"""Tokenizers: that of Pythia without its merges, and tokenizer.json files."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from runtime.errors import UserError
from runtime.files import read_small, reason
from runtime.manifests import read_listed

END_OF_TEXT = "<|endoftext|>"  # id 0 in all of Pythia's data
MAX_TOKENIZER_BYTES = 2**27

# Where a text can be cut: see cut_pattern. Behind BYTE_PLACE is a character that NFC never composes with the one before
# it, and before it no added token begins, of at most 13 characters.
PLACES = (r"\S(?=[ \n])", "[A-Za-z](?=[0-9])", "[0-9](?=[A-Za-z])", "[ぁ-ゖァ-ヺ一-鿿](?=[、。，])")
BYTE_PLACE = r"[^<]{13}(?=[\x00-\x7fぁ-ゖァ-ヺ一-鿿가-힣])"


def byte_tokenizer() -> Tokenizer:
    """Build the GPT-NeoX-20B tokenizer of Pythia without its merges: one token per byte, no file needed.

    0 is <|endoftext|>, 1 is <|padding|>, 2 .. 244 are the bytes that occur in UTF-8 (all but C0, C1, F5 .. FF), sorted
    by the character that GPT-2 writes for each. Every token has the same id in Pythia's tokenizer.
    """
    unused = {chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}  # GPT-2 writes chr(byte) for these
    tokens = [END_OF_TEXT, "<|padding|>", *sorted({*pre_tokenizers.ByteLevel.alphabet()} - unused)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(tokens[:2])
    return tokenizer


@contextmanager
def tokenizer_errors(path: str | Path) -> Iterator[None]:
    """Turn every error of the tokenizers library into a UserError that names the tokenizer.json.

    On some files its Rust code panics. That prints a report to stderr, which is hidden here, and raises a
    PanicException, which is no Exception.
    """
    sys.stderr.flush()
    with open(os.devnull, "wb") as null:
        stderr = os.dup(2)
        os.dup2(null.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            line = (str(error).splitlines() or [repr(error)])[0][:200]
            raise UserError(f"{path}: not a tokenizer.json that works ({line})") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def load_tokenizer(path: str | Path, verify: bool = False) -> Tokenizer:
    """Read a tokenizer.json. It never cuts or pads a text, whatever the file says.

    verify=True compares it with the manifest.json beside it, if there is one. Raises UserError if the file is missing,
    damaged, or not a tokenizer.json.
    """
    try:
        data = (read_listed if verify else read_small)(Path(path), MAX_TOKENIZER_BYTES)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable tokenizer.json ({reason(error)})") from None
    with tokenizer_errors(path):
        tokenizer = Tokenizer.from_str(data.decode())
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def cut_pattern(tokenizer: Tokenizer) -> re.Pattern | None:
    """Return a pattern that matches a text up to the last place where cutting it never changes its tokens; None if
    there may be no such place.

    The byte-level pre-tokenizer of GPT-2 always splits at PLACES: its pattern allows white space only at the start of a
    pre-token, and letters, digits and punctuation are never in one (but for 's and the like). NFC never composes a
    character with one of those behind the places. Added tokens must not contain a place or depend on what is beside
    them. The byte tokenizer has no merges, so no token but an added one has two characters. With other tokenizers (in
    Llama 3 punctuation keeps its newline) a document is encoded in one piece.
    """
    text = tokenizer.to_str()
    spec = json.loads(text)
    splitter, normalizer = spec["pre_tokenizer"] or {}, spec["normalizer"] or {"type": "NFC"}
    added = spec["added_tokens"]
    if (
        splitter.get("type") != "ByteLevel"
        or not splitter.get("use_regex", True)
        or splitter["add_prefix_space"]
        or normalizer["type"] != "NFC"
        or any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in added)
    ):
        return None
    places = [place for place in PLACES if not any(re.search(place, token["content"]) for token in added)]
    if text == byte_tokenizer().to_str():
        places = [BYTE_PLACE]
    return re.compile(f".*(?:{'|'.join(places)})", re.DOTALL) if places else None
