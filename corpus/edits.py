"""Edits: an intervention in the training data, as a file that one can review, share and undo.

The file is parquet. Each of its lines changes one token of a row as served, or the weight of its loss, or both:

    row       int64    number of the row in the order: batch_size * step + row of the step
    position  int32    in the row, 0 .. seq_len
    old, new  int32    the token id without and with the edit; the same if only the weight changes
    weight    float32  of the loss of this token as a target: 1 as published, 0 masked. Position 0 is not a target: 1

The lines are sorted by (row, position), and each place occurs once. The metadata says of which order the rows are
(order_sha256, seq_len), how the file was made (command), and has a sha256 of all that, so that no damage goes unseen.

Whoever trains with the file or looks at it gets the edited rows from `rows.take`, and the weights from `rows.weights`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import numpy as np

from corpus.inverse import ramps
from runtime.errors import UserError
from runtime.files import READ_ERRORS, atomic_write, open_regular, reason

EDIT = np.dtype([("row", "<i8"), ("position", "<i4"), ("old", "<i4"), ("new", "<i4"), ("weight", "<f4")])
FACTS = ("order_sha256", "seq_len", "command")
GROUP = 1 << 20  # edits that are read at once (a row group), 24 MB in memory
CACHED = 8  # groups that stay in memory


def pyarrow() -> ModuleType:
    """The library that reads and writes parquet. Raises UserError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("edits files need pyarrow: pip install -e '.[data]'") from None
    return pyarrow


def schema() -> object:
    """The columns of the file, as pyarrow describes them."""
    types = {name: pyarrow().from_numpy_dtype(EDIT[name]) for name in EDIT.names}
    return pyarrow().schema([pyarrow().field(name, kind, nullable=False) for name, kind in types.items()])


@contextmanager
def one_line_errors(path: Path) -> Iterator[None]:
    """Turn every error of reading a damaged file into a UserError that names it."""
    errors = (*READ_ERRORS, MemoryError, NotImplementedError, pyarrow().ArrowException)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: the edits file does not exist; give its place as --edits") from None
    except errors as error:
        line = (reason(error).splitlines() or [repr(error)])[0][:300]
        raise UserError(f"{path}: not an edits file that works ({line}); `python data.py edit` makes one") from None


def head_of(facts: dict) -> bytes:
    """What the sha256 of an edits file covers before the edits themselves."""
    return json.dumps([str(facts[name]) for name in FACTS]).encode()


