"""Tokens on disk -> the batch of step t, in the order in which Pythia saw them.

How a token travels:

    file         PREFIX.bin      the tokens of all documents, end to end; PREFIX.idx stores where each document starts
    document     doc_idx         every document once per epoch; the documents of all epochs are shuffled together
    stream       sample_idx      the documents in that order, end to end, cut every seq_len tokens
    row          shuffle_idx     seq_len + 1 tokens; the rows are shuffled; neighbours in the stream share one token
    step t       rows [batch_size * t, batch_size * (t + 1)): there is no state to save, so none to restore
    micro-batch  a micro-step takes micro_batch * world_size consecutive rows; rank r gets the r-th micro_batch of them

The batch of a step depends only on the step, not on the number of ranks. A pre-shuffled data set (a directory with
document.idx and document-*.bin, as EleutherAI publishes them) stores the rows themselves and enters at `row`.

The order is that of GPT-NeoX v1.0 (megatron/data/gpt2_dataset.py and helpers.cpp), bit for bit.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from corpus.order import Order, Rows, ShuffledRows
from corpus.prepare import demo, prepare
from corpus.tokenizer import load_tokenizer
from runtime.errors import Parser, UserError, run_command
from runtime.files import atomic_write

# The flags that determine which rows a step has, here and in train.py: as published, and what --demo changes.
DEFAULTS: dict[str, object] = {"data": "demo", "seed": 1234, "seq_len": 2048, "batch_size": 1024, "steps": 143_000}
DEMO = {"data": "demo", "steps": 60, "batch_size": 16, "seq_len": 256}


def batch(
    rows: Rows, step: int, batch_size: int, micro_batch: int | None = None, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the tokens that a rank sees in a step: [micro_steps, micro_batch, seq_len + 1] in the dtype of the data.

    The inputs are [..., :-1], the targets [..., 1:]. The first step is 0. The result depends only on the arguments.
    micro_batch=None means all rows of the rank at once. Raises UserError if the data ends before the step.
    """
    micro_batch = batch_size // world_size if micro_batch is None else micro_batch
    numbers = row_numbers(step, batch_size, micro_batch, rank, world_size)
    steps = len(rows) // batch_size
    if not 0 <= step < steps:
        raise UserError(f"step {step}: the data has {steps} steps of {batch_size} rows ({len(rows)} rows); first is 0")
    return np.stack([rows[i] for i in numbers.flat]).reshape(*numbers.shape, rows.seq_len + 1)


