"""Text files -> documents -> pieces that are encoded alone, in memory that does not depend on what is in the files.

A place in the inputs is a part and a byte of its content. A part is a file, or in a shard what the shard has of it.
"""

import codecs
import json
import re
import stat
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import naming

CHUNK = 1 << 17  # bytes to read at once, or characters of a document to search for a cut at once
GROUP = 1 << 20  # bytes to encode at once; an encoded byte can take 200 bytes of memory
PIECE = 64  # bytes of a group that a piece counts for besides its text: each piece takes memory of its own
LONGEST_PIECE = 1 << 24  # characters
LONGEST_LINE = 1 << 28  # bytes
PACKED_CHUNK = 1 << 13  # bytes of a compressed file to read at once; they can become a thousand times as many

STDIN = Path("-")
JSON_LINES = (".jsonl", ".ndjson")
# Formats that are not read. Many are text, but their markup is not what a model is to learn by accident.
OTHER_FORMATS = re.compile(
    r"\.(json|jsonlines|csv|tsv|parquet|arrow|feather|avro|orc|npy|npz|bin|idx|db|sqlite|xz|bz2|lz4|zip|7z|rar|tar|tgz"
    r"|warc|pdf|ps|rtf|docx?|od[ts]|xlsx?|pptx?|epub)"
)


@dataclass
class Lines:
    """How JSON lines are read, and what was wrong with them."""

    key: str = "text"
    skip_bad: bool = False  # leave bad lines out
    bad: int = 0  # lines that were left out
    first_bad: str = ""  # the message for the first of them


class Part(NamedTuple):
    """The documents of a file that begin at the bytes start .. stop - 1 of its content; stop = None: to its end."""

    path: Path
    start: int = 0
    stop: int | None = None

    @property
    def bytes(self) -> int:
        """How much of the file is read, nearly: a compressed file is always read from its beginning."""
        size = self.path.stat().st_size
        return size if kind(self.path)[1] else (size if self.stop is None else self.stop) - self.start


class End(NamedTuple):
    """The place behind a document, and how many bad lines come before it."""

    part: int
    byte: int
    bad: int


def kind(path: Path) -> tuple[str, str]:
    """Return the ending of a file without that of its compression, and that one: a.JSONL.gz -> (".jsonl", ".gz").

    Stdin has JSON lines. An ending that does not name another format means UTF-8 text. Raises UserError for the others.
    """
    name = path.name.lower()
    packing = next((end for end in (".zst", ".gz") if name.endswith(end)), "")
    ending = ".jsonl" if path == STDIN else Path(name.removesuffix(packing)).suffix
    if OTHER_FORMATS.fullmatch(ending):
        raise UserError(f"{path}: {ending} files are not read; convert it to .jsonl or .txt")
    if packing and not ending:
        raise UserError(f"{path}: the name does not say what is in it; rename it to .jsonl{packing} or .txt{packing}")
    return ending, packing


def check_inputs(paths: list[Path]) -> bool:
    """Return whether all inputs are files, which can be read twice; pipes cannot. Raises UserError if one is neither,
    or of a format that is not read."""
    files = True
    for path in paths:
        kind(path)
        if path == STDIN:
            if sys.stdin is None:  # descriptor 0 would be one of our own files
                raise UserError("-: stdin is closed; give it JSON lines")
            files = False
            continue
        try:
            if path.is_dir():
                raise UserError(f"{path} is a directory; name the files in it")
            if not path.exists():
                raise UserError(f"{path}: no such file")
            files &= stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    return files


def parts_of(paths: list[Path], share: tuple[int, int]) -> list[Part]:
    """Return the parts of shard k of n of all inputs together; (0, 1) has all.

    A shard is a range of bytes of the files as they are. A line of a .jsonl that is not compressed belongs to the shard
    in which it begins, every other file to the shard that has its first byte.
    """
    if share == (0, 1):
        return [Part(path) for path in paths]
    k, n = share
    sizes = [path.stat().st_size for path in paths]
    begin, end = sum(sizes) * k // n, sum(sizes) * (k + 1) // n  # of the shard
    found, first = [], 0  # first: byte of the file in all inputs
    for path, size in zip(paths, sizes):
        ending, packing = kind(path)
        if ending in JSON_LINES and not packing:
            start, stop = (first_line(path, min(max(cut - first, 0), size)) for cut in (begin, end))
            found += [Part(path, start, stop)] * (start < stop)
        elif begin <= first < end:
            found.append(Part(path))
        first += size
    return found


def first_line(path: Path, byte: int) -> int:
    """Return where the first line begins that begins at `byte` or behind it; the size of the file if none does."""
    if byte == 0:
        return 0
    with naming(path), open(path, "rb") as file:
        file.seek(byte - 1)  # if it ends a line, the next one begins at `byte`
        while block := file.read(CHUNK):
            if (end := block.find(b"\n")) >= 0:
                return file.tell() - len(block) + end + 1
        return file.tell()


def read_blocks(path: Path, start: int, bar: tqdm) -> Iterator[bytes]:
    """Yield the bytes of a file or pipe in blocks. Moves the bar. Raises OSError."""
    size = PACKED_CHUNK if kind(path)[1] else CHUNK
    with naming(path), open(0 if path == STDIN else path, "rb", closefd=path != STDIN) as file:
        if start:
            file.seek(start)
        # read1 does not wait until a pipe has given `size` bytes, so Ctrl-C is seen between two reads.
        for block in iter(lambda: file.read1(size), b""):
            bar.update(len(block))
            yield block


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
                content = frame.decompress(block)
                for start in range(0, len(content), CHUNK):
                    yield content[start : start + CHUNK]
                block = frame.unused_data
                frame = None if frame.eof else frame
    except damage as error:
        raise UserError(f"{path}: damaged near byte {position} ({error}); fetch it again") from None
    if frame:
        raise UserError(f"{path}: truncated, its last part does not end; fetch it again")


