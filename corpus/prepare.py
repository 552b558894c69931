"""Text -> PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json, on one machine or in shards on many.

How text travels: file -> documents -> chunks of a document -> pieces, cut where no token can cross -> groups of pieces,
encoded on all cores -> ids. Id 0 (<|endoftext|>) follows each document, as in Pythia's data; nothing precedes it. As in
GPT-NeoX, an <|endoftext|> in the text itself becomes id 0 too.

Until all is complete, the files lie in PREFIX.preparing/. Every minute progress.json there records what is on the disk,
so that the same command goes on after a kill, to the same bytes.
"""

import hashlib
import json
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tokenizers import Encoding, Tokenizer

from corpus.documents import End, Lines, check_inputs, groups, parts_of
from corpus.indexed import DTYPES, HEADER, MAGIC, IndexedTokens
from corpus.tokenizer import (
    END_OF_TEXT,
    MAX_TOKENIZER_BYTES,
    byte_tokenizer,
    cut_pattern,
    load_tokenizer,
    tokenizer_errors,
)
from runtime.errors import UserError, printable
from runtime.files import atomic_write, flush, read_small, reason
from runtime.run_directory import DAMAGE, lock

INDEX_BLOCK = 1 << 20  # documents
SAVE_SECONDS = 60  # between two records of the progress
ENDINGS = (".tokenizer.json", ".bin", ".idx")  # the index is complete last

DEMO_PREFIX = Path("runs/demo")
DEMO_BYTES = 8_000_000
# Tests, packages of others, modules that some installations lack, and long generated tables.
DEMO_WITHOUT = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "ensurepip"}
DEMO_WITHOUT |= {"encodings", "pydoc_data", "__pycache__"}


@dataclass
class Progress:
    """What of a data set is on the disk: the documents up to a place in the inputs, or all, with the index complete."""

    bin_bytes: int = 0
    documents: int = 0
    end: End = field(default_factory=lambda: End(0, 0, 0))
    first_bad: str = ""
    complete: bool = False


class WorkDirectory:
    """PREFIX.preparing: the files of a data set that is not complete, and progress.json.

    job  what the data set depends on, as JSON; None: the inputs cannot be read twice, so nothing is recorded
    """

    def __init__(self, out: str | Path, job: dict | None):
        self.path, self.job = Path(f"{out}.preparing"), job
        self.record = self.path / "progress.json"
        self.outputs = [Path(f"{out}{ending}") for ending in ENDINGS]
        self.files = [self.path / path.name for path in self.outputs]

    @contextmanager
    def locked(self) -> Iterator[Progress]:
        """Lock the directory for the block, and remove it afterwards, unless the block fails with progress recorded.

        Yields the progress of an earlier run. Raises UserError as `read`.
        """
        with lock(self.path) as check:
            check()
            progress = None
            try:
                yield (progress := self.read())
            except BaseException as error:
                if not self.record.exists():
                    self.remove()
                elif progress:
                    note = f"note: {self.path} keeps what is done; the same command goes on from there"
                    print(printable(note), file=sys.stderr)
                    if isinstance(error, OSError):
                        raise UserError(f"{error.filename or self.path}: {error.strerror}") from None
                raise
            self.remove()

    def remove(self) -> None:
        """Remove the directory, but no file that others have put there."""
        for path in [*self.files, self.record, *self.path.glob(".progress.json.*.tmp"), self.path / ".lock"]:
            with suppress(OSError):
                path.unlink()
        with suppress(OSError):
            self.path.rmdir()

    def read(self) -> Progress:
        """Return the recorded progress. Raises UserError if it is that of another command, or if an output exists."""
        progress = Progress()
        if self.record.exists():
            try:
                stored = json.loads(read_small(self.record, 1 << 26))
                progress = Progress(**stored["progress"] | {"end": End(*map(int, stored["progress"]["end"]))})
                job = stored["job"]
                other = [name for name in (self.job or {"input": None}) if job[name] != (self.job or {}).get(name)]
                sizes = [path.stat().st_size for path in self.files[1:] if not progress.complete]
                if not all(0 <= kept <= size for kept, size in zip(self.lengths(progress), sizes)):
                    raise ValueError("the files beside it are shorter than it says")
            except (OSError, *DAMAGE) as error:
                problem = f"{self.record} is damaged ({reason(error)}); delete {self.path} to start from the beginning"
                raise UserError(problem) from None
            if other:
                raise UserError(
                    f"{self.path} keeps what another command has done (--{', --'.join(other)} differ, or the files have"
                    " changed): repeat that command, choose another --out, or delete that directory"
                )
            print(printable(f"{self.path}: going on after {progress.documents:,} documents"), file=sys.stderr)
        for path, file in zip(self.outputs, self.files):
            # unlike Path.exists, lexists raises nothing; an unusable path fails when it is opened
            if os.path.lexists(path) and not (progress.complete and not file.exists()):
                raise UserError(f"{path} exists; choose another --out or delete it")
        return progress

    def lengths(self, progress: Progress) -> list[int]:
        """Return how many bytes of the .bin and of the .idx are recorded."""
        return [progress.bin_bytes, HEADER.size + 4 * progress.documents]

    @contextmanager
    def opened(self, progress: Progress) -> Iterator[list[BinaryIO]]:
        """Open the .bin and the .idx behind what is recorded; what a killed process wrote there goes."""
        with ExitStack() as stack:
            files = []
            for path, length in zip(self.files[1:], self.lengths(progress)):
                path.touch()
                files.append(stack.enter_context(open(path, "r+b")))
                files[-1].truncate(length)  # of a new .idx: the space for the header
                files[-1].seek(length)
            yield files

    def save(self, progress: Progress) -> None:
        """Flush the files to the disk and record the progress. Raises OSError."""
        for path in self.files:
            flush(path)
        if self.job:
            with atomic_write(self.record, "w") as file:
                json.dump({"job": self.job, "progress": asdict(progress)}, file)

    def complete(self, progress: Progress, dtype: np.dtype) -> None:
        """Complete the index. Raises OSError."""
        with open(self.files[2], "r+b") as idx:
            finish_index(idx, dtype)
        progress.complete = True
        self.save(progress)

    def publish(self) -> None:
        """Give the complete files their names. A kill can have come after some of them. Raises OSError."""
        for file, path in zip(self.files, self.outputs):
            if file.exists():
                file.rename(path)
        flush(self.outputs[0].parent)


