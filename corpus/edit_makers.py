"""What makes edits files: the commands `data.py edit plant`, `mask` and `drop`. (`swap` is in corpus/pronouns.py.)"""

import argparse
import json
import os
import random
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from corpus.edits import EDIT, write_edits
from corpus.inverse import ramps
from corpus.order import Rows, served_rows
from corpus.search import asked_spans, numbers, occurrences, read_lines, span_of, spans_of_texts
from corpus.suffix_index import open_index
from runtime.errors import UserError, printable
from runtime.files import READ_ERRORS

ROWS = 1024  # that are read at once
TRIES = 1000  # to find a free place for a planted text
LIST_BYTES = 1 << 28  # of a file with texts or numbers

# ---- what the makers share -------------------------------------------------------------------------------------------


def step_range(args: argparse.Namespace, rows: Rows) -> range:
    """The steps of --from-step and --to-step, within those that the run serves. Raises UserError if there are none."""
    last = served_rows(rows, args.batch_size, args.steps) // args.batch_size
    steps = range(args.from_step, last if args.to_step is None else args.to_step)
    if not 0 <= steps.start < steps.stop <= last:
        given = f"--from-step {steps.start} --to-step {steps.stop}"
        raise UserError(f"{given}: a part of the steps 0 .. {last} of the run is needed")
    return steps


def with_old(rows: Rows, edits: np.ndarray) -> Iterator[np.ndarray]:
    """Fill in `old` of sorted edits from the rows. Yields them in blocks."""
    served, begins = np.unique(edits["row"], return_index=True)
    for k in range(0, len(served), ROWS):
        block = edits[begins[k] : begins[k + ROWS] if k + ROWS < len(served) else len(edits)]
        tokens = rows.take(served[k : k + ROWS])
        block["old"] = tokens[np.searchsorted(served[k : k + ROWS], block["row"]), block["position"]]
        yield block


def write(args: argparse.Namespace, rows: Rows, blocks: Iterable[np.ndarray]) -> None:
    """Write the file --out and say what it has. Raises UserError."""
    command = shlex.join(["data.py", *sys.argv[1:]])
    facts = {"order_sha256": rows.sha256, "seq_len": rows.seq_len, "command": command}
    try:
        count = write_edits(args.out, facts, blocks)
    except ValueError as error:  # --weight nan
        raise UserError(f"{error}; nothing was written") from None
    print(printable(f"{args.out}: {count:,} edits"), file=sys.stderr)


def number_list(flag: str, text: str) -> list[int]:
    """The numbers of a flag: with commas between them, or in a file, one a line. Raises UserError."""
    return numbers(flag, ",".join(filter(None, read_lines(flag, text, LIST_BYTES))) if os.path.lexists(text) else text)


def asked_pieces(args: argparse.Namespace, rows: Rows, tokenizer: object) -> np.ndarray:
    """The pieces (inverse.PIECE) of --documents, --text or --tokens in the rows. Raises UserError."""
    if args.documents is not None:
        found = [rows.document_pieces(document) for document in number_list("--documents", args.documents)]
    else:
        spans = asked_spans(args, rows.data, tokenizer)
        found = [pieces for _, pieces in occurrences(rows, spans, open_index(rows.data))]
    pieces = np.concatenate(found)
    return pieces[pieces["served"] >= 0]


# ---- plant -----------------------------------------------------------------------------------------------------------