def row_numbers(step: int, batch_size: int, micro_batch: int, rank: int = 0, world_size: int = 1) -> np.ndarray:
    """Return the numbers of the rows that a rank sees in a step: int64 [micro_steps, micro_batch].

    As GPT-NeoX deals them (see `micro-batch` above). Raises UserError if batch_size or micro_batch does not divide.
    """
    if batch_size < 1 or batch_size % world_size:
        near = max(batch_size // world_size, 1) * world_size
        raise UserError(
            f"--batch-size {batch_size} does not divide among {world_size} ranks; {near} or {near + world_size} would"
        )
    rank_rows = batch_size // world_size
    if micro_batch < 1 or rank_rows % micro_batch:
        divisors = [n for n in range(1, rank_rows + 1) if rank_rows % n == 0]
        near = [n for n in divisors if n < micro_batch][-1:] + [n for n in divisors if n > micro_batch][:1]
        raise UserError(
            f"--micro-batch {micro_batch} does not divide the {rank_rows} rows of a rank"
            f" (--batch-size {batch_size}, {world_size} ranks); {' or '.join(map(str, near))} would"
        )
    first = step * batch_size + rank * micro_batch
    return first + np.arange(0, batch_size, micro_batch * world_size)[:, None] + np.arange(micro_batch)


def check_vocab(tokens: np.ndarray, vocab: int, step: int, rank: int = 0, world_size: int = 1) -> None:
    """Raise UserError if a token of a rank's batch [micro_steps, micro_batch, seq_len + 1] is not in 0 .. vocab - 1."""
    outside = np.argwhere((tokens < 0) | (tokens >= vocab))
    if len(outside):
        j, k, position = outside[0]
        micro_steps, micro_batch, _ = tokens.shape
        row = row_numbers(step, micro_steps * micro_batch * world_size, micro_batch, rank, world_size)[j, k]
        raise UserError(
            f"step {step}, row {row}, position {position}: token id {tokens[j, k, position]} is outside the vocabulary"
            f" of {vocab}; was the data made with another tokenizer?"
        )


def open_rows(data: str | Path, samples: int, seq_len: int = 2048, seed: int = 1234) -> Rows:
    """Open --data: a Megatron prefix, a pre-shuffled directory, or "demo". Raises UserError if it is none of these."""
    path = locate(data)
    if (path / "document.idx").exists():
        return ShuffledRows(path, seq_len)
    if Path(f"{path}.idx").exists():
        return Order(path, samples, seq_len, seed)
    raise UserError(
        f"--data {data}: neither {path}.idx (a prefix) nor {path}/document.idx (a pre-shuffled directory) exists;"
        " make a prefix with `python data.py prepare`"
    )


def requested_samples(steps: int, batch_size: int) -> int:
    """Return how many rows the order needs: 0.5% more than the steps use, as in GPT-NeoX for a list of paths. The
    arithmetic is that of NeoX, in floating point: one row more can mean one epoch more, and so another order."""
    if steps < 1 or batch_size < 1:
        raise UserError(f"--steps {steps} and --batch-size {batch_size} must be at least 1")
    return math.ceil(steps * batch_size * 1.005)


def locate(data: str | Path) -> Path:
    """Return the prefix or directory that --data names. Builds the demo corpus if it is named."""
    return demo() if str(data) == "demo" else Path(data)


def find_tokenizer(data: str | Path) -> Path | None:
    """Return the tokenizer.json of --data, if it lies where `prepare` or a download puts it."""
    path = locate(data)
    directory = path if path.is_dir() else path.parent
    files = [Path(f"{path}.tokenizer.json"), directory / "tokenizer.json"]
    return next((file for file in files if file.is_file()), None)


def fingerprint(rows: Rows) -> dict:
    """Return what a run records about its data. Tokens of less than 1 GB are hashed too, because it takes seconds."""
    data, is_order = rows.data, isinstance(rows, Order)
    return {
        "kind": "shuffled by seed" if is_order else "pre-shuffled rows",
        "files": [str(file) for file in [data.index_file, *data.files]],
        "dtype": data.dtype.name,
        "tokens": data.tokens,
        "documents": data.documents if is_order else None,
        "epochs": rows.epochs if is_order else None,
        "rows": len(rows),
        "order_sha256": rows.sha256,
        "bin_sha256": data.tokens_sha256() if data.tokens * data.dtype.itemsize < 10**9 else None,
    }


def run_prepare(args: argparse.Namespace) -> None:
    """Convert text to PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json. A .jsonl or .jsonl.zst file has one document
    per line, {"text": "..."}; any other file is one document of UTF-8 text."""
    data = prepare(args.input, args.out, args.tokenizer, args.workers)
    print(f"{args.out}: {data.documents:,} documents, {data.tokens:,} tokens of {data.dtype.name}")


def run_info(args: argparse.Namespace) -> None:
    """Print counts, epochs, steps, the sha256 of the order."""
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    facts = fingerprint(rows)
    facts["files"] = "\n             ".join(facts["files"])
    facts["tokenizer"] = find_tokenizer(args.data)
    facts["steps"] = f"{len(rows) // args.batch_size:,} of {args.batch_size:,} rows of {args.seq_len + 1:,} tokens"
    for name, fact in facts.items():
        if fact is not None:
            print(f"{name:<12} {fact:,}" if isinstance(fact, int) else f"{name:<12} {fact}")


def run_view(args: argparse.Namespace) -> None:
    """Print what the model saw in a step, as text if there is a tokenizer, and the documents that it came from."""
    rows = open_rows(args.data, requested_samples(args.steps, args.batch_size), args.seq_len, args.seed)
    tokens = batch(rows, args.step, args.batch_size)[0]  # [batch, seq_len + 1]
    if args.row is not None and not 0 <= args.row < args.batch_size:
        raise UserError(f"--row {args.row}: a step has rows 0 .. {args.batch_size - 1}")
    chosen = [*range(args.batch_size)] if args.row is None else [args.row]
    if args.export:
        export(tokens[chosen], Path(args.export))
        return
    file = args.tokenizer or find_tokenizer(args.data)
    tokenizer = load_tokenizer(file) if file else None
    for k in chosen:
        number, origin = args.step * args.batch_size + k, ""
        if isinstance(rows, Order):
            origin = ": " + ", ".join(f"document {d} from {offset} ({n})" for d, offset, n in rows.pieces(number))
        print(f"--- step {args.step}, row {k} of {args.batch_size} (row {number} of the order){origin}")
        ids = tokens[k].tolist()
        print(tokenizer.decode(ids, skip_special_tokens=False) if tokenizer else " ".join(map(str, ids)))


def export(array: np.ndarray, path: Path) -> None:
    """Write a new .npy file. Raises UserError, and writes nothing, if it exists or cannot be written."""
    if path.exists():
        raise UserError(f"{path} exists; choose another name or delete it")
    try:
        with atomic_write(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    print(f"{path}: {array.dtype.name} {[*array.shape]}")


def main() -> None:
    parser = Parser(prog="data.py", description="Prepare, describe and show training data.")
    commands = parser.add_subparsers(required=True, metavar="prepare | info | view")

    def add(name: str, run, example: str) -> Parser:
        text, example = run.__doc__, f"example: python data.py {name} {example}"
        command = commands.add_parser(name, help=text, description=text, epilog=example)
        command.set_defaults(run=run)
        return command

    command = add("prepare", run_prepare, "--input wiki.jsonl.zst notes.txt --out corpora/mine")
    command.add_argument("--input", nargs="+", required=True, metavar="FILE", help="in the order of the documents")
    command.add_argument("--out", required=True, metavar="PREFIX", help="must not exist yet")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json; id 0 is <|endoftext|> (default: bytes)")
    command.add_argument("--workers", type=int, metavar="N", help="threads that encode (default: one per core)")

    info = add("info", run_info, "--data corpora/mine --steps 1000")
    view = add("view", run_view, "--data corpora/mine --steps 1000 --step 10 --row 3")
    for command in (info, view):
        command.add_argument("--demo", action="store_true", help="the rows of `train.py --demo`")
        command.add_argument("--data", help="prefix, pre-shuffled directory, or `demo` (default: %(default)s)")
        command.add_argument("--seed", type=int, help="as given to train.py (default: %(default)s)")
        command.add_argument("--seq-len", type=int, metavar="N", help="tokens per row (default: %(default)s)")
        command.add_argument("--batch-size", type=int, metavar="N", help="rows per step (default: %(default)s)")
        command.add_argument("--steps", type=int, metavar="N", help="steps of the whole run (default: %(default)s)")
        command.set_defaults(**(DEFAULTS | DEMO if "--demo" in sys.argv else DEFAULTS))
    view.add_argument("--step", type=int, required=True, metavar="T", help="the first step is 0")
    view.add_argument("--row", type=int, metavar="R", help="only this row of the step; the first row is 0")
    view.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    view.add_argument("--export", metavar="FILE.npy", help="write tokens [rows, seq_len + 1] instead (Pythia: uint16)")

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_command(main)
