"""Which rows a checkpoint has memorized, and how that came about in training.

A row is (k, l)-memorized if its first k tokens make the model write the next l, by greedy generation. One forward pass
of k + l - 1 tokens decides it: as long as every prediction is right, generation reads the tokens of the row itself. So
32 tokens of a row cost one pass, not 32.

The rows that a checkpoint has not seen yet, and those that the run never serves, are measured too. They are the
baseline: what a model can continue without having seen it (counting, licences, boilerplate) is not memory.

    items.parquet    every row under every checkpoint: memorized, first_miss (correct tokens before the first miss),
                     nll (mean surprisal of the l tokens, nats), margin (the least distance of a true logit from the
                     best other one: near 0 the flag can differ in another dtype), with --score the score of a free run
    summary.csv      rates with intervals, baseline, and the tests of studies/statistics.py
    effect.csv       how much training on rows lowers their surprisal, against rows that are not seen yet
    doses.csv        the rate by the number of times that the k + l tokens have been seen
    prediction.csv   how well each checkpoint predicts the memorized rows of the last one
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpus.indexed import block_slices
from corpus.order import Rows, row_digests, served_rows
from model import Pythia
from model.sizes import END_OF_TEXT
from runtime.errors import UserError, run_command
from studies import figures
from studies.common import Columns, Run, Study, all_ranks, find_run, study_parser, write_csv
from studies.likelihood import compare_greedy, write_greedy
from studies.statistics import (
    count_events,
    difference_in_differences,
    poisson_tests,
    prediction,
    rank_correlation,
    wilson,
)

NEAR_TIE = 0.01  # margins in logits that rounding can turn over

# ---- the measurement -------------------------------------------------------------------------------------------------


def measure_rows(model: Pythia, tokens: Tensor, k: int, banned: int | None = None, score: bool = False) -> Columns:
    """The columns of items.parquet for rows whose first k + l tokens are tokens [batch, k + l]."""
    if int(tokens.max()) >= model.config.vocab:
        raise UserError(f"token id {int(tokens.max())} is not one of the {model.config.vocab} of the model")
    targets = tokens[:, k:]
    y = model.final_hidden(tokens[:, :-1])[:, k - 1 :]  # [batch, l, hidden]
    hit, margin, nll = compare_greedy(y.flatten(0, 1), model.unembed, targets.flatten(), banned)
    hit = hit.view(targets.shape)
    memorized = hit.all(1)
    columns = {
        "memorized": memorized,
        "first_miss": hit.cumprod(1).sum(1).to(torch.int16),
        "nll": nll.view(targets.shape).mean(1).float(),
        "margin": margin.view(targets.shape).amin(1).float(),
    }
    if score:
        columns["score"] = memorized.float()
        if not memorized.all():
            written = write_greedy(model, tokens[~memorized, :k], targets.shape[1], banned)
            columns["score"][~memorized] = (written == targets[~memorized]).float().mean(1)
    return {name: values.cpu().numpy() for name, values in columns.items()}


def read_starts(rows: Rows, numbers: np.ndarray, width: int, label: str = "") -> np.ndarray:
    """The first tokens of rows: [numbers, width] in the dtype of the data. Raises UserError if rows are shorter."""
    if width > rows.seq_len + 1:
        raise UserError(f"--k and --l are {width} tokens together, a row has {rows.seq_len + 1}")
    blocks = block_slices(len(numbers), label, 1 << 12)
    return np.concatenate([rows.take(numbers[block])[:, :width] for block in blocks])


def describe_rows(run: Run, numbers: np.ndarray, digests: np.ndarray) -> Columns:
    """What is known of rows without a model: where they come from, when they are seen, which have the same tokens, by
    digests of these tokens [numbers, 32]."""
    served = served_rows(run.rows, run.asked.batch_size, run.asked.steps)
    _, first, group = np.unique(digests.view("S32")[:, 0], return_index=True, return_inverse=True)
    order = np.argsort(group, kind="stable")
    copy = np.empty(len(numbers), np.int32)
    copy[order] = np.arange(len(numbers)) - np.searchsorted(group[order], group[order])
    return {
        "row": numbers,
        "seen_at": np.where(numbers < served, numbers // run.asked.batch_size, -1).astype(np.int32),  # step; -1: never
        "same_as": numbers[first[group]],  # the first of these rows with the same tokens
        "copy": copy,  # how many of them come before this row
        **run.origins(numbers),
    }


# ---- the tables ------------------------------------------------------------------------------------------------------


def seen(items: Columns, step: int) -> np.ndarray:
    """Which rows a checkpoint has been trained on: bool [items]."""
    return (items["seen_at"] >= 0) & (items["seen_at"] < step)


def summary_of(items: Columns, step: int, width: int, reference: np.ndarray | None) -> dict:
    """The line of summary.csv of a checkpoint. width: rows of a slice. reference: nll of a model of another order."""
    old, memorized = seen(items, step), items["memorized"]
    line = {}
    for name, group in (("", old), ("_unseen", ~old)):
        low, high = wilson(memorized[group].sum(), group.sum())
        line |= {f"rows{name}": int(group.sum()), f"memorized{name}": int(memorized[group].sum())}
        line |= {f"rate{name}": mean(memorized[group]), f"low{name}": low, f"high{name}": high}
        line[f"nll{name}"] = mean(items["nll"][group])
    line["excess"] = line["rate"] - line["rate_unseen"]
    line["near_ties"] = int((abs(items["margin"]) < NEAR_TIE).sum())
    for name, group in (("first_copy", items["copy"] == 0), ("later_copies", items["copy"] > 0)):
        line[f"rate_{name}"] = mean(memorized[old & group])
    for name, group in (("first_epoch", items["epoch"] == 0), ("later_epochs", items["epoch"] > 0)):
        line[f"rate_{name}"] = mean(memorized[old & group])
    likelihood = -items["nll"][old]
    line["order_rho"], line["order_p"] = rank_correlation(items["row"][old], likelihood)
    if reference is not None:
        found = rank_correlation(items["row"][old], likelihood + reference[old])
        line["order_rho_corrected"], line["order_p_corrected"] = found
    return line | poisson_tests(count_events(memorized[old], width))


def mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64)) if len(values) else float("nan")


def effect_lines(run: str, items: dict[int, Columns]) -> list[dict]:
    """Difference-in-differences: the fall of surprisal since the last checkpoint before the rows were seen.

    A cohort is the rows that were seen between two checkpoints; the controls are those that are not seen yet. Of rows
    with equal tokens only the first counts.
    """
    lines = []
    for before, cohort in pairwise(items):
        for step in (step for step in items if step >= cohort):
            first = items[step]["copy"] == 0
            treated = first & seen(items[step], cohort) & ~seen(items[step], before)
            controls = first & ~seen(items[step], step)
            if min(treated.sum(), controls.sum()) < 2:
                continue
            fall = items[before]["nll"].astype(np.float64) - items[step]["nll"]
            effect, error = difference_in_differences(fall[treated], fall[controls])
            counts = {"rows": int(treated.sum()), "controls": int(controls.sum())}
            lines.append({"run": run, "cohort": cohort, "step": step, **counts, "effect": effect, "error": error})
    return lines


def dose_lines(run: str, step: int, items: Columns) -> list[dict]:
    """The rate of memorization by dose: how often the checkpoint has seen the k + l tokens in the measured rows."""
    _, group = np.unique(items["same_as"], return_inverse=True)
    doses = np.bincount(group, seen(items, step))[group]
    lines = []
    for dose in np.unique(doses).astype(int).tolist():
        memorized = items["memorized"][(doses == dose) & (items["copy"] == 0)]
        low, high = wilson(memorized.sum(), len(memorized))
        counts = {"texts": len(memorized), "memorized": int(memorized.sum())}
        lines.append(
            {"run": run, "step": step, "dose": dose, **counts, "rate": mean(memorized), "low": low, "high": high}
        )
    return lines


def prediction_lines(items: dict[tuple[str, int], Columns]) -> list[dict]:
    """How well the memorized rows of each checkpoint predict those of the last one, among rows that both have seen.
    Runs of other rows than the last run's are left out."""
    *_, ((_, last), final) = items.items()
    lines = []
    for (run, step), early in items.items():
        if not all(np.array_equal(early[name], final[name]) for name in ("row", "same_as", "seen_at")):
            continue
        both = seen(early, step) & seen(final, last)
        found = prediction(early["memorized"][both], final["memorized"][both])
        lines.append({"run": run, "step": step, "rows": int(both.sum()), **found})
    return lines