def plant(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Write texts over tokens of rows, so often and in such steps as a JSON-lines file says. One object a line: text or
    tokens (ids); times (default 1); steps (a list) or from_step and to_step (default: the flags); position in the row
    (default: drawn). The copies are spread evenly over the steps, and rows are drawn. Prints where each copy is."""
    steps, draw, taken = step_range(args, rows), random.Random(args.draw_seed), {}
    planted, places = [], []
    for number, line in enumerate(read_lines("--plants", args.plants, LIST_BYTES), 1):
        where = f"{args.plants}, line {number}"
        ids, chosen, times, position = read_plant(line, where, steps, rows, tokenizer)
        for copy in range(times):
            step = chosen[copy * len(chosen) // times]
            served = range(step * args.batch_size, (step + 1) * args.batch_size)
            begins = range(rows.seq_len + 2 - len(ids)) if position is None else [position]
            if not (place := free_place(served, begins, len(ids), taken, draw)):
                raise UserError(f"{where}: no free place in step {step} for one more copy; plant it in more steps")
            planted.append((*place, ids))
            place = {"row": place[0] - served.start, "position": place[1], "tokens": len(ids)}
            places.append({"line": number, "step": step, **place})
    if not planted:
        raise UserError(f"--plants {args.plants} has no lines")
    served, begins, texts = zip(*planted)
    lengths = np.array([*map(len, texts)])
    edits = np.ones(lengths.sum(), EDIT)  # weight 1
    edits["row"], edits["new"] = np.repeat(served, lengths), np.concatenate(texts)
    edits["position"] = np.repeat(begins, lengths) + ramps(lengths)
    write(args, rows, with_old(rows, np.sort(edits, order=("row", "position"))))
    print("\n".join(map(json.dumps, places)))


def read_plant(
    line: str, where: str, steps: range, rows: Rows, tokenizer: object
) -> tuple[list[int], list[int], int, int | None]:
    """The tokens, steps, times and position of a line of --plants. Raises UserError."""
    known = {"text", "tokens", "times", "steps", "from_step", "to_step", "position"}
    try:
        plant = json.loads(line)
        if unknown := plant.keys() - known:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        if ("text" in plant) == ("tokens" in plant):
            raise ValueError("give text or tokens")
        times, position, ids = plant.get("times", 1), plant.get("position"), plant.get("tokens")
        chosen = plant.get("steps", range(plant.get("from_step", steps.start), plant.get("to_step", steps.stop)))
        if isinstance(chosen, range):
            chosen = [*range(max(chosen.start, steps.start), min(chosen.stop, steps.stop))]
        if ids is None:
            ids = spans_of_texts([plant["text"]], tokenizer, rows.data)[0][0].tolist()
        if not all(type(n) is int for n in (*ids, *chosen, times, position or 0)):
            raise ValueError("tokens, steps, times and position are whole numbers")
        if not ids or not chosen or times < 1 or not 0 <= (position or 0) <= rows.seq_len + 1 - len(ids):
            raise ValueError(
                f"{times} times {len(ids)} tokens, in {len(chosen)} steps, position {position}: do not fit"
            )
        if outside := [step for step in chosen if step not in steps]:
            raise ValueError(f"step {outside[0]} is not in {steps.start} .. {steps.stop - 1}")
    except READ_ERRORS as error:
        raise UserError(f"{where}: {str(error) or repr(error)}") from None
    span_of(ids, rows.data, where)  # raises if the data cannot have such a token
    return ids, chosen, times, position


def free_place(
    served: range, begins: Sequence[int], tokens: int, taken: dict[int, list[range]], draw: random.Random
) -> tuple[int, int] | None:
    """Draw a row of `served`, and one of the positions `begins` in it, where nothing is planted yet, and take the place
    for `tokens` tokens. Returns (row, position), or None if there is none."""
    for _ in range(TRIES):
        row, begin = draw.choice(served), draw.choice(begins)
        if all(begin + tokens <= other.start or other.stop <= begin for other in taken.get(row, ())):
            taken.setdefault(row, []).append(range(begin, begin + tokens))
            return row, begin
    return None


# ---- mask ------------------------------------------------------------------------------------------------------------


def mask(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Give the tokens of documents, or of a text wherever it occurs, another weight in the loss (default 0: the model
    sees them and does not learn to predict them). Tokens do not change."""
    steps, width = step_range(args, rows), rows.seq_len + 1
    pieces = asked_pieces(args, rows, tokenizer)
    first, last = steps.start * args.batch_size, steps.stop * args.batch_size
    pieces = pieces[(pieces["served"] >= first) & (pieces["served"] < last)]
    places = np.repeat(pieces["served"] * width + pieces["position"], pieces["tokens"]) + ramps(pieces["tokens"])
    places = np.unique(places[places % width > 0])  # position 0 is not a target
    edits = np.zeros(len(places), EDIT)
    edits["row"], edits["position"], edits["weight"] = places // width, places % width, args.weight

    def blocks() -> Iterator[np.ndarray]:
        for block in with_old(rows, edits):
            block["new"] = block["old"]
            yield block

    write(args, rows, blocks())


# ---- drop ------------------------------------------------------------------------------------------------------------


def drop(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Replace every row that has a part of these documents, or of a text, or the rows of --rows, by rows that the run
    never serves. Nothing else moves."""
    steps, last = step_range(args, rows), served_rows(rows, args.batch_size, args.steps)
    if args.rows is not None:
        bad = np.array(number_list("--rows", args.rows), np.int64)
    else:
        bad = asked_pieces(args, rows, tokenizer)["served"]
    bad = np.unique(bad)
    dropped = bad[(bad >= steps.start * args.batch_size) & (bad < steps.stop * args.batch_size)]
    spare = np.arange(last, min(len(rows), last + len(bad) + len(dropped)))
    spare = np.setdiff1d(spare, bad)[: len(dropped)]
    if len(spare) < len(dropped):
        raise UserError(
            f"{len(dropped):,} rows are to be replaced, but only {len(spare):,} rows are left that the run never serves"
        )
    print(f"{len(dropped):,} rows are replaced by rows that the run never serves", file=sys.stderr)
    write(args, rows, replaced(rows, dropped, spare))


def replaced(rows: Rows, dropped: np.ndarray, spare: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the edits that turn rows [n], ascending, into others [n]."""
    for k in range(0, len(dropped), ROWS):
        old, new = rows.take(dropped[k : k + ROWS]), rows.take(spare[k : k + ROWS])
        which, positions = np.nonzero(old != new)
        edits = np.ones(len(which), EDIT)  # weight 1
        edits["row"], edits["position"] = dropped[k + which], positions
        edits["old"], edits["new"] = old[which, positions], new[which, positions]
        yield edits
