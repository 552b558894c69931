"""The loss of every training row when the model first met it; and with --probe the loss of given texts in time.

Without --probe the command reads RUN/row_loss.bin, and no checkpoint. `excess` is the loss of a row minus the mean of
its step: what is left when the progress of the run is taken away. --every and --limit choose rows.

    items.parquet    every row: row, step, document and epoch of its first token, same_as and copy (rows with exactly
                     its tokens, and how many of them came before), loss, excess
    summary.csv      by parts of training: mean and quantiles of the loss; excess of first and later sights of a
                     document, and of first and later copies of a row
    documents.csv    every document that several rows begin in: mean excess, and its error
    probes.csv       if the run was trained with --probes: the mean surprisal of every text, in time

With --probe FILE.jsonl, one {"text": ".."} or {"tokens": [..]} a line, items.parquet has every text under every
checkpoint: nll, the surprisal in nats of each token but the first, given those before it; NaN after the end of a text.
"""

from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from corpus.indexed import block_slices
from corpus.order import row_digests
from corpus.probes import pad, read_probes
from model import Pythia
from runtime.errors import Parser, UserError, run_command
from runtime.files import READ_ERRORS, atomic_write, open_regular, reason
from runtime.run_directory import one_line_errors, read_run
from studies import figures
from studies.common import Columns, Run, Study, all_ranks, study_parser, write_csv
from studies.likelihood import tokenizer_of
from studies.memorization import describe_rows, mean

PARTS = 50  # of training, in summary.csv
QUANTILES = (5, 25, 50, 75, 95)

# ---- rows of training ------------------------------------------------------------------------------------------------


