"""Does a model answer better about what it has read more often? Accuracy against frequency, at every checkpoint.

    python -m studies.term_frequency RUN --task plus,times --shots 0,4,16 --steps 13000:143000:13000
    python -m studies.term_frequency RUN --questions FILE.jsonl

Arithmetic (Razeghi et al. 2022, arXiv:2202.07206, as in the Pythia paper): "Q:What is 24 plus 7? A:" for 0 .. 99 and
1 .. 50; the term is the first number. Questions of your own are lines {"question": "..", "answers": ["..", ..],
"terms": ["..", ..]}; they count as seen where all of their terms stand in one row.

Terms are counted in the rows that the run served before the checkpoint: see studies/term_counts.py.

    items.parquet      every question under every checkpoint: rows_seen, the log-probability of the answer, and whether
                       greedy generation gives the answer
    summary.csv        accuracy and mean log-probability of every task
    frequency.csv      for every task and checkpoint: Spearman's rho of the accuracy of a term with the rows that have
                       it, the same for the log-probability, the gap between the ten most and the ten least frequent
                       terms, each with a bootstrap interval over terms; and the slope of log-probability on
                       log(1 + rows) beside the size, the digits and the roundness of the number
    counts.csv         every term by step: its occurrences, and the rows that have it
"""

import json
import re
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from scipy.stats import spearmanr
from tokenizers import Tokenizer

from corpus.search import numbers, spans_of_texts
from corpus.tokenizer import tokenizer_errors
from model import Pythia
from runtime.errors import UserError, run_command
from studies.common import Columns, Run, Study, all_ranks, by_task, read_lines, study_parser, write_csv
from studies.figures import GREY, column, line_with_band, save_figure
from studies.likelihood import encode_pair, pad, score, tokenizer_of, write_greedy
from studies.term_counts import TermCounts

WORDS = {"plus": lambda a, b: a + b, "times": lambda a, b: a * b}
ANSWER_TOKENS = 16  # that greedy generation writes, at most up to the end of the line
EXTREME = 10  # most and least frequent terms whose accuracies are compared


@dataclass(frozen=True)
class Question:
    """A question with its examples before it, and what counts as an answer."""

    task: str
    shots: int
    name: str
    prompt: str
    answers: tuple[str, ...]  # the first is the one whose log-probability is measured
    terms: tuple[str, ...]

    def is_right(self, written: str) -> bool:
        """Whether a continuation answers the question: its first number, or all of its first line."""
        line = written.lstrip().split("\n")[0]
        if self.task in WORDS:
            number = re.search(r"\d{1,5}", line)
            return bool(number) and number[0] == self.answers[0]
        return normalized(line) in {normalized(answer) for answer in self.answers}


def normalized(text: str) -> str:
    """A text without case, punctuation and articles, as TriviaQA compares answers."""
    text = "".join(" " if char in string.punctuation else char for char in text.lower())
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


# ---- the questions ---------------------------------------------------------------------------------------------------


def arithmetic(task: str, shots: int, seed: int) -> list[Question]:
    """The 5,000 questions of a task. The examples before a question have other first numbers."""
    rng, questions = np.random.default_rng([seed, shots]), []
    for first in range(100):
        others = np.array([n for n in range(100) if n != first])
        for second in range(1, 51):
            examples = zip(rng.choice(others, shots, replace=False).tolist(), rng.integers(1, 51, shots).tolist())
            prompt = "".join(f"{ask(task, a, b)}{WORDS[task](a, b)}\n" for a, b in examples) + ask(task, first, second)
            answer = (str(WORDS[task](first, second)),)
            questions.append(Question(task, shots, f"{first} {task} {second}", prompt, answer, (str(first),)))
    return questions


def ask(task: str, first: int, second: int) -> str:
    return f"Q:What is {first} {task} {second}? A:"


def read_questions(file: Path, shots: int, seed: int) -> list[Question]:
    """The questions of a JSONL file, with other ones of it as examples. Raises UserError."""
    found = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            entry = json.loads(line)
            values = entry["question"], *entry["answers"], *entry["terms"]
            if not (entry["answers"] and entry["terms"] and all(isinstance(v, str) and v.strip() for v in values)):
                raise ValueError
        except (ValueError, TypeError, LookupError):
            wanted = '{"question": "..", "answers": ["..", ..], "terms": ["..", ..]}'
            raise UserError(f"{file}:{number}: not a line {wanted}") from None
        found.append(entry)
    if len(found) <= shots:
        raise UserError(f"{file}: {len(found)} questions; --shots {shots} needs more")
    rng, questions = np.random.default_rng([seed, shots]), []
    for i, entry in enumerate(found):
        others = [found[k] for k in rng.permutation(len(found)).tolist() if k != i][:shots]
        prompt = "".join(f"Q: {e['question']}\nA: {e['answers'][0]}\n" for e in others) + f"Q: {entry['question']}\nA:"
        questions.append(
            Question(file.stem, shots, entry["question"], prompt, tuple(entry["answers"]), tuple(entry["terms"]))
        )
    return questions


# ---- the measurement -------------------------------------------------------------------------------------------------


