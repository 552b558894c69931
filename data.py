"""Tokens on disk -> the batch of step t, in the order in which Pythia saw them.

How a token travels:

    file         PREFIX.bin      documents one after the other, nothing but tokens; PREFIX.idx says where each begins
      |
    document     doc_idx         every document once per epoch, all epochs shuffled together
      |
    stream       sample_idx      the documents in that order, end to end, cut every seq_len tokens
      |
    row          shuffle_idx     seq_len + 1 tokens, the cuts shuffled; neighbours in the stream share one token
      |
    step t       rows [batch_size * t, batch_size * (t + 1)): nothing to remember, so nothing to restore
      |
    micro-batch  j of rank r: the r-th of the `world` slices of micro_batch rows in the j-th part of the step

The batch of a step depends on the step alone, whatever the number of ranks. Pre-shuffled sets (a directory of
document.idx and document-*.bin, as EleutherAI publishes them) hold the rows themselves and enter at `row`.

The order is that of GPT-NeoX v1.0 (megatron/data/gpt2_dataset.py and helpers.cpp), bit for bit.
"""

import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np

from corpus.order import Order, ShuffledRows
from corpus.prepare import demo, prepare
from corpus.tokenizer import load_tokenizer
from runtime.errors import Parser, UserError, run_command

DEMO = {"data": "demo", "steps": 60, "batch_size": 16, "seq_len": 256}  # what --demo stands for, here and in train.py

Rows = Order | ShuffledRows


def locate(data: str | Path) -> Path:
    """The prefix or directory that --data means; builds the demo corpus where it is asked for."""
    if str(data) == "demo":
        return demo()
    return Path(data)


def open_rows(data: str | Path, samples: int, seq_len: int = 2048, seed: int = 1234) -> Rows:
    """Rows of --data: a Megatron prefix, a pre-shuffled directory, or "demo". UserError if it is none of these."""
    path = locate(data)
    if (path / "document.idx").exists():
        return ShuffledRows(path, seq_len)
    if Path(f"{path}.idx").exists():
        return Order(path, samples, seq_len, seed)
    raise UserError(
        f"--data {data}: neither {path}.idx (a prefix) nor {path}/document.idx (a pre-shuffled directory) exists;"
        " make a prefix with `python data.py prepare`"
    )


def find_tokenizer(data: str | Path) -> Path | None:
    """The tokenizer.json that belongs to --data, if one lies where `prepare` or a download puts it."""
    path = locate(data)
    directory = path if path.is_dir() else path.parent
    files = [Path(f"{path}.tokenizer.json"), directory / "tokenizer.json"]
    return next((file for file in files if file.is_file()), None)


