"""Text -> PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json, in memory that does not depend on the amount of text.

How text travels: file -> documents -> chunks of a document -> pieces, cut where no token can cross -> groups of pieces,
encoded on all cores -> ids. Id 0 (<|endoftext|>) follows each document, as in Pythia's data; nothing precedes it.
"""

import codecs
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from corpus.indexed import DTYPES, HEADER, MAGIC, IndexedTokens
from corpus.tokenizer import END_OF_TEXT, byte_tokenizer, can_cut, load_tokenizer
from runtime.errors import UserError
from runtime.files import atomic_write

CHUNK = 1 << 17  # bytes to read at once, or characters of a document to search for a cut at once
GROUP = 1 << 20  # characters to encode at once; an encoded character can take 100 bytes of memory
INDEX_BLOCK = 1 << 20  # documents

DEMO_BYTES = 8_000_000
# Tests, packages of others, modules that some installations lack, and long generated tables.
DEMO_WITHOUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
DEMO_WITHOUT |= {"encodings", "pydoc_data", "__pycache__"}


def read_blocks(path: Path, bar: tqdm) -> Iterator[bytes]:
    """Yield the lines of a .jsonl file, or of another file or pipe up to CHUNK bytes at a time. Moves the bar."""
    with open(path, "rb") as file:
        # read1 does not wait until a pipe has given CHUNK bytes, so Ctrl-C is seen between two reads.
        for block in file if path.name.endswith(".jsonl") else iter(lambda: file.read1(CHUNK), b""):
            bar.update(len(block))
            yield block