def describe(questions: list[Question]) -> Columns:
    """The columns of the questions in items.parquet."""
    return {
        "task": np.array([q.task for q in questions]),
        "shots": np.array([q.shots for q in questions], np.int16),
        "question": np.array([q.name for q in questions]),
        "term": np.array([" & ".join(q.terms) for q in questions]),
    }


def encode(questions: list[Question], tokenizer: Tokenizer) -> Columns:
    """The inputs of all questions: their number, and prompt with answer as likelihood.pad has them."""
    space = dict.fromkeys(WORDS, "")  # the examples of arithmetic have none before the answer
    pairs = [encode_pair(tokenizer, q.prompt, space.get(q.task, " ") + q.answers[0]) for q in questions]
    return {"number": np.arange(len(questions)), **pad(pairs)}


def write_answers(model: Pythia, tokenizer: Tokenizer, tokens: np.ndarray, context: np.ndarray) -> list[str]:
    """What greedy generation writes after tokens[i, : context[i]]. Prompts of one length are a batch."""
    written = [""] * len(tokens)
    for length in np.unique(context).tolist():
        at = np.flatnonzero(context == length)
        prompts = torch.from_numpy(tokens[at, :length].astype(np.int64)).to(model.embed.device)
        ids = write_greedy(model, prompts, ANSWER_TOKENS).tolist()
        with tokenizer_errors("the tokenizer"):
            texts = tokenizer.decode_batch(ids, skip_special_tokens=True)
        for i, text in zip(at.tolist(), texts):
            written[i] = text
    return written


def counts_of(run: Run, questions: list[Question], tokenizer: Tokenizer, file: Path | None) -> TermCounts:
    """The counts of all terms of the questions in the rows of a run up to the last checkpoint."""
    terms = list(dict.fromkeys(term for q in questions for term in q.terms))
    path = file or run.path / f"step{run.steps[0]}" / "tokenizer.json"
    spans = dict(zip(terms, spans_of_texts(terms, path, run.rows.data)))
    return TermCounts(run.rows, run.asked.batch_size, max(run.steps), spans, tokenizer)


# ---- the tables ------------------------------------------------------------------------------------------------------


def summary_of(items: Columns) -> dict:
    line = {}
    for (task, shots), part in by_task(items).items():
        line[f"{task}_{shots}_accuracy"] = part["correct"].mean()
        line[f"{task}_{shots}_log_probability"] = part["log_probability"].mean()
    return line


