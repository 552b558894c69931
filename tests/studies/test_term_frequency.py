"""Counts against brute force on text, golden prompts, and a model that answers what it has read often."""

import csv
import json
import random
import re

import numpy as np
import pytest

pytest.importorskip("pyarrow")
import data
from corpus.edits import EDIT, write_edits
from corpus.prepare import prepare
from corpus.search import spans_of_texts
from corpus.tokenizer import byte_tokenizer
from runtime.errors import UserError
from studies import term_frequency
from studies.term_counts import TermCounts, word_edges
from studies.term_frequency import Question, adjusted_slope, arithmetic, rank_correlation, read_questions

SENTENCES = [
    "There are 7 apples.",
    "7 x 12 = 84",
    "24 , 24 , 24 , 24",
    "in 1999 , 24 and 25",
    "room 123456 is 24 m, a24 24b x_24 24_x 24",
    "24",
    "é24 24é (24) 24-7",
]
TERMS = ["7", "12", "24", "84", "99", "123456", "apples", "1999", "m"]
WHOLE = {term: re.compile(rf"(?<![^\W]){term}(?![^\W])") for term in TERMS}


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """A data set of those sentences, in documents of several; and its documents."""
    folder, rng = tmp_path_factory.mktemp("terms"), random.Random(0)
    documents = [" ".join(rng.choices(SENTENCES, k=rng.randint(1, 3))) for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    prepare([folder / "text.jsonl"], folder / "text")
    return folder / "text"


@pytest.mark.parametrize("seq_len", [15, 64])
def test_counts_are_those_of_a_search_in_the_text(numbers, seq_len):
    """Each document is searched as text; a match counts in the row that has all of it."""
    rows, tokenizer, batch = data.open_rows(numbers, 100, seq_len), byte_tokenizer(), 8
    spans = dict(zip(TERMS, spans_of_texts(TERMS, data.find_tokenizer(numbers), rows.data)))
    steps = len(rows) // batch
    counts = TermCounts(rows, batch, steps, spans, tokenizer)
    found = {term: np.zeros(steps * batch, int) for term in TERMS}
    for i in range(steps * batch):
        for term, pattern in WHOLE.items():
            found[term][i] = sum(piece_count(rows, i, pattern))
    for step in (0, 1, steps // 2, steps):
        for term in TERMS:
            assert counts.occurrences(term, step) == found[term][: step * batch].sum(), (term, step)
            assert counts.rows_with((term,), step) == (found[term][: step * batch] > 0).sum()
        both = (found["24"] > 0) & (found["7"] > 0)
        assert counts.rows_with(("24", "7"), step) == both[: step * batch].sum()
    assert counts.occurrences("24", steps) > counts.occurrences("84", steps) > 0


def test_rows_with_edits_are_counted_as_they_were_served(numbers, tmp_path):
    rows, tokenizer, batch, width = data.open_rows(numbers, 100, 64), byte_tokenizer(), 8, 65
    spans = dict(zip(TERMS, spans_of_texts(TERMS, data.find_tokenizer(numbers), rows.data)))
    steps = len(rows) // batch
    without = TermCounts(rows, batch, steps, spans, tokenizer)
    planted = {3: (5, " 24 84 a24 "), 10: (width - 3, " 24"), 11: (0, "84 "), steps * batch - 1: (20, "x7, 7")}
    edits = []
    for row, (position, text) in planted.items():
        ids = tokenizer.encode(text).ids
        edits += [(row, position + k, rows[row][position + k], id, 1) for k, id in enumerate(ids)]
    facts = {"order_sha256": rows.sha256, "seq_len": 64, "command": "test"}
    write_edits(tmp_path / "edits.parquet", facts, [np.array(edits, EDIT)])
    rows = data.with_edits(rows, tmp_path / "edits.parquet", batch)
    counts = TermCounts(rows, batch, steps, spans, tokenizer)
    plain = data.open_rows(numbers, 100, 64)
    for term, pattern in WHOLE.items():
        expected = np.array([without.occurrences(term, step) for step in range(steps + 1)])
        for row in planted:
            before = sum(piece_count(plain, row, pattern))
            expected[row // batch + 1 :] += (
                len(pattern.findall(tokenizer.decode(rows[row].tolist(), skip_special_tokens=False))) - before
            )
        assert [counts.occurrences(term, step) for step in range(steps + 1)] == expected.tolist(), term
    assert counts.occurrences("84", steps) > without.occurrences("84", steps)


def piece_count(rows, row: int, pattern: re.Pattern) -> list[int]:
    """How often each piece of a row of bytes has a word, of which the document decides the ends."""
    found = []
    for document, offset, length in rows.pieces(row):
        begin, end = rows.data.span(document)
        text = byte_tokenizer().decode(rows.data.read(begin, end - begin - 1).tolist())
        spans = [[len(text[:k].encode()) for k in match.span()] for match in pattern.finditer(text)]
        found.append(sum(offset <= start and stop <= offset + length for start, stop in spans))
    return found


def test_edges_of_tokens():
    begins, ends = word_edges(byte_tokenizer())
    ids = {char: byte_tokenizer().encode(char).ids for char in ("a", "7", "_", " ", "-", "é")}
    assert [bool(begins[ids[char][0]]) for char in ids] == [True, True, True, False, False, True]
    assert not begins[0]  # <|endoftext|>
    assert not ends[0]


def test_golden_prompts():
    questions = arithmetic("plus", 0, 0)
    assert len(questions) == 5000
    assert (questions[24 * 50 + 6].prompt, questions[24 * 50 + 6].answers) == ("Q:What is 24 plus 7? A:", ("31",))
    shots = arithmetic("times", 4, 0)
    for question in shots[::97]:
        *examples, last = question.prompt.split("\n")
        asked = [re.fullmatch(r"Q:What is (\d+) times (\d+)\? A:(\d+)", line).groups() for line in examples]
        assert all(int(a) * int(b) == int(answer) for a, b, answer in asked)
        assert len(examples) == 4
        assert question.terms[0] not in [a for a, _, _ in asked]
        assert re.fullmatch(rf"Q:What is {question.terms[0]} times \d+\? A:", last)
    assert [q.prompt for q in shots] == [q.prompt for q in arithmetic("times", 4, 0)]


@pytest.mark.parametrize(
    ("written", "right"),
    [("42", 1), (" 42.", 1), ("The answer is 42", 1), ("-42", 1), ("", 0), ("421", 0), ("4\n42", 0), ("\n42\nQ:", 1)],
)
def test_numbers_in_answers(written, right):
    assert Question("plus", 0, "", "", ("42",), ("1",)).is_right(written) == right


def test_answers_in_words():
    question = Question("trivia", 0, "", "", ("The U.S. Senate", "Senate"), ("x",))
    assert [question.is_right(text) for text in (" the senate.\nQ: more", "U S senate", "a House")] == [1, 1, 0]


def test_questions_of_a_file(tmp_path):
    file = tmp_path / "trivia.jsonl"
    entries = [{"question": f"q{i}?", "answers": [f"a{i}", "b"], "terms": [f"t{i}"]} for i in range(3)]
    file.write_text("\n".join(map(json.dumps, entries)))
    (first, *_) = read_questions(file, 2, 0)
    assert first.prompt.endswith("Q: q0?\nA:")
    assert "q0?\nA: a0" not in first.prompt
    assert first.prompt.count("A: a") == 2
    for text, shots, message in (
        ('{"question": "q"}', 0, r":1: not a line"),
        ('{"question": "q", "answers": [], "terms": ["t"]}', 0, r":1: not a line"),
        (json.dumps(entries[0]), 1, "1 questions; --shots 1 needs more"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_questions(file, shots, 0)


def test_the_slope_is_that_of_frequency_not_of_size():
    """Small numbers are frequent; log-probability depends on the size, or on the frequency."""
    rng, numbers = np.random.default_rng(0), np.arange(100)
    seen = np.exp(6 - numbers / 20 + rng.normal(0, 0.5, 100))
    terms, noise = np.array([str(n) for n in numbers]), rng.normal(0, 0.1, 100)
    assert rank_correlation(seen, -numbers / 30 + noise) > 0.8  # what a look at the frequency alone would say
    slope, error = adjusted_slope(terms, seen, -numbers / 30 + noise)
    assert abs(slope) < 3 * error
    slope, error = adjusted_slope(terms, seen, 0.5 * np.log1p(seen) + noise)
    assert slope == pytest.approx(0.5, abs=3 * error)


def test_a_model_knows_what_it_has_read_often(run, tmp_path):
    """Facts about letters, planted 1 to 64 times. The study finds that those of many rows are answered."""
    rng = random.Random(0)
    facts = {letter: rng.choice("0123456789") for letter in "abcdefghijkl"}
    copies = {letter: 4 ** (k // 3) for k, letter in enumerate(facts)}  # 1, 4, 16 or 64
    texts = [f"Q: {letter}?\nA: {facts[letter]}" for letter, times in copies.items() for _ in range(times)]
    rng.shuffle(texts)
    (tmp_path / "facts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    prepare([tmp_path / "facts.jsonl"], tmp_path / "facts")
    runs = run("--data", tmp_path / "facts", "--steps", 90, "--lr", "1e-2", "--seq-len", 64, "--batch-size", 8)
    questions = tmp_path / "letters.jsonl"
    lines = [{"question": f"{letter}?", "answers": [fact], "terms": [letter]} for letter, fact in facts.items()]
    questions.write_text("\n".join(map(json.dumps, lines)))
    flags = ["--task", "", "--questions", questions, "--shots", "0", "--steps", "0,90", "--out", tmp_path / "out"]
    term_frequency.main([str(runs), *map(str, flags)])
    with open(tmp_path / "out/frequency.csv") as file:
        before, after = csv.DictReader(file)
    assert before["rows_seen"] == "0.0"
    assert before["rho"] == "nan"
    assert float(after["rho_log_probability"]) > 0.6
    assert float(after["rho_log_probability_low"]) > 0
    with open(tmp_path / "out/counts.csv") as file:
        counts = {line["term"]: int(line["occurrences"]) for line in csv.DictReader(file) if line["step"] == "90"}
    assert counts["a"] < counts["d"] < counts["g"] < counts["j"]


def test_unknown_tasks():
    with pytest.raises(UserError, match="--task knows plus, times, not minus"):
        term_frequency.main(["x", "--task", "minus"])