def zst_lines(path: Path, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a .zst file with any number of frames. (zstandard's own reader ignores a truncated end.)"""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: reading .zst needs the package zstandard; pip install zstandard") from None
    rest, frame, position = b"", None, 0
    try:
        for block in blocks:
            position += len(block)
            while block:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                *lines, rest = (rest + frame.decompress(block)).split(b"\n")
                yield from lines
                block = frame.unused_data
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged near byte {position} ({error}); fetch it again") from None
    if frame:
        raise UserError(f"{path}: truncated, the last frame does not end; fetch it again")
    yield rest


def decode(path: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of a file in chunks."""
    decoder, start = codecs.getincrementaldecoder("utf-8")(), 0
    for block in chain(blocks, [b""]):  # the empty block ends the text
        pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {start - pending + error.start} is not UTF-8; convert the file") from None
        start += len(block)


def documents(path: Path, bar: tqdm) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as chunks of text."""
    blocks = read_blocks(path, bar)
    if not path.name.endswith((".jsonl", ".jsonl.zst")):
        yield decode(path, blocks)
        return
    for number, line in enumerate(zst_lines(path, blocks) if path.suffix == ".zst" else blocks, 1):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()  # fails for half of a surrogate pair, which json accepts
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{path}: line {number} is not {{"text": "..."}} in UTF-8; correct or remove it') from None
        yield (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


def pieces(chunks: Iterable[str], cut: bool) -> Iterator[tuple[str, bool]]:
    """Yield a document as (piece, whether it is the last piece); nothing if the document is empty."""
    uncut, last = [], ""  # `last` is searched for a cut only when more text follows
    for chunk in chunks:
        if cut and (match := re.match(r".*\S(?=[ \n])", last, re.DOTALL)):
            yield "".join([*uncut, match[0]]), False
            uncut, last = [], last[match.end() :]
        uncut.append(last)
        last = chunk
    if text := "".join([*uncut, last]):
        yield text, True


def groups(inputs: list[Path], cut: bool) -> Iterator[list[tuple[str, bool]]]:
    """Yield the pieces of all documents in groups of about GROUP characters. A progress bar counts the bytes read."""
    group, characters = [], 0
    total = sum(path.stat().st_size for path in inputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None, leave=False) as bar:
        for path in inputs:
            for piece, last in chain.from_iterable(pieces(document, cut) for document in documents(path, bar)):
                group.append((piece, last))
                characters += len(piece)
                if characters >= GROUP:
                    yield group
                    group, characters = [], 0
    yield group


def write_tokens(bin: BinaryIO, idx: BinaryIO, tokenizer: Tokenizer, inputs: list[Path], dtype: np.dtype) -> int:
    """Encode all inputs into a .bin and an .idx. Returns the number of documents."""
    idx.write(bytes(HEADER.size))
    size = 0  # tokens of the current document, which may have begun in an earlier group
    for group in groups(inputs, can_cut(tokenizer)):
        encoded = tokenizer.encode_batch_fast([piece for piece, _ in group], add_special_tokens=False)
        sizes = []
        for (_, last), encoding in zip(group, encoded):
            ids = np.array(encoding.ids + [0] * last, dtype)
            bin.write(ids.tobytes())
            size += len(ids)
            if last:
                sizes.append(size)
                size = 0
        if max(sizes, default=0) > 2**31 - 1:
            raise UserError(f"a document of {max(sizes)} tokens is too long for the format; split it")
        idx.write(np.array(sizes, "<i4").tobytes())
    return finish_index(idx, dtype)


def finish_index(file: BinaryIO, dtype: np.dtype) -> int:
    """Complete an .idx that has space for the header, then the sizes. Returns the number of documents.

    Each document is one sequence, so the marks are 0 .. n. Works in blocks, because the sizes may not fit into memory.
    """
    n = (file.seek(0, os.SEEK_END) - HEADER.size) // 4
    begin = 0  # byte of the .bin
    for start in range(0, n, INDEX_BLOCK):
        file.seek(HEADER.size + 4 * start)
        lengths = np.frombuffer(file.read(4 * min(INDEX_BLOCK, n - start)), "<i4") * np.int64(dtype.itemsize)
        file.seek(HEADER.size + 4 * n + 8 * start)
        file.write((begin + np.cumsum(lengths) - lengths).tobytes())
        file.seek(HEADER.size + 12 * n + 8 * start)
        file.write(np.arange(start, start + len(lengths) + 1, dtype="<i8").tobytes())  # + 1: the mark n of the end
        begin += int(lengths.sum())
    code = next(code for code, known in DTYPES.items() if known == dtype)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
    return n


def prepare(
    inputs: list[str | Path], out: str | Path, tokenizer: str | Path | None = None, workers: int | None = None
) -> IndexedTokens:
    """Write the inputs as PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json, where PREFIX is `out`. Returns the data set.

    inputs     .jsonl and .jsonl.zst files have one {"text": ...} per line; any other file is one document
    tokenizer  a tokenizer.json with <|endoftext|> as id 0; None: byte_tokenizer()
    workers    threads that encode; None: one per core

    Empty documents are left out. The files appear when they are complete, the index last; nothing is overwritten.
    Raises UserError for unusable arguments and inputs.
    """
    inputs = [Path(path) for path in inputs]
    outputs = tokenizer_path, bin_path, idx_path = [Path(f"{out}{end}") for end in (".tokenizer.json", ".bin", ".idx")]
    check_paths(inputs, outputs)
    if workers is not None:
        if workers < 1:
            raise UserError(f"--workers {workers} must be at least 1")
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # tokenizers reads it when it first encodes in this process

    encoder = load_tokenizer(tokenizer) if tokenizer else byte_tokenizer()
    if encoder.id_to_token(0) != END_OF_TEXT:
        raise UserError(f"{tokenizer}: id 0 is {encoder.id_to_token(0)!r}, but documents end with {END_OF_TEXT} = 0")
    text = Path(tokenizer).read_text(encoding="utf-8") if tokenizer else encoder.to_str()
    encoder.no_padding()
    encoder.no_truncation()
    vocab = max(encoder.get_vocab().values()) + 1
    dtype = np.dtype("<u2" if vocab < 65500 else "<i4")  # the rule of GPT-NeoX v1.0

    try:
        # The index is opened first and so renamed last.
        with atomic_write(idx_path, "w+b") as idx, atomic_write(bin_path) as bin, atomic_write(tokenizer_path) as copy:
            copy.write(text.encode())
            if not write_tokens(bin, idx, encoder, inputs, dtype):
                raise UserError(f"{', '.join(map(str, inputs))}: no text in there; nothing was written")
            for file in (idx, bin, copy):  # if the disk is full, fail before the first file is renamed
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; nothing was written") from None
    return IndexedTokens(out)


def check_paths(inputs: list[Path], outputs: list[Path]) -> None:
    """Raise UserError if an output exists or has no directory, or if an input is not a file (or a pipe)."""
    for path in outputs:
        if path.exists():
            raise UserError(f"{path} exists; choose another --out or delete it")
    if not outputs[0].parent.is_dir():
        raise UserError(f"{outputs[0].parent} is not a directory; create it first")
    for path in inputs:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it")
        if not path.exists():
            raise UserError(f"{path}: no such file")


def demo() -> Path:
    """Return the prefix of the demo corpus, and build it at the first use.

    It is the source code of this Python's standard library: real text that every machine has, one token per byte, one
    document per file. Raises UserError if the source code is missing or the corpus cannot be written.
    """
    prefix = Path("runs/demo")
    if Path(f"{prefix}.idx").exists():
        return prefix
    library = Path(sysconfig.get_paths()["stdlib"])
    inputs, size = [], 0
    for path in sorted(library.rglob("*.py")):
        if DEMO_WITHOUT.isdisjoint(path.relative_to(library).parts) and size < DEMO_BYTES:
            try:
                size += len(path.read_text(encoding="utf-8").encode())
            except (UnicodeDecodeError, OSError):
                continue
            inputs.append(path)
    if size < 1_000_000:
        raise UserError(f"{library}: no source of Python's standard library for the demo corpus; give --data PREFIX")
    print(f"building {prefix}: {len(inputs)} files of Python's standard library, {size / 1e6:.1f} MB", file=sys.stderr)
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{prefix.parent}: {error.strerror}; the demo corpus is built there") from None
    prepare(inputs, prefix)
    return prefix
