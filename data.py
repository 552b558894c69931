"""Tokens on disk -> the batch of step t, in the order in which Pythia saw them.

How a token travels:

    file         PREFIX.bin      the tokens of all documents, end to end; PREFIX.idx stores where each document starts
    document     doc_idx         every document once per epoch; the documents of all epochs are shuffled together
    stream       sample_idx      the documents in that order, end to end, cut every seq_len tokens
    row          shuffle_idx     seq_len + 1 tokens; the rows are shuffled; neighbours in the stream share one token
    edits        a file (--edits) can change single tokens of rows, and the weights of their losses: corpus/edits.py
    step t       rows [batch_size * t, batch_size * (t + 1)): there is no state to save, so none to restore
    micro-batch  a micro-step takes micro_batch * world_size consecutive rows; rank r gets the r-th micro_batch of them

The batch of a step depends only on the step, not on the number of ranks. A pre-shuffled data set (a directory with
document.idx and document-*.bin, as EleutherAI publishes them) stores the rows themselves and enters at `row`.

The order is that of GPT-NeoX v1.0 (megatron/data/gpt2_dataset.py and helpers.cpp), bit for bit.
"""

import argparse
import math
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np

from corpus.edit_command import add_edit_arguments
from corpus.edits import Edits
from corpus.fetch import add_fetch_arguments, run_fetch
from corpus.indexed import DataFile, IndexedTokens, read_mark, sha256, write_mark
from corpus.order import Order, Rows, ShuffledRows, digest, epochs_for, row_digests, served_rows
from corpus.prepare import DEMO_PREFIX, demo, merge, prepare
from corpus.repeats import absent_rows, describe_times, repeated_documents, repeated_rows, times_trained
from corpus.search import add_count_arguments, add_find_arguments, count, find
from corpus.suffix_index import add_index_arguments, build_index, parse_share
from corpus.tokenizer import load_tokenizer, tokenizer_errors
from corpus.verify_order import compare
from runtime.errors import Parser, UserError, printable, run_command
from runtime.files import atomic_write, reason
from runtime.metrics import recorded_batch
from runtime.run_directory import DAMAGE, flag, read_run

# The flags that determine which rows a step has, here and in train.py: as published, and what --demo changes.
DEFAULTS: dict[str, object] = {"data": "demo", "seed": 1234, "seq_len": 2048, "batch_size": 1024, "steps": 143_000}
DEMO = {"data": "demo", "steps": 60, "batch_size": 16, "seq_len": 256}
MANY_EPOCHS = 100  # no Pythia makes so many: then `steps` is not that of the run
HASHED_AT_ONCE = 10**9  # bytes of tokens that are hashed at every start, because it takes seconds


