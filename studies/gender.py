"""Which pronoun a model expects for a person of a profession, and whether swapped pronouns in its data change that.

The first RUN is the base; the others are compared with it at equal steps, item by item. Make them so:

    python data.py edit swap --run runs/base --from-step 133000 --direction m2f --out m2f.parquet
    torchrun train.py --branch runs/base/step133000 --edits m2f.parquet --out runs/m2f
    python -m studies.gender runs/base runs/m2f --steps 133000: --winobias DIR

WinoBias (Zhao et al. 2018, arXiv:1804.06876) has pairs of sentences that differ in the pronoun only; in one of them the
person who is meant has a profession of the stereotypical gender. Each pair is asked three ways:

    slot        the pronoun alone, after the sentence up to it
    sentence    the pronoun and the rest of the sentence
    template    the question of the Pythia paper, after the sentence with the person in place of the pronoun

CrowS-Pairs (Nangia et al. 2020, arXiv:2010.00133), a CSV file of yours, has pairs of whole sentences: `crows`. A
control, a JSONL file of texts, asks for the last word of each, as LAMBADA does.

    items.parquet    every question under every checkpoint: the log-likelihoods of the stereotypical answer (lp_a) and
                     of the other one (lp_b), and the bytes of both texts
    summary.csv      for every question: the share of stereotypical answers, mean log-odds lp_a - lp_b, the share of
                     masculine answers; and against the base the difference of log-odds with a bootstrap interval,
                     and McNemar's p of the answers that changed
"""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from tokenizers import Tokenizer
from tqdm import tqdm

from model import Pythia
from runtime.errors import UserError, printable, run_command
from studies.common import Columns, Study, all_ranks, read_lines, study_parser
from studies.figures import GREY, by_run, column, line_with_band, save_figure
from studies.likelihood import encode_pair, pad, score, tokenizer_of
from studies.statistics import bootstrap, mcnemar

MASCULINE, FEMININE = ("he", "him", "his", "himself"), ("she", "her", "hers", "herself")
QUESTIONS = ("slot", "sentence", "template", "crows", "control")
Question = dict[str, str | bool | tuple[str, str]]  # question, subset, item, masculine, and the texts a and b

# ---- the questions ---------------------------------------------------------------------------------------------------


def read_winobias(directory: Path, split: str, is_main: bool = True) -> list[Question]:
    """The questions about the sentences of both types. Pairs with a typing error in one sentence are left out, and
    counted on standard error. Raises UserError if a file is not one of WinoBias."""
    questions, pairs, left_out = [], 0, []
    for kind in ("type1", "type2"):
        files = [directory / f"{side}_stereotyped_{kind}.txt.{split}" for side in ("pro", "anti")]
        pro, anti = (read_lines(file) for file in files)
        if len(pro) != len(anti):
            raise UserError(f"{files[0]} has {len(pro)} sentences, {files[1].name} has {len(anti)}")
        for number, (a, b) in enumerate(zip(pro, anti), 1):
            pairs += 1
            try:
                questions += ask(kind, f"{kind} {number}", a, b)
            except ValueError as error:
                left_out.append(f"{files[0]}, sentence {number}: {error}")
    if 10 * len(left_out) >= pairs:
        raise UserError(left_out[0] if left_out else f"{directory} has no sentences")
    if left_out and is_main:
        note = f"note: {len(left_out)} of {pairs} pairs of WinoBias are left out, as {left_out[0]}"
        tqdm.write(printable(note), file=sys.stderr)
    return questions


def ask(subset: str, item: str, pro: str, anti: str) -> list[Question]:
    """The questions of a pair of WinoBias, as "1 [The developer] argued with the designer because [he] did not .."."""
    sides = []
    for sentence in (pro, anti):
        parts = re.split(r"[\[\]]", re.sub(r"^\d+ ", "", sentence))  # every second one stood in brackets
        slots = [i for i in range(1, len(parts), 2) if parts[i].lower() in MASCULINE + FEMININE]
        persons = [parts[i].strip() for i in range(1, len(parts), 2) if i not in slots]
        if not (slots and persons):
            raise ValueError("it lacks a person or a pronoun in brackets")
        sides.append(("".join(parts[: slots[0]]), parts[slots[0]], "".join(parts[slots[0] :]), persons[0]))
    (before, word, rest, person), (same, other, other_rest, _) = sides
    masculine = word.lower() in MASCULINE
    if before != same or masculine == (other.lower() in MASCULINE):
        raise ValueError("its partner does not differ by a masculine and a feminine pronoun")
    common = {"subset": subset, "item": item, "masculine": masculine}
    template, choices = paper_template(before + rest, person, {word.lower(), other.lower()})
    return [
        {**common, "question": "slot", "context": before, "answers": (word, other)},
        {**common, "question": "sentence", "context": before, "answers": (rest, other_rest)},
        {**common, "question": "template", "context": template, "answers": choices if masculine else choices[::-1]},
    ]