def read_content(path: Path, start: int, bar: tqdm) -> Iterator[bytes]:
    """Yield the content of a file, compressed or not, from byte `start`."""
    if not kind(path)[1]:
        yield from read_blocks(path, start, bar)
        return
    for block in unpack(path, read_blocks(path, 0, bar)):
        if start < len(block):
            yield block[start:]
        start = max(start - len(block), 0)


def split_lines(blocks: Iterable[bytes]) -> Iterator[tuple[bytearray | None, int]]:
    """Yield the lines of a text that comes in blocks, and their bytes with the newline. The reader may clear a line.

    A line of more than LONGEST_LINE bytes is not kept: None.
    """
    line, size = bytearray(), 0
    for block in blocks:
        for number, part in enumerate(block.split(b"\n")):
            if number:
                yield (line if size <= LONGEST_LINE else None), size + 1
                line, size = bytearray(), 0
            size += len(part)
            if size <= LONGEST_LINE:
                line += part
            else:
                line.clear()
    yield (line if size <= LONGEST_LINE else None), size


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


def json_texts(part: Part, lines: Iterable[tuple[bytearray | None, int]], how: Lines) -> Iterator[tuple[str, int]]:
    """Yield the texts of JSON lines, and the byte behind each line. Counts the bad lines in `how`, or raises UserError
    for the first."""
    number, begin, end = 0, 0, part.start
    for line, size in lines:
        number, begin, end = number + 1, end, end + size
        if part.stop is not None and begin >= part.stop:
            return
        if begin == 0 and line and line.startswith(codecs.BOM_UTF8):
            del line[: len(codecs.BOM_UTF8)]
        if line is not None and (not line or line.isspace()):
            continue
        try:
            decoded = line.decode()
            line.clear()  # a line can be large
            text = json.loads(decoded)[how.key]
            if not text.isascii():
                for start in range(0, len(text), CHUNK):
                    text[start : start + CHUNK].encode()  # fails for half of a surrogate pair, which json accepts
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            place = f"line {number}" if part.start == 0 else f"the line at byte {begin}"
            wrong = f'{part.path}: {place} is not {{{json.dumps(how.key)}: "..."}} in UTF-8'
            if line is None:
                wrong = f"{part.path}: {place} has more than {LONGEST_LINE:,} bytes"
            if not how.skip_bad:
                raise UserError(f"{wrong}; correct it, or see --text-key and --skip-bad") from None
            how.bad += 1
            how.first_bad = how.first_bad or wrong
        else:
            del decoded
            yield text, end


def documents(number: int, part: Part, bar: tqdm, how: Lines) -> Iterator[tuple[Iterable[str], End]]:
    """Yield the documents of a part, each as chunks of text, and where they end."""
    content = read_content(part.path, part.start, bar)
    if kind(part.path)[0] not in JSON_LINES:
        yield decode(part.path, content), End(number + 1, 0, how.bad)
        return
    for text, byte in json_texts(part, split_lines(content), how):
        yield (text[start : start + CHUNK] for start in range(0, len(text), CHUNK)), End(number, byte, how.bad)


def pieces(path: Path, chunks: Iterable[str], cut: re.Pattern | None) -> Iterator[tuple[str, bool]]:
    """Yield a document as (piece, whether it is the last piece); nothing if the document is empty. See cut_pattern."""
    uncut, last, length = [], "", 0  # `last` is searched for a cut only when more text follows
    for chunk in chunks:
        if cut and (match := cut.match(last)):
            yield "".join([*uncut, match[0]]), False
            uncut, last, length = [], last[match.end() :], len(last) - match.end()
        uncut.append(last)
        last, length = chunk, length + len(chunk)
        if length > LONGEST_PIECE:
            raise UserError(
                f"{path}: a document has more than {LONGEST_PIECE:,} characters without a place where a cut never"
                " changes its tokens, for example white space after a word; split it"
            )
    if text := "".join([*uncut, last]):
        yield text, True


def groups(
    parts: list[Part], begin: End, cut: re.Pattern | None, how: Lines, total: int | None
) -> Iterator[list[tuple[str, End | None]]]:
    """Yield the pieces of all documents from `begin` on, in groups of about GROUP bytes; the last piece of a document
    with its end. A progress bar counts the bytes read, of `total`."""
    group, size = [], 0
    todo = [part._replace(start=max(begin.byte, part.start)) for part in parts[begin.part : begin.part + 1]]
    todo += parts[begin.part + 1 :]
    done = 0 if total is None else total - sum(part.bytes for part in todo)
    with tqdm(total=total, initial=done, unit="B", unit_scale=True, desc="preparing", disable=None, leave=False) as bar:
        for number, part in enumerate(todo, begin.part):
            for chunks, end in documents(number, part, bar, how):
                for piece, last in pieces(part.path, chunks, cut):
                    group.append((piece, end if last else None))
                    size += len(piece) * (1 if piece.isascii() else 3) + PIECE
                    if size >= GROUP:
                        yield group
                        group, size = [], 0
    yield group