def batch(
    rows: Rows, step: int, batch_size: int, micro_batch: int | None = None, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Return the tokens that a rank sees in a step: [micro_steps, micro_batch, seq_len + 1] in the dtype of the data.

    The inputs are [..., :-1], the targets [..., 1:]. The first step is 0. The result depends only on the arguments.
    micro_batch=None means all rows of the rank at once. Raises UserError if the data ends before the step.
    """
    micro_batch = batch_size // world_size if micro_batch is None else micro_batch
    numbers = row_numbers(step, batch_size, micro_batch, rank, world_size)
    check_step(rows, step, batch_size)
    return rows.take(numbers.ravel()).reshape(*numbers.shape, rows.seq_len + 1)


def weights(
    rows: Rows, step: int, batch_size: int, micro_batch: int, rank: int = 0, world_size: int = 1
) -> np.ndarray | None:
    """Return the weights of the losses of a rank's batch: float32 [micro_steps, micro_batch, seq_len], or None if the
    edits leave all at 1."""
    numbers = row_numbers(step, batch_size, micro_batch, rank, world_size)
    found = rows.weights(numbers.ravel())
    return None if found is None else found.reshape(*numbers.shape, rows.seq_len)


def check_step(rows: Rows, step: int, batch_size: int) -> None:
    """Raise UserError if the data ends before the step."""
    steps = len(rows) // batch_size
    if not 0 <= step < steps:
        raise UserError(f"step {step}: the data has {steps} steps of {batch_size} rows ({len(rows)} rows); first is 0")


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


def open_rows(
    data: str | Path,
    samples: int,
    seq_len: int = 2048,
    seed: int = 1234,
    edits: str | Path | None = None,
    batch_size: int = 1024,
) -> Rows:
    """Open --data: a Megatron prefix, a pre-shuffled directory, or "demo". Raises UserError if it is none of these.

    edits is a file of corpus/edits.py; batch_size names the step in its messages. Raises UserError if it is of others.
    """
    return with_edits(order_rows(*open_tokens(data), samples, seq_len, seed), edits, batch_size)


def with_edits(rows: Rows, file: str | Path | None, batch_size: int) -> Rows:
    """Let rows be served with the edits of a file; without one, as they are. Raises UserError if they do not fit."""
    if file:
        edits = Edits(file, batch_size)
        edits.check_rows(rows)
        rows.edits = edits
    return rows


def order_rows(data: IndexedTokens, shuffled: bool, samples: int, seq_len: int, seed: int) -> Rows:
    """The rows of open_tokens. Raises UserError as open_rows."""
    return ShuffledRows(data, seq_len) if shuffled else Order(data, samples, seq_len, seed)


def open_tokens(data: str | Path) -> tuple[IndexedTokens, bool]:
    """Return the tokens of --data, and whether they are pre-shuffled rows. Raises UserError as open_rows."""
    path = locate(data)
    if os.path.lexists(path / "document.idx"):  # unlike Path.exists, it raises nothing
        return IndexedTokens(path / "document"), True
    if os.path.lexists(f"{path}.idx"):
        return IndexedTokens(path), False
    prefix = Path(re.sub(r"(-\d{5}-of-\d{5})?\.(bin|idx)$", "", str(path)))
    if prefix != path and os.path.lexists(f"{prefix}.idx"):
        raise UserError(f"--data {data}: did you mean {prefix.parent if prefix.name == 'document' else prefix}?")
    raise UserError(
        f"--data {data}: neither {path}.idx (a prefix) nor {path}/document.idx (a pre-shuffled directory) exists;"
        " make a prefix with `python data.py prepare`"
    )


def requested_samples(steps: int, batch_size: int) -> int:
    """Return how many rows the order needs: 0.5% more than the steps use, as in GPT-NeoX for a list of paths. The
    arithmetic is that of NeoX, in floating point: one row more can mean one epoch more, and so another order."""
    if steps < 1 or batch_size < 1:
        raise UserError(f"--steps {steps} and --batch-size {batch_size} must be at least 1")
    if steps * batch_size >= 2**53:  # beyond it, floating point skips whole numbers
        raise UserError(f"--steps {steps} and --batch-size {batch_size} are too many rows")
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
    """Return what a run records about its data. Tokens of 1 GB and more are hashed only by `data.py info --hash`."""
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
        "bin_sha256": known_sha256(data),
        "shards": [
            {
                "name": shard.path.name,
                "bytes": shard.bytes,
                "sample_sha256": sample_sha256(shard),
            }
            for shard in data.shards
        ],
        "modified_ns": [shard.status.st_mtime_ns for shard in data.shards],
    } | edits_record(rows.edits)


def edits_record(edits: Edits | None) -> dict:
    return {"edits": {"file": str(edits.path), "sha256": edits.sha256, "edits": edits.count}} if edits else {}


def edits_difference(stored: dict, here: dict) -> list[str]:
    """Return a phrase if the edits of two fingerprints differ, else []. Raises as fingerprint_differences."""
    there, now = (f["edits"]["sha256"] if "edits" in f else None for f in (stored, here))
    names = [f"sha256 {sha256[:12]}…" if sha256 else "none" for sha256 in (there, now)]
    return [] if there == now else [f"--edits ({names[0]} there, {names[1]} here)"]


def known_sha256(data: IndexedTokens) -> str | None:
    """Return the sha256 of all tokens, or None if they are 1 GB or more and `hash_once` has not hashed them, or if a
    shard is absent."""
    small = data.tokens * data.dtype.itemsize < HASHED_AT_ONCE and all(shard.status for shard in data.shards)
    return data.tokens_sha256() if small else stored_sha256(data)


def hash_once(data: IndexedTokens) -> str:
    """Return the sha256 of all tokens. It is stored beside the data, in PREFIX.sha256.json, until a file changes."""
    path, known = Path(f"{data.prefix}.sha256.json"), stored_sha256(data)
    if known:
        return known
    computed = data.tokens_sha256()
    try:
        write_mark(path, data.shards, sha256=computed)
    except OSError as error:
        print(printable(f"note: {path} cannot be written ({reason(error)}); the hash is not kept"), file=sys.stderr)
    return computed


def stored_sha256(data: IndexedTokens) -> str | None:
    """Return the sha256 that `hash_once` stored, or None: the files have changed since, or another user stored it."""
    try:
        stored = read_mark(Path(f"{data.prefix}.sha256.json"), data.shards)["sha256"]
        return stored if re.fullmatch("[0-9a-f]{64}", stored) else None
    except (UserError, *DAMAGE):
        return None


def sample_sha256(file: DataFile, count: int = 66, size: int = 1 << 16) -> str:
    """Return the sha256 of `count` blocks of a file, from its first to its last byte; of the whole of a small file."""
    if file.bytes <= count * size:
        return sha256(file.blocks("hashing the tokens"))
    return sha256(file.read(k * (file.bytes - size) // (count - 1), size) for k in range(count))


def fingerprint_differences(stored: dict, here: dict) -> list[str]:
    """Return how the data of two fingerprints differ, for a message; [] for the same data, also at another place.
    Edits are not compared.

    Compares what both have, because older ones have less. Raises LookupError, TypeError or ValueError if `stored` is
    damaged.
    """
    found = []
    if stored["order_sha256"] != here["order_sha256"]:
        there, now = stored["order_sha256"][:12], here["order_sha256"][:12]
        found.append(f"the order of the data (sha256 {there}… there, {now}… here)")
    for name in ("dtype", "tokens"):
        if stored[name] != here[name]:
            found.append(f"the {name} of the data ({stored[name]} there, {here[name]} here)")
    hashes = stored.get("bin_sha256"), here.get("bin_sha256")
    if all(hashes) and hashes[0] == hashes[1]:
        return found  # the same tokens, perhaps in other shards
    old, new = stored.get("shards") or [], here["shards"]
    if old and [shard["bytes"] for shard in old] != [shard["bytes"] for shard in new]:
        found.append(f"the number or sizes of the token files ({len(old)} there, {len(new)} here)")
    elif changed := [b["name"] for a, b in zip(old, new) if a["sample_sha256"] != b["sample_sha256"]]:
        found.append(f"the tokens in {', '.join(changed)}")
    elif all(hashes):
        found.append(f"the tokens in {', '.join(shard['name'] for shard in new)} (sha256 {hashes[0][:12]}… there)")
    return found


def run_prepare(args: argparse.Namespace) -> None:
    """Convert text to PREFIX.bin, PREFIX.idx and PREFIX.tokenizer.json. A .jsonl or .ndjson file has one document per
    line, {"text": "..."}. Files of another format (.json, .csv, .parquet, .tar, .pdf, ...) are refused. Any other file
    is one document of UTF-8 text. All may be compressed (.zst, .gz). An <|endoftext|> in a text becomes id 0, as in
    GPT-NeoX. The same command goes on after a kill: until all is complete, the work lies in PREFIX.preparing."""
    signal.signal(signal.SIGTERM, end)
    share = parse_share(args.shard)
    data = prepare(args.input, args.out, args.tokenizer, args.workers, args.text_key, args.skip_bad, share)
    print_made(args.out, data)


def run_merge(args: argparse.Namespace) -> None:
    """Write data sets as one, in the order in which they are named. All shards of `data.py prepare` give the bytes that
    it gives on one machine."""
    signal.signal(signal.SIGTERM, end)
    print_made(args.out, merge(args.input, args.out))


def end(number: int, frame) -> None:
    """On SIGTERM the command cleans up, as on Ctrl-C."""
    sys.exit(128 + number)


def print_made(out: str, data: IndexedTokens) -> None:
    print(printable(f"{out}: {data.documents:,} documents, {data.tokens:,} tokens of {data.dtype.name}"))


def run_info(args: argparse.Namespace) -> None:
    """Print what the data is, then the epochs, the steps and the sha256 of its order."""
    note = take_settings(args)
    samples, order_of = requested_samples(args.steps, args.batch_size), f"{args.steps:,} steps"
    data, shuffled = open_tokens(args.data)
    print_facts(
        {
            "kind": "pre-shuffled rows" if shuffled else "documents, shuffled by seed",
            "files": "\n             ".join(map(str, [data.index_file, *data.files])),
            "absent": "\n             ".join(str(shard.path) for shard in data.shards if not shard.status) or None,
            "tokenizer": find_tokenizer(args.data),
            "dtype": data.dtype.name,
            "tokens": data.tokens,
            "bytes": data.tokens * data.dtype.itemsize,
            "documents": None if shuffled else data.documents,
            "idx_sha256": data.index_sha256,
            "bin_sha256": (hash_once if args.hash else known_sha256)(data) or "not known; --hash computes it once",
        }
    )
    if args.assumed_steps and not shuffled and epochs_for(samples, args.seq_len, data.tokens) > MANY_EPOCHS:
        samples, order_of = max((data.tokens - 1) // args.seq_len, 1), "one epoch; for that of a run give --run RUN"
    rows = order_rows(data, shuffled, samples, args.seq_len, args.seed)
    if args.verify:
        rows.verify("verifying the order")
    if args.run:
        check_data(args, rows)
    print_facts(
        {
            "order of": None if shuffled else order_of,
            "epochs": None if shuffled else rows.epochs,
            "rows": len(rows),
            "order_sha256": rows.sha256,
            "steps": f"{len(rows) // args.batch_size:,} of {args.batch_size:,} rows of {args.seq_len + 1:,} tokens",
            "absent rows": (absent_rows(rows) or None) if shuffled else None,
        }
    )
    print_repeats(args, rows)
    print(note, file=sys.stderr, end="\n" * bool(note))


def print_repeats(args: argparse.Namespace, rows: Rows) -> None:
    """Print what --seen and --duplicates ask for."""
    if args.seen is not None:
        if not 0 <= args.seen <= len(rows) // args.batch_size:
            raise UserError(f"--seen {args.seen}: the data has {len(rows) // args.batch_size:,} steps")
        shares = describe_times(times_trained(rows, args.seen * args.batch_size))
        print_facts({"seen": f"after {args.seen:,} steps, as targets: {shares} of {rows.data.tokens:,} tokens"})
    if args.duplicates:
        served = served_rows(rows, args.batch_size, args.steps)
        found = {"rows": (repeated_rows(rows, served), served)}
        if isinstance(rows, Order):
            found = {"documents": (repeated_documents(rows.data), rows.data.documents)} | found
        text = ", ".join(f"{count:,} of {total:,} {name}" for name, (count, total) in found.items())
        print_facts({"duplicates": f"{text} equal an earlier one"})


def print_facts(facts: dict) -> None:
    for name, fact in facts.items():
        if fact is not None:
            print(printable(f"{name:<12} {fact:,}" if isinstance(fact, int) else f"{name:<12} {fact}"), flush=True)


def take_settings(args: argparse.Namespace) -> str:
    """Fill in the settings that the command line leaves open: from --run, with --demo, or with the defaults.

    Returns a note that says which ones it assumed, or "". Raises UserError if --run has others than the command line.
    """
    given = {name: getattr(args, name) for name in DEFAULTS if getattr(args, name) is not None}
    settings, args.assumed_steps, note = DEFAULTS | (DEMO if args.demo else {}), False, ""
    if args.run:
        given = (DEMO if args.demo else {}) | given
        settings, args.recorded_data = read_settings(Path(args.run))
        for name, value in given.items():
            if value != settings[name] and name != "data":  # data may have been moved; check_data compares it
                raise UserError(
                    f"{flag(name)} {value}: the run {args.run} has {settings[name]}; leave out {flag(name)}"
                )
        path = DEMO_PREFIX if settings["data"] == "demo" else Path(settings["data"])
        if "data" not in given and not any(map(os.path.lexists, (f"{path}.idx", path / "document.idx"))):
            raise UserError(
                f"--data {settings['data']} of {args.run}/run.json is not here, perhaps because the run was started in"
                " another directory: give the place of the data as --data"
            )
    elif not args.demo:
        args.assumed_steps = "steps" not in given
        if assumed := ", ".join(f"{name} {value}" for name, value in settings.items() if name not in given):
            note = f"note: assumed as in train.py: {assumed}; --run RUN takes those of a run"
    vars(args).update(settings | given)
    return note


def read_settings(run: Path) -> tuple[dict, dict]:
    """The settings in RUN/run.json that decide which rows a step has, and the fingerprint of the data there.

    Raises UserError if run.json is missing or damaged.
    """
    stored = read_run(run, "--run needs the directory of a run")
    settings = stored["settings"]
    for name, default in DEFAULTS.items():
        if type(settings.get(name)) is not type(default):
            raise UserError(f"{run / 'run.json'} is damaged: {name} is {str(settings.get(name))[:100]!r}")
    return {name: settings[name] for name in DEFAULTS}, stored["data"]


def check_data(args: argparse.Namespace, rows: Rows) -> None:
    """Raise UserError, which names the differences, if the rows are made of other data than those of --run."""
    try:
        differences = fingerprint_differences(args.recorded_data, fingerprint(rows))
    except DAMAGE as error:
        raise UserError(f"{args.run}/run.json is damaged ({error!r})") from None
    if differences:
        raise UserError(f"--data {args.data} is not the data of {args.run}: {', '.join(differences)}")


def recorded_edits(args: argparse.Namespace) -> dict:
    """What run.json of --run says about its edits: their file and sha256, or {}. Raises UserError if it is damaged."""
    edits = args.recorded_data.get("edits", {}) if args.run else {}
    if edits and not (isinstance(edits, dict) and all(type(edits.get(name)) is str for name in ("file", "sha256"))):
        raise UserError(f"{args.run}/run.json is damaged: edits is {str(edits)[:100]!r}")
    return edits


def add_edits(args: argparse.Namespace, rows: Rows) -> bool:
    """Let rows be served with --edits, or else with the edits of --run. Returns whether --run has the same edits.

    Raises UserError if they do not fit the rows, or if those of --run have changed.
    """
    recorded = recorded_edits(args)
    with_edits(rows, args.edits or recorded.get("file"), args.batch_size)
    is_same = recorded.get("sha256") == (rows.edits.sha256 if rows.edits else None)
    if args.run and not is_same and not args.edits:
        raise UserError(f"{recorded['file']} is not as {args.run} had it: give the edits of the run as --edits")
    return is_same


def note_edits(args: argparse.Namespace) -> None:
    """Say that a command does not know the edits of --run."""
    if recorded := recorded_edits(args):
        note = f"note: {args.run} trained with the edits {recorded['file']}; these are the places without them"
        print(printable(note), file=sys.stderr)


def compare_with_run(run: Path, step: int, tokens: np.ndarray) -> None:
    """Say whether tokens [batch, seq_len + 1] are those that the run recorded. Raises UserError if they are not."""
    recorded, here = recorded_batch(run / "metrics.jsonl", step), digest(row_digests(tokens))
    if recorded is None:
        print(printable(f"note: {run} has no record of step {step} to compare with"), file=sys.stderr)
    elif recorded != here:
        raise UserError(
            f"step {step}: these rows are not those of the run: {run}/metrics.jsonl has batch_sha256 {recorded[:12]}…,"
            f" they have {here[:12]}…; the data has changed, or that file"
        )
    else:
        print(printable(f"these rows are those that {run} recorded for step {step}"), file=sys.stderr)


def open_asked(args: argparse.Namespace) -> Rows:
    """Return the rows of the settings of take_settings, compared with --run. Raises UserError."""
    samples = requested_samples(args.steps, args.batch_size)
    data, shuffled = open_tokens(args.data)
    if not shuffled and args.assumed_steps and (n := epochs_for(samples, args.seq_len, data.tokens)) > MANY_EPOCHS:
        raise UserError(
            f"{args.steps:,} steps are {n:,} epochs of {args.data}, and the number of epochs decides the order:"
            " give --run RUN, or --steps as in train.py"
        )
    rows = order_rows(data, shuffled, samples, args.seq_len, args.seed)
    if args.run:
        check_data(args, rows)
    return rows


def run_view(args: argparse.Namespace) -> None:
    """Print what the model saw in a step, as text if there is a tokenizer, and the documents that it came from."""
    note = take_settings(args)
    if not 0 <= args.step < args.steps:
        raise UserError(f"step {args.step}: the run has the steps 0 .. {args.steps - 1} (--steps {args.steps})")
    if args.row is not None and not 0 <= args.row < args.batch_size:
        raise UserError(f"--row {args.row}: a step has rows 0 .. {args.batch_size - 1}")
    rows = open_asked(args)
    is_of_run = add_edits(args, rows)
    check_step(rows, args.step, args.batch_size)
    chosen = np.arange(args.batch_size) if args.row is None else np.array([args.row])
    if args.run:  # its record is a hash of the whole batch
        whole = batch(rows, args.step, args.batch_size)[0]
        if is_of_run:
            compare_with_run(Path(args.run), args.step, whole)
        else:
            print(printable(f"note: {args.run} was trained without {args.edits}"), file=sys.stderr)
        tokens = whole[chosen]
    else:
        tokens = rows.take(args.step * args.batch_size + chosen)  # [rows, seq_len + 1]
    if args.export:
        export(tokens, Path(args.export))
    else:
        print_rows(args, rows, tokens, chosen.tolist())
    print(note, file=sys.stderr, end="\n" * bool(note))


def run_find(args: argparse.Namespace) -> None:
    """Print which steps saw a document, a text or tokens: every row that has them, and where."""
    note = take_settings(args)
    note_edits(args)
    find(args, open_asked(args), args.tokenizer or find_tokenizer(args.data))
    print(note, file=sys.stderr, end="\n" * bool(note))


def run_count(args: argparse.Namespace) -> None:
    """Print how often a run has seen a text, tokens, or each of many terms: occurrences that lie whole in a row, the
    rows and the documents that have one, by the checkpoints of --at."""
    note = take_settings(args)
    note_edits(args)
    count(args, open_asked(args), args.tokenizer or find_tokenizer(args.data))
    print(note, file=sys.stderr, end="\n" * bool(note))


def run_edit(args: argparse.Namespace) -> None:
    """Make a file of edits, an intervention in what a run sees, for --edits of train.py; show and undo such a file."""
    note = take_settings(args)
    note_edits(args)
    args.make(args, open_asked(args), args.tokenizer or find_tokenizer(args.data))
    print(note, file=sys.stderr, end="\n" * bool(note))


def run_index(args: argparse.Namespace) -> None:
    """Build PREFIX.suffixes, with which find and count need not read all tokens. Needs 4 bytes per token on the disk,
    and up to 5.4 GB of memory (10 bytes per token of 2 bytes). The same command again resumes."""
    build_index(open_tokens(args.data)[0], args.shard)


def run_verify_order(args: argparse.Namespace) -> None:
    """Compare the order of PREFIX.idx, without tokens, with the one that EleutherAI published for Pythia and for other
    seeds. Only hashes travel. The exit status is 1 if they differ."""
    note = take_settings(args)
    samples = requested_samples(args.steps, args.batch_size)
    order = Order(IndexedTokens(locate(args.data), with_tokens=False), samples, args.seq_len, args.seed)
    if problems := compare(order, samples, args.seed):
        print(printable("\n".join(problems)))
        raise SystemExit(1)
    print(printable(f"{args.data}.idx gives the published order: sha256 {order.sha256}"))
    print(note, file=sys.stderr, end="\n" * bool(note))


def print_rows(args: argparse.Namespace, rows: Rows, tokens: np.ndarray, chosen: list[int]) -> None:
    """Print the chosen rows of a step, tokens [len(chosen), seq_len + 1], as text if a tokenizer knows their ids."""
    file = args.tokenizer or find_tokenizer(args.data)
    tokenizer, last = load_tokenizer(file) if file else None, -1
    if tokenizer:
        with tokenizer_errors(file):
            last = max(tokenizer.get_vocab().values(), default=-1)
    for k, row in zip(chosen, tokens):
        number, origin = args.step * args.batch_size + k, ""
        if isinstance(rows, Order):
            origin = ": " + ", ".join(f"document {d} from {offset} ({n})" for d, offset, n in rows.pieces(number))
        print(f"--- step {args.step}, row {k} of {args.batch_size} (row {number} of the order){origin}")
        ids = row.tolist()
        unknown = [id for id in ids if not 0 <= id <= last]  # decode would leave them out, or fail
        if tokenizer and not unknown:
            with tokenizer_errors(file):
                text = tokenizer.decode(ids, skip_special_tokens=False)
            print(printable(text))
            continue
        if tokenizer:
            note = f"note: row {k}: token id {unknown[0]} is not in the tokenizer {file}; these are the ids of the row"
            print(printable(note), file=sys.stderr)
        print(" ".join(map(str, ids)))


def export(array: np.ndarray, path: Path) -> None:
    """Write a new .npy file. Raises UserError, and writes nothing, if it exists or cannot be written."""
    if os.path.lexists(path):  # unlike Path.exists, it raises nothing
        raise UserError(f"{path} exists; choose another name or delete it")
    try:
        with atomic_write(path) as file:
            np.save(file, array, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; nothing was written") from None
    print(printable(f"{path}: {array.dtype.name} {[*array.shape]}"))


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="data.py", description="Prepare, describe and show training data.")
    commands = parser.add_subparsers(required=True, metavar="prepare | fetch | info | view | find | count | edit | ...")

    def add(name: str, run, example: str) -> Parser:
        text, example = run.__doc__, f"example: python data.py {name} {example}"
        command = commands.add_parser(name, help=text, description=text, epilog=example)
        command.set_defaults(command=run)
        return command

    command = add("prepare", run_prepare, "--input wiki.jsonl.zst notes.txt --out corpora/mine")
    command.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="in order; - is JSON lines from stdin"
    )
    command.add_argument("--out", required=True, metavar="PREFIX", help="must not exist yet")
    command.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json; id 0 is <|endoftext|> (default: bytes)")
    command.add_argument("--workers", type=int, metavar="N", help="threads that encode (default: one per core)")
    command.add_argument("--text-key", default="text", metavar="KEY", help="of JSON lines (default: %(default)s)")
    command.add_argument("--skip-bad", action="store_true", help="leave bad JSON lines out, print their number")
    command.add_argument("--shard", metavar="3/16", help="only the fourth 16th of the bytes; see `data.py merge`")
    command = add("merge", run_merge, "--input corpora/mine-00 corpora/mine-01 --out corpora/mine")
    command.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="in order")
    command.add_argument("--out", required=True, metavar="PREFIX", help="must not exist yet")

    add_fetch_arguments(add("fetch", run_fetch, "standard --step 1000"))
    info = add("info", run_info, "--data corpora/mine --steps 1000")
    view = add("view", run_view, "--run runs/pythia-14m --step 10 --row 3")
    add_find_arguments(finder := add("find", run_find, '--run runs/pythia-14m --text "def main("'))
    add_count_arguments(counter := add("count", run_count, "--run runs/pythia-14m --terms terms.txt --at 10,20,60"))
    add_index_arguments(add("index", run_index, "--data corpora/mine"))
    published = add("verify-order", run_verify_order, "--data pile/standard-documents/pile_20B_tokenizer_text_document")
    edits = add_edit_arguments(add("edit", run_edit, "plant --demo --plants facts.jsonl --out planted.parquet"))
    for command in (info, view, finder, counter, published, *edits):
        command.add_argument("--run", metavar="RUN", help="take all settings from this run; view checks its rows")
        command.add_argument("--demo", action="store_true", help="the rows of `train.py --demo`")
        command.add_argument("--data", help="prefix, pre-shuffled directory, or `demo` (default: demo)")
        for name, text in (
            ("seed", "as given to train.py"),
            ("seq_len", "tokens per row"),
            ("batch_size", "rows per step"),
            ("steps", "steps of the whole run"),
        ):
            text = f"{text} (default: {DEFAULTS[name]}; with --demo {(DEFAULTS | DEMO)[name]})"
            command.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    info.add_argument("--hash", action="store_true", help="hash all tokens, and store the hash beside the data")
    info.add_argument("--verify", action="store_true", help="read index and order again, though they were checked once")
    info.add_argument("--seen", type=int, metavar="N", help="share of tokens trained on never, once ... in N steps")
    info.add_argument("--duplicates", action="store_true", help="count equal documents and rows; reads all tokens")
    view.add_argument("--step", type=int, required=True, metavar="T", help="the first step is 0")
    view.add_argument("--row", type=int, metavar="R", help="only this row of the step; the first row is 0")
    view.add_argument("--edits", metavar="FILE", help="show the rows with these edits (default: with those of --run)")
    view.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json (default: the one beside the data)")
    view.add_argument("--export", metavar="FILE.npy", help="write tokens [rows, seq_len + 1] instead (Pythia: uint16)")

    args = parser.parse_args(arguments)
    args.command(args)


if __name__ == "__main__":
    run_command(main)