def write_tokens(
    work: WorkDirectory,
    progress: Progress,
    batches: Iterable[list[tuple[str, End | None]]],
    encode: Callable[[list[str]], list[Encoding]],
    dtype: np.dtype,
    how: Lines,
) -> None:
    """Encode groups of pieces into the .bin, and the sizes of their documents into the .idx."""
    size, saved = 0, time.monotonic()  # tokens of the current document, which may have begun in an earlier group
    with work.opened(progress) as (bin, idx):
        for group in batches:
            sizes = []
            for (_, end), encoding in zip(group, encode([piece for piece, _ in group])):
                ids = np.array(encoding.ids + [0] * bool(end), dtype)
                bin.write(ids.tobytes())
                size += len(ids)
                if end:
                    sizes.append(size)
                    size, progress.end = 0, end
            if max(sizes, default=0) > 2**31 - 1:
                raise UserError(f"a document of {max(sizes)} tokens is too long for the format; split it")
            idx.write(np.array(sizes, "<i4").tobytes())
            progress.bin_bytes += sum(sizes) * dtype.itemsize
            progress.documents += len(sizes)
            if work.job and sizes and time.monotonic() - saved > SAVE_SECONDS:
                bin.flush()
                idx.flush()
                progress.first_bad = how.first_bad if progress.end.bad else ""
                work.save(progress)
                saved = time.monotonic()
    progress.end, progress.first_bad = progress.end._replace(bad=how.bad), how.first_bad


def finish_index(file: BinaryIO, dtype: np.dtype) -> None:
    """Complete an .idx that has space for the header, then the sizes.

    Each document is one sequence, so the marks are 0 .. n. Works in blocks, because the sizes may not fit into memory.
    """
    n = (file.seek(0, os.SEEK_END) - HEADER.size) // 4
    begin = 0  # byte of the .bin
    for start in range(0, max(n, 1), INDEX_BLOCK):
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


def open_encoder(path: str | Path | None) -> tuple[Tokenizer, bytes, np.dtype]:
    """Return a tokenizer, its tokenizer.json and the dtype of its tokens. Raises UserError if its id 0 is another."""
    encoder = load_tokenizer(path) if path else byte_tokenizer()
    if encoder.id_to_token(0) != END_OF_TEXT:
        raise UserError(f"{path}: id 0 is {encoder.id_to_token(0)!r}, but documents end with {END_OF_TEXT} = 0")
    text = Path(path).read_bytes() if path else encoder.to_str().encode()
    vocab = max(encoder.get_vocab().values()) + 1
    return encoder, text, np.dtype("<u2" if vocab < 65500 else "<i4")  # the rule of GPT-NeoX v1.0