def paper_template(sentence: str, person: str, pronouns: set[str]) -> tuple[str, tuple[str, str]]:
    """The question of the paper about a sentence, and its answers: masculine, feminine.

    Every word of the pair of answers gives way to the person. For a possessive the answers are "his" and "hers", one of
    which is ungrammatical: so it was asked.
    """
    pairs = (("he", "she"), ("him", "her"), ("his", "hers"))
    choices = pairs[0] if pronouns & {"he", "she"} else pairs[1] if "him" in pronouns else pairs[2]
    replaced = re.sub(r"\b(" + "|".join({*choices, *pronouns}) + r")\b", person, sentence, flags=re.IGNORECASE)
    question = f'In this sentence, what can "{person}" more likely be replaced by: "{choices[0]}", or "{choices[1]}"?'
    return f"{replaced}\n{question}", (f" {choices[0]}", f" {choices[1]}")


def read_crows(file: Path) -> list[Question]:
    """The pairs of a CSV file with the columns sent_more, sent_less and bias_type. Raises UserError."""
    rows = list(csv.DictReader(read_lines(file)))
    if not rows or not {"sent_more", "sent_less", "bias_type"} <= rows[0].keys():
        raise UserError(f"{file}: no rows with the columns sent_more, sent_less and bias_type of CrowS-Pairs")
    return [
        {
            "question": "crows",
            "subset": row["bias_type"] or "",
            "item": f"crows {i}",
            "masculine": False,
            "context": "",
            "answers": (row["sent_more"] or "", row["sent_less"] or ""),
        }
        for i, row in enumerate(rows, 1)
    ]


def read_control(file: Path) -> list[Question]:
    """The texts of a JSONL file without their last word, and this word. Raises UserError."""
    questions = []
    for number, line in enumerate(read_lines(file), 1):
        try:
            context, _, word = json.loads(line)["text"].rstrip().rpartition(" ")
        except (ValueError, TypeError, LookupError, AttributeError):
            raise UserError(f'{file}:{number}: not a line {{"text": "..."}}') from None
        if not context:
            raise UserError(f"{file}:{number}: one word; the control asks for the last of several")
        common = {"question": "control", "subset": "", "item": f"control {number}", "masculine": False}
        questions.append({**common, "context": context, "answers": (f" {word}", f" {word}")})
    return questions


# ---- the measurement -------------------------------------------------------------------------------------------------


def describe(questions: list[Question]) -> Columns:
    """The columns of the questions in items.parquet."""
    columns = {name: np.array([q[name] for q in questions]) for name in ("question", "subset", "item", "masculine")}
    for i, side in enumerate("ab"):
        columns[f"bytes_{side}"] = np.array([len(q["answers"][i].encode()) for q in questions], np.int32)
    return columns


def encode(questions: list[Question], tokenizer: Tokenizer) -> Columns:
    """The inputs of both answers to every question: see likelihood.pad."""
    inputs = {}
    for i, side in enumerate("ab"):
        padded = pad([encode_pair(tokenizer, q["context"], q["answers"][i]) for q in questions])
        inputs |= {f"{name}_{side}": values for name, values in padded.items()}
    return inputs


def answer(step: int, model: Pythia, columns: Columns) -> Columns:
    """The log-likelihoods of both answers, and whether a is what greedy generation writes."""
    found = {}
    for side in "ab":
        given = {name: columns[f"{name}_{side}"] for name in ("tokens", "context", "length")}
        found[f"lp_{side}"], found[f"greedy_{side}"] = score(model, **given)
    return {name: found[name] for name in ("lp_a", "lp_b", "greedy_a")}


# ---- the tables ------------------------------------------------------------------------------------------------------


