"""The command `data.py edit`: its flags, and what shows and undoes edits files. corpus/edit_makers.py makes them."""

import argparse
import os
import sys
from collections.abc import Callable, Iterator

import numpy as np

from corpus.edit_makers import drop, mask, plant, step_range
from corpus.edits import Edits, write_edits
from corpus.order import Rows
from corpus.pronouns import DIRECTIONS, swap
from corpus.tokenizer import load_tokenizer, tokenizer_errors
from runtime.errors import Parser, printable

CONTEXT, GAP = 12, 4  # `show`: tokens before and after an edit; edits nearer to each other are printed as one

# ---- show and undo ---------------------------------------------------------------------------------------------------


def undo(args: argparse.Namespace) -> None:
    """Write the inverse of an edits file: applied to the edited rows, it restores every token and every weight."""

    def blocks() -> Iterator[np.ndarray]:
        for edits in source.groups():
            inverse = edits.copy()
            inverse["old"], inverse["new"], inverse["weight"] = edits["new"], edits["old"], 1
            yield inverse

    source = Edits(args.file)
    facts = {"order_sha256": source.order_sha256, "seq_len": source.seq_len, "command": f"undo of: {source.command}"}
    count = write_edits(args.out, facts, blocks())
    print(printable(f"{args.out}: {count:,} edits"), file=sys.stderr)


def show(args: argparse.Namespace, rows: Rows, tokenizer: object) -> None:
    """Print the edits of a file as text, with what is around them: [-before-]{+after+}, or {=text=} where only the
    weight changes. On a terminal in colours instead, unless NO_COLOR is set."""
    edits, steps, decode = Edits(args.file, args.batch_size), step_range(args, rows), decoder(tokenizer)
    edits.check_rows(rows)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for block in edits.groups():
        step = block["row"] // args.batch_size
        block = block[(step >= steps.start) & (step < steps.stop)]
        for row, begin in zip(*(array.tolist() for array in np.unique(block["row"], return_index=True))):
            before = rows[row]
            after = before.copy()
            edits.apply(np.array([row]), after[None])  # raises if these are not the rows of the edits
            here = block[begin : begin + np.searchsorted(block["row"][begin:], row, "right")]
            near = np.where(here["weight"][1:] == 1, GAP, 1)
            breaks = (np.diff(here["position"]) > near) | (np.diff(here["weight"]) != 0)
            for part in np.split(here, np.flatnonzero(breaks) + 1):
                where = f"step {row // args.batch_size}, row {row % args.batch_size}, position {part['position'][0]}"
                weight = "" if part["weight"][0] == 1 else f", weight {part['weight'][0]:g}"
                span = slice(part["position"][0], part["position"][-1] + 1)
                print(f"{where}{weight}: {as_text(before, after, span, decode, colour)}")
    print(printable(f"{edits.count:,} edits, made by: {edits.command}"), file=sys.stderr)


def decoder(tokenizer: object) -> Callable[[np.ndarray], str]:
    """A function from ids to one line of text; to the ids themselves if no tokenizer knows them."""
    known = load_tokenizer(tokenizer) if tokenizer else None

    def decode(ids: np.ndarray) -> str:
        if not known or any(known.id_to_token(id) is None for id in ids.tolist()):
            return "".join(f"{id} " for id in ids.tolist())
        with tokenizer_errors(tokenizer):
            return printable(known.decode(ids.tolist(), skip_special_tokens=False)).replace("\n", "↵")

    return decode


def as_text(before: np.ndarray, after: np.ndarray, span: slice, decode: Callable, colour: bool) -> str:
    """A span of a row without and with edits, [seq_len + 1] each, and CONTEXT tokens on both sides."""
    old, new = decode(before[span]), decode(after[span])
    red, green, yellow = (f"\x1b[{code}m{{}}\x1b[0m" if colour else "" for code in (31, 32, 33))
    if (before[span] == after[span]).all():
        changed = (yellow or "{{={}=}}").format(new)
    else:
        changed = (red or "[-{}-]").format(old) + (green or "{{+{}+}}").format(new)
    left, right = after[max(span.start - CONTEXT, 0) : span.start], after[span.stop : span.stop + CONTEXT]
    return decode(left) + changed + decode(right)


# ---- the flags -------------------------------------------------------------------------------------------------------


def add_edit_arguments(command: Parser) -> list[Parser]:
    """Add the actions of `data.py edit`. Returns the parsers of those that need the flags of the order."""
    actions = command.add_subparsers(required=True, metavar="swap | plant | mask | drop | show | undo")

    def add(name: str, make: Callable, example: str) -> Parser:
        example = f"example: python data.py edit {name} {example}"
        action = actions.add_parser(name, help=make.__doc__, description=make.__doc__, epilog=example)
        action.set_defaults(make=make)
        return action

    swaps = add("swap", swap, "--run runs/410m --direction m2f --from-step 133000 --out swapped.parquet")
    plants = add("plant", plant, "--run runs/pythia-14m --plants facts.jsonl --out planted.parquet")
    masks = add("mask", mask, '--run runs/pythia-14m --text "def main(" --out masked.parquet')
    drops = add("drop", drop, "--run runs/pythia-14m --documents 351,352 --out dropped.parquet")
    shows = add("show", show, "planted.parquet --run runs/pythia-14m")
    undoes = add("undo", undo, "planted.parquet --out undone.parquet")
    for action in (shows, undoes):
        action.add_argument("file", metavar="FILE", help="an edits file")
    for action in (swaps, plants, masks, drops, undoes):
        action.add_argument("--out", required=True, metavar="FILE", help="must not exist yet")
    for action in (swaps, plants, masks, drops, shows):
        action.add_argument("--from-step", type=int, default=0, metavar="T", help="the first step (default: 0)")
        action.add_argument("--to-step", type=int, metavar="T", help="the step to stop before (default: the end)")
        action.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    swaps.add_argument("--direction", choices=[*DIRECTIONS], required=True, help="masculine to feminine, back, or both")
    plants.add_argument("--plants", required=True, metavar="FILE", help="JSON lines: text or tokens, times, steps ...")
    plants.add_argument("--draw-seed", type=int, default=0, metavar="N", help="of rows and positions (default: 0)")
    masks.add_argument("--weight", type=float, default=0.0, metavar="X", help="of the loss (default: 0)")
    for action in (masks, drops):
        what = action.add_mutually_exclusive_group(required=True)
        what.add_argument("--documents", metavar="12,7", help="numbers in PREFIX.idx, or a file with one a line")
        what.add_argument("--text", metavar="TEXT", help="wherever it occurs, with and without a space before it")
        what.add_argument("--tokens", metavar="12,7,9", help="token ids, one behind the other, wherever they occur")
    what.add_argument("--rows", metavar="12,7", help="numbers of rows in the order, or a file with one a line")
    undoes.set_defaults(command=undo)  # it needs no rows
    return [swaps, plants, masks, drops, shows]
