"""What a model answers: multiple choice and last words from files of yours, at every checkpoint.

    python -m studies.evaluate RUN --task piqa.jsonl,lambada.jsonl --shots 0,5 --steps 0,1000:143000:1000

The lines of a task are all of one kind:

    {"context": "Q: What is 2 plus 3?\\nA:", "choices": [" 4", " 5", " 6"], "answer": 1}
    {"context": "He did not like the", "continuation": " design."}

Texts are joined as they stand, so a choice begins with its space; the tokens are those of lm-evaluation-harness. With
shots, other lines of the file and their answers stand before the context, with an empty line after each. A text that is
longer than the model can read loses its beginning.

    items.parquet    every choice under every checkpoint: its log-likelihood in nats, its bytes without the white space
                     before it, whether it is right, and whether greedy generation writes it. Long items are first
    summary.csv      accuracy and bits per byte of every task
    scores.csv       for every task and checkpoint, means over items with 95% intervals:
                         acc              the right choice is the likeliest one; of a continuation: greedy writes it
                         acc_norm         the same for the log-likelihood of a byte
                         log_likelihood   of the right text
                         bits_per_byte    of the right text
                     and against the first RUN at the same step, item by item: the change of each with a bootstrap
                     interval, and McNemar's p of the answers that changed
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from tokenizers import Tokenizer

from corpus.search import numbers
from model import Pythia
from runtime.errors import UserError, run_command
from studies.common import Columns, Study, all_ranks, by_task, read_lines, study_parser, trained_config, write_csv
from studies.figures import GREY, by_run, column, line_with_band, save_figure
from studies.likelihood import encode_pair, pad, score, tokenizer_of
from studies.statistics import bootstrap, mcnemar, wilson

METRICS = ("acc", "acc_norm", "log_likelihood", "bits_per_byte")


@dataclass(frozen=True)
class Item:
    """A question with its examples before it. A continuation is an only choice."""

    task: str
    shots: int
    number: int  # in the file, from 0
    context: str
    choices: tuple[str, ...]
    answer: int


# ---- the items -------------------------------------------------------------------------------------------------------


def read_task(file: Path) -> list[Item]:
    """The items of a JSONL file. Raises UserError that names the first wrong line."""
    items: list[Item] = []
    for number, line in enumerate(read_lines(file)):
        try:
            entry = json.loads(line)
            several = "choices" in entry
            choices, answer = (entry["choices"], entry["answer"]) if several else ([entry["continuation"]], 0)
            if not (isinstance(entry["context"], str) and all(isinstance(text, str) for text in choices)):
                raise ValueError("a text is not a string")
            if not all(text.strip() for text in choices) or (several and len(choices) < 2):
                raise ValueError("it has an empty text or an only choice")
            if type(answer) is not int or not 0 <= answer < len(choices):
                raise ValueError("answer is not the number of a choice, from 0")
            if items and several != (len(items[0].choices) > 1):
                raise ValueError("choices and continuations are in one file")
        except (ValueError, TypeError, LookupError) as error:
            wanted = (
                '{"context": "..", "choices": ["..", ".."], "answer": 0} or {"context": "..", "continuation": ".."}'
            )
            raise UserError(f"{file}, item {number + 1}: {error!r}; each line is {wanted}") from None
        items.append(Item(file.stem, 0, number, entry["context"], tuple(choices), answer))
    if not items:
        raise UserError(f"{file} has no items")
    return items


def with_examples(items: list[Item], shots: int, seed: int) -> list[Item]:
    """The items with `shots` others of them before each, drawn at random. Raises UserError if there are not as many."""
    if len(items) <= shots:
        raise UserError(f"{items[0].task} has {len(items)} items; --shots {shots} needs more")
    rng, found = np.random.default_rng([seed, shots]), []
    for i, item in enumerate(items):
        drawn = (
            [items[k + (k >= i)] for k in rng.choice(len(items) - 1, shots, replace=False).tolist()] if shots else []
        )
        before = "".join(f"{example.context}{example.choices[example.answer]}\n\n" for example in drawn)
        found.append(Item(item.task, shots, item.number, before + item.context, item.choices, item.answer))
    return found


def encode(items: list[Item], tokenizer: Tokenizer, longest: int) -> tuple[Columns, Columns]:
    """The columns of all choices in items.parquet, and their inputs, see likelihood.pad: the longest items first.

    A model reads `longest` tokens at most. Raises UserError if a choice alone is longer.
    """
    pairs = [[encode_pair(tokenizer, item.context, text) for text in item.choices] for item in items]
    order = sorted(range(len(items)), key=lambda i: -max(len(tokens) for tokens, _ in pairs[i]))
    texts = [(items[i], n) for i in order for n in range(len(items[i].choices))]
    inputs = pad([cut(*pair, longest) for i in order for pair in pairs[i]])
    return {
        "task": np.array([item.task for item, _ in texts]),
        "shots": np.array([item.shots for item, _ in texts], np.int16),
        "item": np.array([item.number for item, _ in texts], np.int32),
        "choice": np.array([n for _, n in texts], np.int16),
        "right": np.array([n == item.answer for item, n in texts]),
        "bytes": np.array([len(item.choices[n].lstrip().encode()) for item, n in texts], np.int32),
    }, inputs


def cut(tokens: list[int], context: int, longest: int) -> tuple[list[int], int]:
    """The end of a pair that a model can read: the last token is predicted, not read."""
    spare = max(len(tokens) - 1 - longest, 0)
    if spare >= context:
        raise UserError(f"a choice has {len(tokens) - context} tokens, the model reads {longest}")
    return tokens[spare:], context - spare


def answer(step: int, model: Pythia, columns: Columns) -> Columns:
    likelihood, greedy = score(model, *(columns[name] for name in ("tokens", "context", "length")))
    return {"log_likelihood": likelihood, "greedy": greedy}


# ---- the tables ------------------------------------------------------------------------------------------------------


def kinds(items: Columns) -> dict[tuple[str, int], Columns]:
    """The choices of every task and number of shots, sorted: the order of the items is that of their lengths."""
    return dict(sorted(by_task(items).items(), key=lambda kind: kind[0]))


def metrics(choices: Columns) -> dict[str, np.ndarray]:
    """METRICS of every item [items], of the choices of one task. Of equal likelihoods the first choice counts."""
    groups = np.split(np.arange(len(choices["item"])), np.flatnonzero(np.diff(choices["item"])) + 1)
    right, likelihood = choices["right"], choices["log_likelihood"]
    if len(groups) == len(right):  # continuations
        acc, norm = choices["greedy"], np.full(len(right), np.nan)
    else:
        per_byte = likelihood / choices["bytes"]
        acc, norm = (np.array([right[g][values[g].argmax()] for g in groups]) for values in (likelihood, per_byte))
    bits = -likelihood[right] / (np.log(2) * choices["bytes"][right])
    return dict(zip(METRICS, (acc, norm, likelihood[right], bits)))


def score_line(choices: Columns, base: Columns | None, seed: int) -> dict:
    """The metrics of one task with their intervals, and their changes against the same items of a base."""
    found, before = metrics(choices), base and metrics(base)
    count = len(found["acc"])
    sizes = np.unique(choices["item"], return_counts=True)[1]
    line = {"items": count, "chance": (1 / sizes).mean() if sizes.max() > 1 else None}
    for name, values in found.items():
        is_answer = values.dtype == bool
        low, high = wilson(values.sum(), count) if is_answer else bootstrap(values, seed)
        line |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        line |= dict.fromkeys(f"{name}_change{end}" for end in ("", "_low", "_high"))
        if before:
            change = values.astype(np.float64) - before[name]
            low, high = bootstrap(change, seed)
            line |= {f"{name}_change": change.mean(), f"{name}_change_low": low, f"{name}_change_high": high}
        if name in ("acc", "acc_norm"):
            line[f"{name}_mcnemar_p"] = mcnemar(before[name], values) if before and is_answer else None
    return line


def summary_of(items: Columns) -> dict:
    line = {}
    for (task, shots), choices in kinds(items).items():
        found = metrics(choices)
        line |= {f"{task}_{shots}_{name}": found[name].mean() for name in ("acc", "bits_per_byte")}
    return line


def write_scores(study: Study, seed: int) -> None:
    """Write scores.csv, and draw it."""
    lines = []
    for run in study.runs:
        for step in run.steps:
            base = study.base_columns(run, step)
            before = kinds(base) if base else {}
            for name, choices in kinds(study.columns(run, step)).items():
                line = {"run": run.name, "step": step, "task": name[0], "shots": name[1]}
                lines.append(line | score_line(choices, before.get(name), seed))
    write_csv(study.out / "scores.csv", lines)
    for task in dict.fromkeys(line["task"] for line in lines):
        for metric, title, label in (
            ("acc", "right answers", "share of items"),
            ("bits_per_byte", "the right texts", "bits per byte"),
        ):
            part = [line for line in lines if line["task"] == task]
            save_figure(study.out, f"{task}_{metric}", partial(draw, part, metric), f"{task}: {title}", "step", label)


def draw(lines: list[dict], metric: str, axes: Axes) -> None:
    """Draw a metric of one task over training, with its interval, and where chance is."""
    for run, found in by_run(lines):
        for shots in dict.fromkeys(line["shots"] for line in found):
            part = [line for line in found if line["shots"] == shots]
            values = (column(part, f"{metric}{end}") for end in ("", "_low", "_high"))
            line_with_band(axes, column(part, "step"), *values, f"{run}, {shots} shots")
    if metric == "acc" and lines[0]["chance"]:
        axes.axhline(lines[0]["chance"], color=GREY, lw=0.8, label="chance")


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None):
    parser = study_parser("evaluate", __doc__.split("\n\n")[0])
    parser.add_argument("--task", required=True, metavar="FILES", help="JSONL files with commas between them")
    parser.add_argument("--shots", default="0", metavar="NUMBERS", help="examples before an item (default: 0)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one in the first checkpoint")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="choices in one pass (default: 32)")
    args = parser.parse_args(arguments)
    args.files = [Path(name) for name in args.task.split(",") if name]
    if not args.files or len({file.stem for file in args.files}) < len(args.files):
        raise UserError(f"--task {args.task}: give files of different names")
    args.shots = list(dict.fromkeys(numbers("--shots", args.shots)))
    if args.batch < 1 or min(args.shots) < 0:
        raise UserError("--batch must be positive, --shots 0 or more")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with all_ranks() as dist:
        study, items = Study("evaluate", args, {}, dist), []
        for file in args.files:
            task = read_task(file)
            for shots in args.shots:
                asked = with_examples(task, shots, args.seed)
                items += [asked[i] for i in study.sample(len(asked))]
        longest = min(trained_config(run.path / f"step{run.steps[0]}").seq_len for run in study.runs)
        tokenizer = tokenizer_of(study.runs[0].path, study.runs[0].steps[0], args.tokenizer)
        columns, inputs = encode(items, tokenizer, longest)
        for run in study.runs:
            study.measure(run, columns, answer, args.batch, inputs)
        study.finish(lambda run, step, found: summary_of(found))
        dist.run_on_main(lambda: write_scores(study, args.seed))


if __name__ == "__main__":
    run_command(main)
