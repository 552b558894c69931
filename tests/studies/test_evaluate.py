"""Answers against transformers in float64, one text at a time; the batch size changes none of them."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from corpus.tokenizer import byte_tokenizer
from runtime.errors import UserError
from studies import evaluate
from studies.evaluate import Item, cut, encode, metrics, read_task, score_line, with_examples

CHOICES = Item("task", 0, 0, "Q: 1+1?\nA:", (" 2", " 30 é"), 0)
LINE = {"context": "Q:", "choices": [" a", " b"], "answer": 0}


def write_tasks(folder: Path) -> list[Path]:
    """Choices of one token and of several, and last words: seven items each, of texts that differ in length."""
    words = random.Random(0)

    def text(count: int) -> str:
        return "".join(words.choices("abcdefghij ", k=count)).strip() or "a"

    choices = [
        {"context": text(words.randint(1, 20)), "choices": [f" {text(1 + 4 * (i % 2))}" for _ in range(2 + i % 3)]}
        for i in range(7)
    ]
    last = [{"context": text(9) if i else "", "continuation": f" {text(i + 1)}"} for i in range(7)]
    files = []
    for name, lines in (("choices", [line | {"answer": i % 2} for i, line in enumerate(choices)]), ("last", last)):
        files.append(folder / f"{name}.jsonl")
        files[-1].write_text("\n".join(json.dumps(line) for line in lines))
    return files


def study(out: Path, *arguments) -> tuple[dict, list[dict]]:
    """The columns of items.parquet, and the lines of scores.csv."""
    evaluate.main([*map(str, arguments), "--out", str(out)])
    with open(out / "scores.csv") as file:
        return pq.read_table(out / "items.parquet").to_pydict(), list(csv.DictReader(file))


def test_answers_are_those_of_transformers(run, tmp_path):
    transformers = pytest.importorskip("transformers")
    files, directory = write_tasks(tmp_path), run("--steps", 2, "--lr", "1e-2")
    flags = directory, "--task", ",".join(map(str, files)), "--shots", "0,2", "--steps", "0,2", "--dtype", "fp64"
    items, scores = study(tmp_path / "out", *flags, "--batch", 5)
    tasks = {file.stem: read_task(file) for file in files}
    asked = {(name, shots): with_examples(task, shots, 0) for name, task in tasks.items() for shots in (0, 2)}
    tokenizer = byte_tokenizer()
    for step in (0, 2):
        as_trained = {"dtype": torch.float64, "hidden_act": "gelu_pytorch_tanh"}  # config.json has the published one
        model = transformers.GPTNeoXForCausalLM.from_pretrained(directory / f"step{step}", **as_trained)
        for i in np.flatnonzero(np.array(items["step"]) == step):
            item = asked[items["task"][i], items["shots"][i]][items["item"][i]]
            text = item.context.rstrip()  # white space at its end is asked for, as the harness does it
            whole = item.context + item.choices[items["choice"][i]]
            before, after = (tokenizer.encode(part).ids for part in (text, whole[len(text) :]))
            ids = torch.tensor([((before or [0]) + after)[-33:]])  # it reads 32 tokens
            logp = model(ids[:, :-1]).logits[0].log_softmax(-1)[-len(after) :]
            expected = logp.gather(1, torch.tensor(after)[:, None]).sum().item()
            assert items["log_likelihood"][i] == pytest.approx(expected, abs=1e-4)
            assert items["greedy"][i] == bool((logp.argmax(1) == torch.tensor(after)).all())
            assert items["right"][i] == (items["choice"][i] == item.answer)
    assert len(scores) == 2 * 2 * 2
    chance = {line["task"]: line["chance"] for line in scores}
    assert chance["last"] == ""
    assert float(chance["choices"]) == pytest.approx((3 / 2 + 2 / 3 + 2 / 4) / 7)
    assert (tmp_path / "out/choices_acc.svg").exists()

    again, _ = study(tmp_path / "alone", *flags, "--batch", 1)
    np.testing.assert_allclose(again.pop("log_likelihood"), items["log_likelihood"], rtol=0, atol=1e-9)
    assert again == {name: values for name, values in items.items() if name != "log_likelihood"}


def test_runs_are_compared_item_by_item(run, tmp_path):
    files = write_tasks(tmp_path)
    runs = [run("--steps", 2, "--lr", rate, out=f"run{rate}") for rate in ("1e-3", "1e-1")]
    items, scores = study(tmp_path / "out", *runs, "--task", files[1], "--steps", "0,2")
    base, same, other = scores[0], scores[2], scores[3]
    assert base["bits_per_byte_change"] == ""
    assert float(same["bits_per_byte_change"]) == 0  # the same initial weights
    values = np.array(items["log_likelihood"]).reshape(2, 2, 7)
    assert float(other["log_likelihood_change"]) == pytest.approx((values[1, 1] - values[0, 1]).mean())


def columns(likelihood: list[float], **others) -> dict[str, np.ndarray]:
    """Two items of two choices; the first one is right."""
    given = {"item": [4, 4, 2, 2], "right": [1, 0, 1, 0], "bytes": [1, 4, 2, 4], "greedy": [0, 0, 0, 0]} | others
    kept = {name: np.array(values, bool if name in ("right", "greedy") else int) for name, values in given.items()}
    return kept | {"log_likelihood": np.array(likelihood, float)}


def test_metrics_by_hand():
    found = metrics(columns([-2, -3, -5, -4]))
    assert found["acc"].tolist() == [True, False]
    assert found["acc_norm"].tolist() == [False, False]  # a byte: -2, -0.75 and -2.5, -1
    assert found["log_likelihood"].tolist() == [-2, -5]
    np.testing.assert_allclose(found["bits_per_byte"], np.array([2, 2.5]) / np.log(2))
    assert metrics(columns([-3, -3, -1, -1]))["acc"].tolist() == [True, True]  # the first of equal ones
    words = columns([-1, -2], item=[0, 1], right=[1, 1], bytes=[1, 1], greedy=[1, 0])
    assert metrics(words)["acc"].tolist() == [True, False]
    assert np.isnan(metrics(words)["acc_norm"]).all()


def test_changes_against_a_base():
    line = score_line(columns([-2, -3, -3, -4]), columns([-2, -3, -5, -4]), 0)
    assert (line["acc"], line["acc_change"], line["acc_mcnemar_p"], line["chance"]) == (1, 0.5, 1, 0.5)
    assert (line["log_likelihood_change"], line["log_likelihood_change_low"]) == (1, 0)
    assert score_line(columns([-2, -3, -3, -4]), None, 0)["acc_change"] is None


def test_examples_are_others_of_the_file():
    items = [Item("task", 0, i, f"Q{i}:", (f" wrong{i}", f" right{i}"), 1) for i in range(5)]
    assert with_examples(items, 0, 0) == items
    found = with_examples(items, 4, 0)
    for item in found:
        others = [f"Q{i}: right{i}" for i in range(5) if i != item.number]
        *examples, asked = item.context.split("\n\n")
        assert (sorted(examples), asked) == (others, f"Q{item.number}:")
    assert len({item.context for item in with_examples(items[:1] * 5, 2, 0)}) == 1
    with pytest.raises(UserError, match="task has 5 items; --shots 5 needs more"):
        with_examples(items, 5, 0)


def test_what_the_model_reads():
    found, inputs = encode([Item("task", 0, 1, "ab", (" c",), 0), CHOICES], byte_tokenizer(), 2048)
    assert found["item"].tolist() == [0, 0, 1]  # long ones first
    assert found["bytes"].tolist() == [1, 5, 1]
    assert found["right"].tolist() == [True, False, True]
    assert inputs["context"].tolist() == [10, 10, 2]
    assert cut([1, 2, 3, 4], 2, 3) == ([1, 2, 3, 4], 2)
    assert cut([1, 2, 3, 4], 2, 2) == ([2, 3, 4], 1)
    with pytest.raises(UserError, match="a choice has 2 tokens, the model reads 1"):
        cut([1, 2, 3, 4], 2, 1)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "has no items"),
        ("{", "item 1: JSONDecodeError"),
        (json.dumps([1]), "item 1: KeyError|item 1: TypeError"),
        (json.dumps({"context": "a"}), "item 1: KeyError.'continuation'"),
        (json.dumps(LINE | {"answer": 2}), "answer is not the number of a choice"),
        (json.dumps(LINE | {"answer": True}), "answer is not the number of a choice"),
        (json.dumps(LINE | {"choices": [" a"]}), "an only choice"),
        (json.dumps(LINE | {"choices": [" a", " "]}), "an empty text"),
        (json.dumps(LINE | {"choices": 5}), "item 1: TypeError"),
        (json.dumps(LINE | {"context": 5}), "a text is not a string"),
        (json.dumps(LINE) + '\n{"context": "a", "continuation": " b"}', "item 2: .*are in one file"),
    ],
)
def test_wrong_files(tmp_path, lines, reason):
    (tmp_path / "x.jsonl").write_text(lines)
    with pytest.raises(UserError, match=f"x.jsonl.*{reason}"):
        read_task(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--task", ","), "give files of different names"),
        (("--task", "a/x.jsonl,b/x.jsonl"), "give files of different names"),
        (("--task", "x.jsonl", "--shots", "one"), "--shots one: give whole numbers"),
        (("--task", "x.jsonl", "--shots", "-1"), "--shots 0 or more"),
    ],
)
def test_wrong_flags(flags, reason):
    with pytest.raises(UserError, match=reason):
        evaluate.parse(["runs/x", *flags])