class Edits:
    """The edits of a file. They are checked when it is opened, and read again when their rows are served.

    batch_size is for messages, which name a step if it is known. Raises UserError, in any method, for a damaged file.
    """

    def __init__(self, path: str | Path, batch_size: int = 0):
        self.path, self.batch_size, self._stack = Path(path), batch_size, ExitStack()
        self._group = lru_cache(CACHED)(self._read_group)
        with one_line_errors(self.path):
            file = self._stack.enter_context(open_regular(self.path))
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            options = {"thrift_string_size_limit": 1 << 24, "thrift_container_size_limit": 1 << 24}
            self._table = pyarrow().parquet.ParquetFile(file, pre_buffer=False, **options)
            found = self._table.schema_arrow.remove_metadata()
            if found != schema():
                raise ValueError(f"its columns are {', '.join(f'{field.name} {field.type}' for field in found)}")
            stored = self._table.metadata.metadata or {}
            if missing := [name for name in (*FACTS, "sha256") if name.encode() not in stored]:
                raise ValueError(f"its metadata lacks {', '.join(missing)}")
            facts = {name: stored[name.encode()].decode() for name in (*FACTS, "sha256")}
            self.order_sha256, self.command = facts["order_sha256"], facts["command"]
            self.seq_len = int(facts["seq_len"])
            self._check_groups(facts)

    def _check_groups(self, facts: dict) -> None:
        """Read all edits once. Raises ValueError if they are not those that were written, or not in order."""
        whole, self.count, self.has_weights, self._digests = hashlib.sha256(head_of(facts)), 0, False, []
        self.lowest, self.highest, bounds, last = 0, 0, [], np.zeros(0, EDIT)
        for k in range(self._table.num_row_groups):
            _, edits = self._group(k)
            whole.update(self._digests[k])
            check(np.concatenate([last, edits]), self.seq_len)
            last = edits[-1:]
            bounds.append((edits["row"][0], edits["row"][-1]))
            self.count += len(edits)
            self.has_weights |= bool((edits["weight"] != 1).any())
            self.lowest, self.highest = min(self.lowest, edits["new"].min()), max(self.highest, edits["new"].max())
        if whole.hexdigest() != facts["sha256"]:
            raise ValueError("its edits are not those that were written")
        self._first, self._last = np.array(bounds, np.int64).reshape(-1, 2).T
        self.ends = np.unique([*self._first[:1], *self._last[-1:]])  # the first and the last row that has edits

    def _read_group(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (rows [edits], the edits [edits]) of a row group. Raises UserError if it has changed."""
        with one_line_errors(self.path):
            count = self._table.metadata.row_group(k).num_rows
            if not 0 < count <= GROUP:
                raise ValueError(f"row group {k} has {count} edits; there can be 1 to {GROUP}")
            table, edits = self._table.read_row_group(k, use_threads=False), np.empty(count, EDIT)
            for name in EDIT.names:
                if table[name].null_count or len(table[name]) != count:
                    raise ValueError(f"values of {name} are missing")
                edits[name] = table[name].to_numpy()
            digest = hashlib.sha256(edits).digest()
            if k == len(self._digests):
                self._digests.append(digest)
            elif digest != self._digests[k]:
                raise ValueError("it has changed since it was opened")
            return np.ascontiguousarray(edits["row"]), edits

    def groups(self) -> Iterator[np.ndarray]:
        """Yield all edits (EDIT), sorted, at most GROUP at once."""
        for k in range(len(self._digests)):
            yield self._group(k)[1]

    def check_rows(self, rows) -> None:
        """Raise UserError unless the edits are for these rows (corpus.order.Rows)."""
        limits, problem = np.iinfo(rows.data.dtype), ""
        if self.seq_len != rows.seq_len:
            problem = f"are for --seq-len {self.seq_len}, not {rows.seq_len}"
        elif self.order_sha256 != rows.sha256:
            problem = f"are for the order with sha256 {self.order_sha256[:12]}…, the order here has {rows.sha256[:12]}…"
        elif self.count and self._last[-1] >= len(rows):
            problem = f"change row {self._last[-1]}, the order has {len(rows)}"
        elif self.lowest < limits.min or self.highest > limits.max:
            problem = f"have a token id that {rows.data.dtype.name} cannot hold ({self.lowest} or {self.highest})"
        if problem:
            raise UserError(f"the edits in {self.path} {problem}")

    def of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the edits of rows [n]: (index in `numbers` [edits], EDIT [edits])."""
        found, low, high = [], numbers.min(), numbers.max()
        for k in np.flatnonzero((self._first <= high) & (low <= self._last)).tolist():
            rows, edits = self._group(k)
            begins, ends = np.searchsorted(rows, numbers), np.searchsorted(rows, numbers, "right")
            counts = ends - begins
            if (begins[1:] == ends[:-1]).all():  # all rows of a step: a slice takes a tenth of the time of a gather
                lines = slice(begins[0], ends[-1])
            else:
                lines = np.repeat(begins, counts) + ramps(counts)
            found.append((np.repeat(np.arange(len(numbers)), counts), edits[lines]))
        if len(found) == 1:
            return found[0]
        which, edits = zip((np.zeros(0, np.int64), np.zeros(0, EDIT)), *found)
        return np.concatenate(which), np.concatenate(edits)

    def apply(self, numbers: np.ndarray, tokens: np.ndarray) -> None:
        """Edit the tokens [n, seq_len + 1] of rows [n] in place. Raises UserError if one is not as the file says."""
        which, edits = self.of(numbers)
        if not len(edits):
            return
        at = which, edits["position"]
        if (wrong := tokens[at] != edits["old"]).any():
            row, position, old, _, _ = edits[wrong.argmax()].tolist()
            step = f"step {row // self.batch_size}, row {row % self.batch_size} " if self.batch_size else ""
            raise UserError(
                f"{step}(row {row} of the order), position {position}: {self.path} expects token {old}, the data has"
                f" {tokens[at][wrong.argmax()]}; the edits were made for other data".lstrip()
            )
        tokens[at] = edits["new"]

    def weights(self, numbers: np.ndarray) -> np.ndarray | None:
        """Return the weights of the losses of rows [n], float32 [n, seq_len], or None if all are 1."""
        which, edits = self.of(numbers) if self.has_weights else (None, np.zeros(0, EDIT))
        if (edits["weight"] == 1).all():
            return None
        weights, targets = np.ones((len(numbers), self.seq_len), np.float32), edits["position"] > 0
        weights[which[targets], edits["position"][targets] - 1] = edits["weight"][targets]
        return weights


def check(edits: np.ndarray, seq_len: int) -> None:
    """Raise ValueError, which names the first wrong edit, unless EDIT [edits] can be a part of a file."""
    row, position, weight = edits["row"], edits["position"], edits["weight"]
    follows = (row[1:] > row[:-1]) | (row[1:] == row[:-1]) & (position[1:] > position[:-1])
    rules = {
        "the row is negative": row < 0,
        f"the position is not in 0 .. {seq_len}": (position < 0) | (position > seq_len),
        "the weight is not a finite number of at least 0": ~(np.isfinite(weight) & (weight >= 0)),
        "position 0 is not a target and has no weight": (position == 0) & (weight != 1),
        "it does not come after the edit before it": np.concatenate([np.zeros(min(len(row), 1), bool), ~follows]),
    }
    for problem, wrong in rules.items():
        if wrong.any():
            k = wrong.argmax()
            raise ValueError(f"row {row[k]}, position {position[k]}: {problem}")


def write_edits(path: str | Path, facts: dict, blocks: Iterable[np.ndarray]) -> int:
    """Write a new edits file from blocks of EDIT, which must be sorted. Returns the number of edits.

    facts: order_sha256, seq_len and command. Raises UserError, and writes nothing, if the file exists or cannot be
    written; ValueError for edits that cannot be in a file.
    """
    path, library, columns = Path(path), pyarrow(), schema()
    if os.path.lexists(path):  # unlike Path.exists, it raises nothing
        raise UserError(f"{path} exists; choose another name or delete it")
    whole, count, last = hashlib.sha256(head_of(facts)), 0, np.zeros(0, EDIT)
    try:
        with atomic_write(path) as file:
            with library.parquet.ParquetWriter(file, columns, compression="zstd", store_schema=False) as writer:
                for edits in in_groups(blocks):
                    check(np.concatenate([last, edits]), facts["seq_len"])
                    whole.update(hashlib.sha256(edits).digest())
                    table = library.table([library.array(edits[name]) for name in EDIT.names], columns)
                    writer.write_table(table, row_group_size=GROUP)
                    count, last = count + len(edits), edits[-1:]
                stored = {name: str(facts[name]) for name in FACTS} | {"sha256": whole.hexdigest()}
                writer.add_key_value_metadata(stored)
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}; nothing was written") from None
    return count


def in_groups(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the edits of blocks in blocks of GROUP; the last one may be smaller."""
    waiting = np.zeros(0, EDIT)
    for block in blocks:
        waiting = np.concatenate([waiting, block])
        while len(waiting) >= GROUP:
            yield waiting[:GROUP]
            waiting = waiting[GROUP:]
    if len(waiting):
        yield waiting
