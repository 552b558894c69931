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
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Encoding
from tqdm import tqdm

from corpus.indexed import DTYPES, HEADER, MAGIC, IndexedTokens
from corpus.tokenizer import END_OF_TEXT, byte_tokenizer, can_cut, load_tokenizer, tokenizer_errors
from runtime.errors import UserError, printable
from runtime.files import atomic_write

CHUNK = 1 << 17  # bytes to read at once, or characters of a document to search for a cut at once
GROUP = 1 << 20  # characters to encode at once; an encoded character can take 100 bytes of memory
INDEX_BLOCK = 1 << 20  # documents
PACKED_CHUNK = 1 << 13  # bytes of a compressed file to read at once; they can become a thousand times as many

STDIN = Path("-")
JSON_LINES = (".jsonl", ".ndjson")
# Formats that are not read. Many are text, but their markup is not what a model is to learn by accident.
OTHER_FORMATS = {
    ".json",
    ".jsonlines",
    ".csv",
    ".tsv",
    ".parquet",
    ".arrow",
    ".feather",
    ".avro",
    ".orc",
    ".npy",
    ".npz",
}
OTHER_FORMATS |= {
    ".bin",
    ".idx",
    ".db",
    ".sqlite",
    ".xz",
    ".bz2",
    ".lz4",
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".warc",
}
OTHER_FORMATS |= {".pdf", ".ps", ".rtf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".ods", ".ppt", ".pptx", ".epub"}

DEMO_PREFIX = Path("runs/demo")
DEMO_BYTES = 8_000_000
# Tests, packages of others, modules that some installations lack, and long generated tables.
DEMO_WITHOUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
DEMO_WITHOUT |= {"encodings", "pydoc_data", "__pycache__"}


@dataclass
class Lines:
    """How JSON lines are read, and what was wrong with them."""

    key: str = "text"
    skip_bad: bool = False  # leave bad lines out
    bad: int = 0  # lines that were left out
    first_bad: str = ""  # the message for the first of them


def kind(path: Path) -> tuple[str, str]:
    """Return the ending of a file without that of its compression, and that one: a.JSONL.gz -> (".jsonl", ".gz").

    Stdin has JSON lines. An ending that does not name another format means UTF-8 text. Raises UserError for the others.
    """
    name = path.name.lower()
    packing = next((end for end in (".zst", ".gz") if name.endswith(end)), "")
    ending = ".jsonl" if path == STDIN else Path(name.removesuffix(packing)).suffix
    if ending in OTHER_FORMATS:
        raise UserError(f"{path}: {ending} files are not read; convert it to .jsonl or .txt")
    if packing and not ending:
        raise UserError(f"{path}: the name does not say what is in it; rename it to .jsonl{packing} or .txt{packing}")
    return ending, packing


def read_blocks(path: Path, bar: tqdm) -> Iterator[bytes]:
    """Yield the bytes of a file or pipe in blocks. Moves the bar."""
    size = PACKED_CHUNK if kind(path)[1] else CHUNK
    try:
        with open(0 if path == STDIN else path, "rb", closefd=path != STDIN) as file:
            # read1 does not wait until a pipe has given `size` bytes, so Ctrl-C is seen between two reads.
            for block in iter(lambda: file.read1(size), b""):
                bar.update(len(block))
                yield block
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None


def unpack(path: Path, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the content of a .zst or .gz file. It may have any number of frames (.gz: members).

    The decompressors for files are not used: that of zstandard ignores a truncated end.
    """
    if kind(path)[1] == ".gz":
        new, damage = partial(zlib.decompressobj, wbits=31), zlib.error  # 31: with the header and checksum of gzip
    else:
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{path}: reading .zst needs the package zstandard; pip install zstandard") from None
        new, damage = zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError
    frame, position = None, 0
    try:
        for block in blocks:
            position += len(block)
            while block:
                frame = frame or new()
                if content := frame.decompress(block):
                    yield content
                block = frame.unused_data
                frame = None if frame.eof else frame
    except damage as error:
        raise UserError(f"{path}: damaged near byte {position} ({error}); fetch it again") from None
    if frame:
        raise UserError(f"{path}: truncated, its last part does not end; fetch it again")


def split_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a text that comes in blocks."""
    begun = []  # parts of the current line
    for block in blocks:
        first, *others = block.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    yield b"".join(begun)


def decode(path: Path, blocks: Iterable[bytes]) -> Iterator[str]:
    """Yield the text of a file in chunks, without a byte order mark at its beginning."""
    decoder, start, mark = codecs.getincrementaldecoder("utf-8")(), 0, "\ufeff"
    for block in chain(blocks, [b""]):  # the empty block ends the text
        if start == 0 and b"\0" in block:
            raise UserError(f"{path}: has NUL bytes, so it is not UTF-8 text; convert it to .jsonl or .txt")
        pending = len(decoder.getstate()[0])  # bytes of a character that began in the last block
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {start - pending + error.start} is not UTF-8; convert the file") from None
        start += len(block)
        if text:
            yield text.removeprefix(mark)
            mark = ""


def json_texts(path: Path, lines: Iterable[bytes], how: Lines) -> Iterator[str]:
    """Yield the texts of JSON lines. Counts the bad lines in `how`, or raises UserError for the first."""
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())[how.key]
            text.encode()  # fails for half of a surrogate pair, which json accepts
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            wrong = f'{path}: line {number} is not {{{json.dumps(how.key)}: "..."}} in UTF-8'
            if not how.skip_bad:
                raise UserError(f"{wrong}; correct it, or see --text-key and --skip-bad") from None
            how.bad += 1
            how.first_bad = how.first_bad or wrong
        else:
            yield text


def documents(path: Path, bar: tqdm, how: Lines) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as chunks of text."""
    ending, packing = kind(path)
    blocks = read_blocks(path, bar)
    content = unpack(path, blocks) if packing else blocks
    if ending not in JSON_LINES:
        yield decode(path, content)
        return
    for text in json_texts(path, split_lines(content), how):
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


def groups(inputs: list[Path], cut: bool, how: Lines) -> Iterator[list[tuple[str, bool]]]:
    """Yield the pieces of all documents in groups of about GROUP characters. A progress bar counts the bytes read."""
    group, characters = [], 0
    total = None if STDIN in inputs else sum(path.stat().st_size for path in inputs)
    with tqdm(total=total, unit="B", unit_scale=True, desc="preparing", disable=None, leave=False) as bar:
        for path in inputs:
            for piece, last in chain.from_iterable(pieces(document, cut) for document in documents(path, bar, how)):
                group.append((piece, last))
                characters += len(piece)
                if characters >= GROUP:
                    yield group
                    group, characters = [], 0
    yield group


def write_tokens(
    bin: BinaryIO,
    idx: BinaryIO,
    encode: Callable[[list[str]], list[Encoding]],
    pieces_in_groups: Iterable[list[tuple[str, bool]]],
    dtype: np.dtype,
) -> int:
    """Encode the pieces into a .bin and an .idx. Returns the number of documents."""
    idx.write(bytes(HEADER.size))
    size = 0  # tokens of the current document, which may have begun in an earlier group
    for group in pieces_in_groups:
        encoded = encode([piece for piece, _ in group])
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
    inputs: list[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
) -> IndexedTokens:
    """Write the inputs as PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json, where PREFIX is `out`. Returns the data set.

    inputs     .jsonl, .ndjson and - (stdin): one document per line, {"text": ...}. Files of another format (see
               OTHER_FORMATS) are refused. Any other file is one document of UTF-8 text. All may end in .zst or .gz too.
               Endings may be in upper case
    tokenizer  a tokenizer.json with <|endoftext|> as id 0; None: byte_tokenizer()
    workers    threads that encode; None: one per core
    text_key   where the text of a JSON line is
    skip_bad   leave bad JSON lines out, and print how many there were to stderr

    Empty documents are left out. The files appear when they are complete, the index last; nothing is overwritten.
    Raises UserError for unusable arguments and inputs.
    """
    if str(out).endswith("/") or Path(out).name in ("", ".."):
        raise UserError(f"--out {out} is a directory; give a prefix in it, for example {Path(out) / 'corpus'}")
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
    vocab = max(encoder.get_vocab().values()) + 1
    dtype = np.dtype("<u2" if vocab < 65500 else "<i4")  # the rule of GPT-NeoX v1.0
    how = Lines(text_key, skip_bad)

    def encode(texts: list[str]) -> list[Encoding]:
        with tokenizer_errors(tokenizer or tokenizer_path):
            return encoder.encode_batch_fast(texts, add_special_tokens=False)

    with new_directory(idx_path.parent):
        # The index is opened first and so renamed last.
        with atomic_write(idx_path, "w+b") as idx, atomic_write(bin_path) as bin, atomic_write(tokenizer_path) as copy:
            copy.write(text.encode())
            if not write_tokens(bin, idx, encode, groups(inputs, can_cut(encoder), how), dtype):
                bad = f" ({how.bad:,} bad lines; {how.first_bad})" if how.bad else ""
                raise UserError(f"{', '.join(map(str, inputs))}: no text in there{bad}; nothing was written")
            for file in (idx, bin, copy):  # if the disk is full, fail before the first file is renamed
                file.flush()
                os.fsync(file.fileno())
    if how.bad:
        print(printable(f"left out {how.bad:,} bad lines; {how.first_bad}"), file=sys.stderr)
    return IndexedTokens(out)


@contextmanager
def new_directory(path: Path) -> Iterator[None]:
    """Create a directory for the block; if the block fails, remove what was created. OSError becomes UserError."""
    created = [directory for directory in (path, *path.parents) if not os.path.lexists(directory)]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        for directory in created:
            with suppress(OSError):  # another process has put files there
                directory.rmdir()
        if isinstance(error, FileExistsError):
            raise UserError(f"{error.filename} is not a directory; choose another --out") from None
        if isinstance(error, OSError):
            raise UserError(f"{error.filename or path}: {error.strerror}; nothing was written") from None
        raise


def check_paths(inputs: list[Path], outputs: list[Path]) -> None:
    """Raise UserError if an output exists, or if an input is not a file (or a pipe) of a format that is read."""
    for path in outputs:
        if os.path.lexists(path):  # unlike Path.exists, it raises nothing; an unusable path fails when it is opened
            raise UserError(f"{path} exists; choose another --out or delete it")
    for path in inputs:
        kind(path)
        if path == STDIN:
            if sys.stdin is None:  # descriptor 0 would be one of our own files
                raise UserError("-: stdin is closed; give it JSON lines")
            continue
        try:
            if path.is_dir():
                raise UserError(f"{path} is a directory; name the files in it")
            if not path.exists():
                raise UserError(f"{path}: no such file")
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; nothing was written") from None


def demo() -> Path:
    """Return the prefix of the demo corpus, and build it at the first use.

    It is the source code of this Python's standard library: real text that every machine has, one token per byte, one
    document per file. Raises UserError if the source code is missing or the corpus cannot be written.
    """
    prefix = DEMO_PREFIX
    if os.path.lexists(f"{prefix}.idx"):
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
    prepare(inputs, prefix)
    return prefix