def write_tables(study: Study, summary: list[dict], width: int) -> None:
    """Write the other tables, and draw all figures."""
    items = {(run.name, step): study.columns(run, step) for run in study.runs for step in run.steps}
    effects = [e for run in study.runs for e in effect_lines(run.name, {s: items[run.name, s] for s in run.steps})]
    tables = {
        "effect": effects,
        "doses": [line for (run, step), found in items.items() for line in dose_lines(run, step, found)],
        "prediction": prediction_lines(items),
    }
    for name, lines in tables.items():
        if lines:
            write_csv(study.out / f"{name}.csv", lines)
    (_, step), last = list(items.items())[-1]
    counts = count_events(last["memorized"][seen(last, step)], width)
    figures.draw_memorization(study.out, summary, tables, counts)


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser("memorization", __doc__.split("\n\n")[0])
    parser.add_argument("--k", type=int, default=32, metavar="N", help="tokens of the prompt (default: 32)")
    parser.add_argument("--l", type=int, default=32, metavar="N", help="tokens to write (default: 32)")
    parser.add_argument("--score", action="store_true", help="also the share of right tokens of a free run")
    parser.add_argument(
        "--paper-exact", action="store_true", help="never write <|endoftext|>, like the published script"
    )
    parser.add_argument("--reference", type=Path, metavar="RUN/stepN", help="a model of another order, for order_rho")
    parser.add_argument("--slice", type=int, default=512, metavar="N", help="rows of a Poisson count (default: 512)")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="rows in one forward pass (default: 64)")
    args = parser.parse_args(arguments)
    if min(args.k, args.l, args.slice, args.batch) < 1:
        raise UserError("--k, --l, --slice and --batch must be positive")
    banned = END_OF_TEXT if args.paper_exact else None
    with all_ranks() as dist:
        study = Study("memorization", args, {"k": args.k, "score": args.score, "banned": banned}, dist)

        def compute(step: int, model: Pythia, columns: Columns) -> Columns:
            tokens = torch.from_numpy(columns["tokens"].astype(np.int64)).to(study.device)
            return measure_rows(model, tokens, args.k, banned, args.score)

        references = {}
        for run in study.runs:
            numbers = study.sample(len(run.rows))
            tokens = read_starts(run.rows, numbers, args.k + args.l, "reading rows" if dist.is_main else "")
            items = describe_rows(run, numbers, row_digests(tokens))
            items["end_of_text"] = (tokens[:, args.k :] == END_OF_TEXT).any(1)
            study.measure(run, items, compute, args.batch, {"tokens": tokens})
            if args.reference:
                other = find_run(args.reference.parent, args.reference.name.removeprefix("step"), None)
                study.measure(other, items, compute, args.batch, {"tokens": tokens})
                references[run.name] = study.columns(other, other.steps[0])["nll"]
        width = max(args.slice // args.every, 1)
        summary = study.finish(lambda run, step, items: summary_of(items, step, width, references.get(run.name)))
        dist.run_on_main(lambda: write_tables(study, summary, width))


if __name__ == "__main__":
    run_command(main)