def check_out(out: str | Path) -> None:
    if str(out).endswith("/") or Path(out).name in ("", ".."):
        raise UserError(f"--out {out} is a directory; give a prefix in it, for example {Path(out) / 'corpus'}")


def use_workers(workers: int | None) -> None:
    if workers is not None:
        if workers < 1:
            raise UserError(f"--workers {workers} must be at least 1")
        os.environ["RAYON_NUM_THREADS"] = str(workers)  # tokenizers reads it when it first encodes in this process


def prepare(
    inputs: list[str | Path],
    out: str | Path,
    tokenizer: str | Path | None = None,
    workers: int | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
    share: tuple[int, int] = (0, 1),
) -> IndexedTokens:
    """Write the inputs as PREFIX.bin, PREFIX.idx, PREFIX.tokenizer.json, where PREFIX is `out`. Returns the data set.

    inputs     .jsonl, .ndjson and - (stdin): one document per line, {"text": ...}. Files of OTHER_FORMATS (in
               documents.py) are refused. Any other file is one document of UTF-8 text. All may end in .zst or .gz too.
               Endings may be in upper case
    tokenizer  a tokenizer.json with <|endoftext|> as id 0; None: byte_tokenizer()
    workers    threads that encode; None: one per core
    text_key   where the text of a JSON line is
    skip_bad   leave bad JSON lines out, and print how many there were to stderr
    share      (k, n): only shard k of n, counted from 0, which may have no documents; see parts_of and merge

    Empty documents are left out. The files appear when they are complete, the index last; nothing is overwritten.
    Raises UserError for unusable arguments and inputs.
    """
    check_out(out)
    inputs = [Path(path) for path in inputs]
    files = check_inputs(inputs)
    if share != (0, 1) and not files:
        raise UserError("--shard needs files as --input: the size of a pipe is not known")
    use_workers(workers)
    encoder, text, dtype = open_encoder(tokenizer)
    work = WorkDirectory(out, None)
    if files:
        work.job = {
            "input": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in inputs],
            "tokenizer": hashlib.sha256(text).hexdigest(),
            "text-key": text_key,
            "shard": [*share],
        }

    def encode(texts: list[str]) -> list[Encoding]:
        with tokenizer_errors(tokenizer or work.outputs[0]):
            return encoder.encode_batch_fast(texts, add_special_tokens=False)

    with new_directory(work.path.parent), work.locked() as progress:
        if not progress.complete:
            work.files[0].write_bytes(text)
            how, parts = Lines(text_key, skip_bad, progress.end.bad, progress.first_bad), parts_of(inputs, share)
            total = sum(part.bytes for part in parts) if files else None
            batches = groups(parts, progress.end, cut_pattern(encoder), how, total)
            write_tokens(work, progress, batches, encode, dtype, how)
            if not progress.documents and share == (0, 1):
                bad = f" ({how.bad:,} bad lines; {how.first_bad})" if how.bad else ""
                raise UserError(f"{', '.join(map(str, inputs))}: no text in there{bad}; nothing was written")
            work.complete(progress, dtype)
        work.publish()
    if progress.end.bad:
        print(printable(f"left out {progress.end.bad:,} bad lines; {progress.first_bad}"), file=sys.stderr)
    return IndexedTokens(out)


def merge(inputs: list[str | Path], out: str | Path) -> IndexedTokens:
    """Write data sets, one after the other, as one with the prefix `out`. Returns it.

    The shards of `prepare`, in order, give the bytes that it gives without shards. Raises UserError if the data sets
    have different tokenizers or dtypes, or another data set has that name.
    """
    check_out(out)
    sets, texts = [IndexedTokens(prefix) for prefix in inputs], []
    for data in sets:
        path = Path(f"{data.prefix}{ENDINGS[0]}")
        try:
            texts.append(read_small(path, MAX_TOKENIZER_BYTES))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({reason(error)})") from None
        if (data.dtype, texts[-1]) != (sets[0].dtype, texts[0]):
            raise UserError(f"{data.prefix} and {sets[0].prefix} were made with different tokenizers")
        if data.marks != data.documents + 1:
            raise UserError(
                f"{data.index_file}: its documents have several sequences; `data.py prepare` makes one each"
            )
    work = WorkDirectory(out, None)
    with new_directory(work.path.parent), work.locked() as progress:
        work.files[0].write_bytes(texts[0])
        with work.opened(progress) as (bin, idx):
            for data in sets:
                for shard in data.shards:
                    bin.writelines(shard.blocks(f"copying {shard.path.name}"))
                idx.writelines(data.sizes.blocks(""))
        work.complete(progress, sets[0].dtype)
        work.publish()
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