def by_term(items: Columns, names: tuple[str, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The terms [terms], and the means of columns over the items of each."""
    terms, group = np.unique(items["term"], return_inverse=True)
    return terms, [np.bincount(group, items[name]) / np.bincount(group) for name in names]


def frequency_line(items: Columns, seed: int) -> dict:
    """How the answers of one task depend on the rows that have the terms. NaN where nothing varies."""
    terms, (seen, accuracy, likelihood) = by_term(items, ("rows_seen", "correct", "log_probability"))
    line = {"terms": len(terms), "accuracy": items["correct"].mean(), "rows_seen": seen.mean()}
    for name, values in (("rho", accuracy), ("rho_log_probability", likelihood)):
        line |= with_interval(name, rank_correlation, seen, values, seed)
    line |= with_interval("gap", extreme_gap, seen, accuracy, seed)
    slope, error = adjusted_slope(terms, seen, likelihood)
    return line | {"slope": slope, "slope_error": error}


def rank_correlation(seen: np.ndarray, values: np.ndarray) -> float:
    if len(np.unique(seen)) < 2 or len(np.unique(values)) < 2:
        return float("nan")
    return float(spearmanr(seen, values).statistic)


def extreme_gap(seen: np.ndarray, values: np.ndarray) -> float:
    """The mean of the EXTREME terms that are seen most, less that of those seen least."""
    if len(seen) < 2 * EXTREME or len(np.unique(seen)) < 2:
        return float("nan")
    order = np.argsort(seen, kind="stable")
    return float(values[order[-EXTREME:]].mean() - values[order[:EXTREME]].mean())


def with_interval(name: str, statistic, seen: np.ndarray, values: np.ndarray, seed: int) -> dict:
    """A statistic of terms, and its 95% interval by drawing terms with replacement (percentiles)."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(500):
        drawn = rng.integers(0, len(seen), len(seen))
        found.append(statistic(seen[drawn], values[drawn]))
    low, high = np.nanpercentile(found, [2.5, 97.5]) if np.isfinite(found).any() else (np.nan, np.nan)
    return {name: statistic(seen, values), f"{name}_low": float(low), f"{name}_high": float(high)}


def adjusted_slope(terms: np.ndarray, seen: np.ndarray, values: np.ndarray) -> tuple[float, float]:
    """The least-squares slope of values on log(1 + seen), and its standard error, beside what makes small and round
    numbers frequent and easy: size, digits, a zero at the end. Terms that are no numbers have the intercept only."""
    columns = [np.ones(len(terms)), np.log1p(seen)]
    if all(term.isdecimal() for term in terms.tolist()):
        number = np.array([int(term) for term in terms.tolist()])
        columns += [number / 100, np.array([len(term) for term in terms.tolist()]), number % 10 == 0]
    x = np.stack(columns, 1).astype(np.float64)
    if len(x) <= x.shape[1] or np.linalg.matrix_rank(x) < x.shape[1]:
        return float("nan"), float("nan")
    solution, *_ = np.linalg.lstsq(x, values)
    variance = ((values - x @ solution) ** 2).sum() / (len(x) - x.shape[1])
    return float(solution[1]), float(np.sqrt(variance * np.linalg.inv(x.T @ x)[1, 1]))


def write_tables(study: Study, counts: dict[str, TermCounts], seed: int) -> None:
    """Write frequency.csv and counts.csv."""
    frequencies, lines = [], []
    for run in study.runs:
        for step in run.steps:
            items = study.columns(run, step)
            for (task, shots), part in by_task(items).items():
                line = frequency_line(part, seed)
                frequencies.append({"run": run.name, "step": step, "task": task, "shots": shots, **line})
            for term in counts[run.name].terms:
                seen = counts[run.name].occurrences(term, step), counts[run.name].rows_with((term,), step)
                lines.append({"run": run.name, "step": step, "term": term, "occurrences": seen[0], "rows": seen[1]})
    write_csv(study.out / "frequency.csv", frequencies)
    write_csv(study.out / "counts.csv", lines)
    run, step = study.runs[0], study.runs[0].steps[-1]
    draw_frequency(study.out, [line for line in frequencies if line["run"] == run.name], study.columns(run, step), step)


def draw_frequency(out: Path, lines: list[dict], items: Columns, step: int) -> None:
    """Draw rho over training, and the log-probability of every term against its rows under the last checkpoint."""

    def correlations(axes: Axes) -> None:
        for task, shots in parts:
            part = [line for line in lines if (line["task"], line["shots"]) == (task, shots)]
            values = (column(part, f"rho_log_probability{end}") for end in ("", "_low", "_high"))
            line_with_band(axes, column(part, "step"), *values, f"{task}, {shots} shots")
        axes.axhline(0, color=GREY, lw=0.8)

    def terms(axes: Axes) -> None:
        for (task, shots), part in parts.items():
            axes.plot(*by_term(part, ("rows_seen", "log_probability"))[1], "o", label=f"{task}, {shots} shots")
        axes.set_xscale("symlog", linthresh=1)

    parts = by_task(items)
    title = "Is what was read more often known better? (Spearman, over terms)"
    save_figure(out, "rho", correlations, title, "step", "rho of log-probability and rows")
    save_figure(out, "terms", terms, f"Every term at step {step}", "rows that had it", "log-probability in nats")


# ---- the command -----------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None):
    parser = study_parser("term_frequency", __doc__.split("\n\n")[0])
    parser.add_argument("--task", default="plus,times", metavar="NAMES", help="plus,times, or '' (default: both)")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSONL file of questions, answers and terms")
    parser.add_argument("--shots", default="0,4", metavar="NUMBERS", help="examples before a question (default: 0,4)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one in the first checkpoint")
    parser.add_argument("--batch", type=int, default=50, metavar="N", help="questions in one pass (default: 50)")
    args = parser.parse_args(arguments)
    args.tasks = [name for name in args.task.split(",") if name]
    if unknown := set(args.tasks) - set(WORDS):
        raise UserError(f"--task knows {', '.join(WORDS)}, not {', '.join(sorted(unknown))}")
    if not (args.tasks or args.questions):
        raise UserError("give --task or --questions")
    args.shots = numbers("--shots", args.shots)
    if args.batch < 1 or not all(0 <= n < 99 for n in args.shots):
        raise UserError("--batch must be positive, --shots from 0 to 98")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    with all_ranks() as dist:
        study = Study("term_frequency", args, {"shots": args.shots, "seed": args.seed}, dist)
        questions = [q for task in args.tasks for shots in args.shots for q in arithmetic(task, shots, args.seed)]
        if args.questions:
            questions += [q for shots in args.shots for q in read_questions(args.questions, shots, args.seed)]
        questions = [questions[i] for i in study.sample(len(questions))]
        tokenizer = tokenizer_of(study.runs[0].path, study.runs[0].steps[0], args.tokenizer)
        items, inputs, counts = describe(questions), encode(questions, tokenizer), {}

        def answer(step: int, model: Pythia, columns: Columns) -> Columns:
            asked = [questions[i] for i in columns["number"].tolist()]
            tokens, context, length = (columns[name] for name in ("tokens", "context", "length"))
            written = write_answers(model, tokenizer, tokens, context)
            return {
                "rows_seen": np.array([counts[run.name].rows_with(q.terms, step) for q in asked]),
                "log_probability": score(model, tokens, context, length)[0],
                "correct": np.array([q.is_right(text) for q, text in zip(asked, written)]),
            }

        for run in study.runs:
            counts[run.name] = counts_of(run, questions, tokenizer, args.tokenizer)
            study.measure(run, items, answer, args.batch, inputs)
        study.finish(lambda run, step, found: summary_of(found))
        dist.run_on_main(lambda: write_tables(study, counts, args.seed))


if __name__ == "__main__":
    run_command(main)