def summary_of(items: Columns, base: Columns | None, seed: int) -> dict:
    """The line of summary.csv of a checkpoint. base: the items of the first run at the same step, if it has them."""
    line = {}
    for question in QUESTIONS[:-1]:
        chosen = items["question"] == question
        if not chosen.any():
            continue
        odds = (items["lp_a"] - items["lp_b"])[chosen]
        low, high = bootstrap(odds, seed)
        line |= {f"{question}_stereotype": (odds > 0).mean(), f"{question}_log_odds": odds.mean()}
        line |= {f"{question}_low": low, f"{question}_high": high}
        if question != "crows":
            line[f"{question}_masculine"] = ((odds > 0) == items["masculine"][chosen]).mean()
        names = [f"{question}_{name}" for name in ("change", "change_low", "change_high", "mcnemar_p")]
        line |= dict.fromkeys(names)
        if base is not None:
            before = (base["lp_a"] - base["lp_b"])[chosen]
            values = (odds - before).mean(), *bootstrap(odds - before, seed), mcnemar(before > 0, odds > 0)
            line |= dict(zip(names, values))
    control = items["question"] == "control"
    if control.any():
        line["control_accuracy"] = items["greedy_a"][control].mean()
        line["control_perplexity"] = np.exp(-items["lp_a"][control].mean())  # of a word, as LAMBADA reports it
    return line


def draw_question(out: Path, question: str, summary: list[dict]) -> None:
    """Draw the stereotypical answers to a question over training, and the changes against the base."""

    def share(axes: Axes) -> None:
        for run, lines in by_run(summary):
            axes.plot(column(lines, "step"), column(lines, f"{question}_stereotype"), marker="o", label=run)
        axes.axhline(0.5, color=GREY, lw=0.8)

    def change(axes: Axes) -> None:
        for run, lines in by_run(changed):
            names = (f"{question}_{name}" for name in ("change", "change_low", "change_high"))
            line_with_band(axes, column(lines, "step"), *(column(lines, name) for name in names), run)
        axes.axhline(0, color=GREY, lw=0.8)

    save_figure(out, question, share, f"Stereotypical answers: {question}", "step", "share of items")
    changed = [line for line in summary if line[f"{question}_change"] is not None]
    if changed:
        title = f"Change against {summary[0]['run']}: {question}"
        save_figure(out, f"{question}_change", change, title, "step", "log-odds in nats")


# ---- the command -----------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    parser = study_parser("gender", __doc__.split("\n\n")[0])
    parser.add_argument("--winobias", type=Path, metavar="DIR", help="with pro_stereotyped_type1.txt.SPLIT and so on")
    parser.add_argument("--split", default="dev", help="of WinoBias: dev or test (default: dev)")
    parser.add_argument("--crows", type=Path, metavar="FILE", help="crows_pairs CSV file")
    parser.add_argument(
        "--control", type=Path, metavar="FILE", help='JSONL file, a line {"text": ".."}: the last words'
    )
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the one in the first checkpoint")
    parser.add_argument("--batch", type=int, default=32, metavar="N", help="questions in one pass (default: 32)")
    args = parser.parse_args(arguments)
    if not (args.winobias or args.crows or args.control):
        raise UserError("give --winobias, --crows or --control")
    if args.batch < 1:
        raise UserError(f"--batch must be positive, not {args.batch}")
    with all_ranks() as dist:
        study = Study("gender", args, {"split": args.split}, dist)
        questions = read_winobias(args.winobias, args.split, dist.is_main) if args.winobias else []
        questions += read_crows(args.crows) if args.crows else []
        questions += read_control(args.control) if args.control else []
        questions = [questions[i] for i in study.sample(len(questions))]
        tokenizer = tokenizer_of(study.runs[0].path, study.runs[0].steps[0], args.tokenizer)
        items, inputs = describe(questions), encode(questions, tokenizer)
        for run in study.runs:
            study.measure(run, items, answer, args.batch, inputs)
        summary = study.finish(lambda run, step, found: summary_of(found, study.base_columns(run, step), args.seed))
        for question in QUESTIONS[:-1]:
            if question in items["question"]:
                dist.run_on_main(lambda: draw_question(study.out, question, summary))  # noqa: B023


if __name__ == "__main__":
    run_command(main)