def read_losses(path: Path, width: int) -> np.ndarray:
    """row_loss.bin or probe_loss.bin of a run: float32 [records, width]; whole records only. Raises UserError."""
    try:
        with open_regular(path) as file:
            losses = np.frombuffer(file.read(), "<f4")
    except READ_ERRORS as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    return losses[: len(losses) // width * width].reshape(-1, width)


def trace_rows(run: Run, losses: np.ndarray, numbers: np.ndarray) -> Columns:
    """The columns of items.parquet for some rows of a run. Those before a branch, whose loss is NaN, are left out."""
    numbers = numbers[~np.isnan(losses[numbers])]
    if not len(numbers):
        raise UserError(f"{run.path}/row_loss.bin knows the loss of none of these rows")
    steps = losses.reshape(-1, run.asked.batch_size).mean(1, dtype=np.float64)
    blocks = block_slices(len(numbers), "reading rows", 1 << 12)
    items = describe_rows(
        run, numbers, np.concatenate([row_digests(run.rows.take(numbers[block])) for block in blocks])
    )
    step = items.pop("seen_at")
    return items | {"step": step, "loss": losses[numbers], "excess": (losses[numbers] - steps[step]).astype(np.float32)}


def parts_of_training(items: Columns) -> list[dict]:
    """The lines of summary.csv: every part has the same number of rows, or nearly."""
    lines = []
    for part in np.array_split(np.arange(len(items["row"])), min(PARTS, len(items["row"]))):
        one = {name: values[part] for name, values in items.items()}
        line = {"first_step": int(one["step"][0]), "last_step": int(one["step"][-1]), "rows": len(part)}
        line |= {"loss": mean(one["loss"])}
        line |= {f"q{q}": value for q, value in zip(QUANTILES, np.percentile(one["loss"], QUANTILES).tolist())}
        for name, key in (("sight", "epoch"), ("copy", "copy")):
            line[f"excess_first_{name}"] = mean(one["excess"][one[key] <= 0])
            line[f"excess_later_{name}"] = mean(one["excess"][one[key] > 0])
        lines.append(line)
    return lines


def documents_of(items: Columns) -> list[dict]:
    """The lines of documents.csv, the most surprising document first."""
    known = items["document"] >= 0
    documents, group, counts = np.unique(items["document"][known], return_inverse=True, return_counts=True)
    excess = items["excess"][known].astype(np.float64)
    means = np.bincount(group, excess) / counts
    squares = np.bincount(group, (excess - means[group]) ** 2)
    several = np.flatnonzero(counts > 1)
    errors = np.sqrt(squares[several] / (counts[several] - 1) / counts[several])
    columns = documents[several], counts[several], means[several], errors
    order = np.argsort(-columns[2], kind="stable")
    lines = zip(*(column[order].tolist() for column in columns))
    return [dict(zip(("document", "rows", "excess", "error"), line)) for line in lines]


def trace_run(run: Run, study: Study) -> None:
    losses = read_losses(run.path / "row_loss.bin", run.asked.batch_size).ravel()
    items = trace_rows(run, losses, study.sample(len(losses)))
    tables = {"summary": parts_of_training(items), "documents": documents_of(items), "probes": recorded_probes(run)}
    path = study.out / "items.parquet"
    with one_line_errors(path):
        study.out.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            pq.write_table(pa.table(items), file)
    for name, lines in tables.items():
        if lines:
            write_csv(study.out / f"{name}.csv", lines)
    study.write_manifest({})
    figures.draw_rows(study.out, tables["summary"])
    if tables["probes"]:
        figures.draw_probes(study.out, tables["probes"])


# ---- probes ----------------------------------------------------------------------------------------------------------


def recorded_probes(run: Run) -> list[dict]:
    """The lines of probes.csv of a run that was trained with --probes, else []. Raises UserError."""
    if not (probes := read_run(run.path).get("probes")):
        return []
    try:
        counts, every = np.array(probes["lengths"]) - 1, probes["every"]  # counts: losses of each text
        losses = read_losses(run.path / "probe_loss.bin", counts.sum())
        means = np.add.reduceat(losses, counts.cumsum() - counts, axis=1, dtype=np.float64) / counts
    except READ_ERRORS as error:
        raise UserError(f"{run.path}/run.json is damaged ({error!r})") from None
    means = {i * every: line.tolist() for i, line in enumerate(means) if not np.isnan(line).all()}
    return [{"run": run.name, "step": t, "text": i, "nll": nll} for t in means for i, nll in enumerate(means[t])]


def measure_probes(study: Study, probes: list[list[int]], batch: int = 16) -> None:
    """Measure the surprisal of every token of the probes under all checkpoints of all runs."""
    tokens, counts = pad(probes)
    lengths = counts.sum(1, dtype=np.int32) + np.int32(1)

    def compute(step: int, model: Pythia, columns: Columns) -> Columns:
        if (most := int(columns["tokens"].max())) >= model.config.vocab:
            raise UserError(f"a probe has token id {most}, the model has {model.config.vocab} ids")
        rows = torch.from_numpy(columns["tokens"]).to(study.device)
        nll = model(rows[:, :-1], rows[:, 1:], "none").float().cpu().numpy()  # [texts, longest - 1]
        nll[np.arange(nll.shape[1]) >= columns["length"][:, None] - 1] = np.nan
        return {"nll": nll}

    items = {"text": np.arange(len(probes), dtype=np.int32), "length": lengths}
    for run in study.runs:
        study.measure(run, items, compute, batch, {"tokens": tokens})


def write_probes(study: Study) -> None:
    """Write probes.csv, the mean surprisal of every text under every checkpoint, and draw it."""
    lines = []
    for run in study.runs:
        for step in run.steps:
            means = np.nanmean(study.columns(run, step)["nll"], axis=1, dtype=np.float64)
            lines += [{"run": run.name, "step": step, "text": i, "nll": nll} for i, nll in enumerate(means.tolist())]
    write_csv(study.out / "probes.csv", lines)
    figures.draw_probes(study.out, lines)


def add_probe_flags(parser: Parser, required: bool = False) -> None:
    parser.add_argument("--probe", type=Path, metavar="FILE.jsonl", required=required, help="texts, or tokens")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: of the last checkpoint)"
    )


def probes_of(study: Study, args) -> list[list[int]]:
    """The probes of the command line that --every and --limit leave."""
    run = study.runs[0]
    probes = read_probes(args.probe, cache(partial(tokenizer_of, run.path, run.steps[-1], args.tokenizer)))
    return [probes[i] for i in study.sample(len(probes))]


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser("trace", __doc__.split("\n\n")[0])
    add_probe_flags(parser)
    args = parser.parse_args(arguments)
    with all_ranks() as dist:
        study = Study("trace", args, {}, dist)
        if args.probe:
            measure_probes(study, probes_of(study, args))
            study.finish(lambda run, step, items: {"nll": float(np.nanmean(items["nll"]))})
            dist.run_on_main(lambda: write_probes(study))
        elif len(study.runs) > 1:
            raise UserError("give one RUN, or --probe")
        else:
            dist.run_on_main(lambda: trace_run(study.runs[0], study))


if __name__ == "__main__":
    run_command(main)