def fingerprint(rows: Rows) -> dict:
    """What a run records about its data. The tokens themselves are hashed where that takes no more than seconds."""
    data, order = rows.data, isinstance(rows, Order)
    return {
        "kind": "shuffled by seed" if order else "pre-shuffled rows",
        "files": [str(file) for file in [data.index_file, *data.files]],
        "dtype": data.dtype.name,
        "tokens": data.tokens,
        "documents": data.documents if order else None,
        "epochs": rows.epochs if order else None,
        "rows": len(rows),
        "order_sha256": rows.sha256,
        "bin_sha256": data.tokens_sha256() if data.tokens * data.dtype.itemsize < 10**9 else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Steps


def requested_samples(steps: int, batch_size: int) -> int:
    """Rows asked of the order: half a per cent more than are used, as GPT-NeoX does for a list of paths. In the same
    floating-point arithmetic, as one sample more can be one epoch more and so another order. UserError below 1."""
    if steps < 1 or batch_size < 1:
        raise UserError(f"--steps {steps} and --batch-size {batch_size} must be at least 1")
    return math.ceil(steps * batch_size * 1.005)


def row_numbers(step: int, batch_size: int, micro_batch: int, rank: int = 0, world: int = 1) -> np.ndarray:
    """Which rows a rank sees in a step: int64 [micro_steps, micro_batch]. Dealt as by GPT-NeoX: one micro-step takes
    micro_batch * world consecutive rows, of which rank r has the r-th part. UserError if batch_size does not divide."""
    if batch_size < 1 or batch_size % world:
        near = max(batch_size // world, 1) * world
        raise UserError(
            f"--batch-size {batch_size} does not divide among {world} ranks; {near} or {near + world} would"
        )
    share = batch_size // world
    if micro_batch < 1 or share % micro_batch:
        below = [n for n in range(1, min(micro_batch, share) + 1) if share % n == 0][-1:]
        above = [n for n in range(max(micro_batch, 1), share + 1) if share % n == 0][:1]
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {share} rows of a rank"
            f" (--batch-size {batch_size}, {world} ranks); {' or '.join(map(str, below + above))} would"
        )
    first = step * batch_size + rank * micro_batch
    return first + np.arange(0, batch_size, micro_batch * world)[:, None] + np.arange(micro_batch)


def batch(
    rows: Rows, step: int, batch_size: int, micro_batch: int | None = None, rank: int = 0, world: int = 1
) -> np.ndarray:
    """What a rank sees in a step (0-based): [micro_steps, micro_batch, seq_len + 1] tokens in the data's dtype.

    Inputs are [..., :-1], targets [..., 1:]. A pure function of its arguments. micro_batch None: all of the rank's rows
    at once. UserError if batch_size does not divide or if the data ends before the step.
    """
    numbers = row_numbers(step, batch_size, batch_size // world if micro_batch is None else micro_batch, rank, world)
    steps = len(rows) // batch_size
    if not 0 <= step < steps:
        raise UserError(f"step {step}: the data has {steps} steps of {batch_size} rows ({len(rows)} rows); first is 0")
    return np.stack([rows[i] for i in numbers.flat]).reshape(*numbers.shape, rows.seq_len + 1)


def check_vocab(batch: np.ndarray, vocab: int, step: int, rank: int = 0, world: int = 1) -> None:
    """UserError if a token of this rank's batch [micro_steps, micro_batch, seq_len + 1] is no id of the vocabulary."""
    wrong = (batch < 0) | (batch >= vocab)
    if wrong.any():
        j, k, position = (int(at[0]) for at in wrong.nonzero())
        row = row_numbers(step, batch.shape[0] * batch.shape[1] * world, batch.shape[1], rank, world)[j, k]
        raise UserError(
            f"step {step}, row {row}, position {position}: token id {batch[j, k, position]} is outside the vocabulary"
            f" of {vocab}; was the data made with another tokenizer?"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def run_prepare(args: argparse.Namespace) -> None:
    data = prepare(args.input, args.out, args.tokenizer, args.workers)
    print(f"{args.out}: {data.documents:,} documents, {data.tokens:,} tokens of {data.dtype.name}")


def run_info(args: argparse.Namespace) -> None:
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    facts = fingerprint(rows)
    facts["files"] = "\n             ".join(facts["files"])
    facts["tokenizer"] = find_tokenizer(args.data)
    facts["steps"] = f"{len(rows) // args.batch_size:,} of {args.batch_size:,} rows of {args.seq_len + 1:,} tokens"
    for name, fact in facts.items():
        if fact is not None:
            print(f"{name:<12} {fact:,}" if isinstance(fact, int) else f"{name:<12} {fact}")


def run_view(args: argparse.Namespace) -> None:
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    seen = batch(rows, args.step, args.batch_size)[0]  # [batch, seq_len + 1]
    if args.row is not None and not 0 <= args.row < args.batch_size:
        raise UserError(f"--row {args.row}: a step has rows 0 .. {args.batch_size - 1}")
    chosen = range(args.batch_size) if args.row is None else [args.row]
    if args.export:
        export(seen[list(chosen)], Path(args.export))
        return
    file = Path(args.tokenizer) if args.tokenizer else find_tokenizer(args.data)
    if file:
        tokenizer = load_tokenizer(file)
    for k in chosen:
        number = args.step * args.batch_size + k
        origin = ""
        if isinstance(rows, Order):
            origin = ": " + ", ".join(f"document {d} from {offset} ({n})" for d, offset, n in rows.pieces(number))
        print(f"--- step {args.step}, row {k} of {args.batch_size} (row {number} of the order){origin}")
        print(tokenizer.decode(seen[k].tolist(), skip_special_tokens=False) if file else " ".join(map(str, seen[k])))


def export(array: np.ndarray, path: Path) -> None:
    """Write an .npy that is whole or absent. UserError if something is there already."""
    if path.exists():
        raise UserError(f"{path} exists; choose another name or delete it")
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(building, "wb") as file:
            np.save(file, array, allow_pickle=False)
        building.rename(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    finally:
        building.unlink(missing_ok=True)
    print(f"{path}: {array.dtype.name} {[*array.shape]}")


def main() -> None:
    parser = Parser(prog="data.py", description="Make, describe and look at training data.")
    commands = parser.add_subparsers(required=True, metavar="prepare | info | view")

    def command(run, name, description, example):
        example = f"example: python data.py {name} {example}"
        sub = commands.add_parser(name, help=description, description=description, epilog=example)
        sub.set_defaults(run=run)
        return sub

    sub = command(
        run_prepare,
        "prepare",
        "Text to PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json. A .jsonl or .jsonl.zst has one document a line,"
        ' {"text": "..."}; any other file is one document of UTF-8 text.',
        "--input wiki.jsonl.zst notes.txt --out corpora/mine",
    )
    sub.add_argument("--input", nargs="+", required=True, metavar="FILE", help="in the order of the documents")
    sub.add_argument("--out", required=True, metavar="PREFIX", help="must not exist yet")
    sub.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json; its id 0 is <|endoftext|> (default: bytes)")
    sub.add_argument("--workers", type=int, metavar="N", help="threads that encode (default: one per core)")

    info = command(run_info, "info", "Counts, epochs, steps, the order's sha256.", "--data corpora/mine --steps 1000")
    view = command(
        run_view,
        "view",
        "What the model saw in a step, as text if a tokenizer is there, and the documents it came from.",
        "--data corpora/mine --steps 1000 --step 10 --row 3",
    )
    for sub in (info, view):
        sub.add_argument("--demo", action="store_true", help="the rows of `train.py --demo`")
        sub.add_argument("--data", default="demo", help="prefix, pre-shuffled directory, or demo (default)")
        sub.add_argument("--seed", type=int, default=1234, help="as given to train.py (default 1234)")
        sub.add_argument("--seq-len", type=int, default=2048, metavar="N", help="tokens (default 2048)")
        sub.add_argument("--batch-size", type=int, default=1024, metavar="N", help="rows a step (default 1024)")
        sub.add_argument("--steps", type=int, default=143000, metavar="N", help="of the whole run (default 143000)")
        if "--demo" in sys.argv:
            sub.set_defaults(**DEMO)
    view.add_argument("--step", type=int, required=True, metavar="T", help="counted from 0")
    view.add_argument("--row", type=int, metavar="R", help="only this row of the step, counted from 0")
    view.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    view.add_argument("--export", metavar="FILE.npy", help="write tokens [rows, seq_len + 1] instead (Pythia: uint16)")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
