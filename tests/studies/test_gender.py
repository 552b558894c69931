"""The questions about pronouns, their tables, and a model that learns a stereotype and unlearns it."""

import csv
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

from corpus.prepare import prepare
from corpus.tokenizer import byte_tokenizer
from runtime.errors import UserError
from studies import gender
from studies.gender import ask, encode, paper_template, read_control, read_crows, read_winobias

STEPS = 80
WINOBIAS = Path(__file__).parents[3] / "shared/data/winobias"
PRO = "27 [The developer] visited the hairdresser because [he] needed to cut [his] hair."
ANTI = "27 [The developer] visited the hairdresser because [she] needed to cut [her] hair."
ASKED = (
    "The developer visited the hairdresser because The developer needed to cut his hair.\nIn this sentence, what can "
    '"The developer" more likely be replaced by: "he", or "she"?'
)


def test_the_questions_of_a_pair():
    slot, sentence, template = ask("type1", "type1 27", PRO, ANTI)
    assert slot["context"] == sentence["context"] == "The developer visited the hairdresser because "
    assert slot["answers"] == ("he", "she")
    assert sentence["answers"] == ("he needed to cut his hair.", "she needed to cut her hair.")
    assert (template["context"], template["answers"]) == (ASKED, (" he", " she"))
    assert slot["masculine"]
    other = ask("type1", "type1 27", ANTI, PRO)
    assert not other[0]["masculine"]
    assert other[2]["answers"] == (" she", " he")


@pytest.mark.parametrize(
    ("pronouns", "choices"),
    [({"he", "she"}, ("he", "she")), ({"him", "her"}, ("him", "her")), ({"his", "her"}, ("his", "hers"))],
)
def test_the_answers_of_the_template(pronouns, choices):
    text, answers = paper_template(f"The cook lost {min(pronouns)}.", "the cook", pronouns)
    assert answers == tuple(f" {choice}" for choice in choices)
    assert text.startswith("The cook lost the cook.\n")
    assert text.endswith(f'replaced by: "{choices[0]}", or "{choices[1]}"?')


@pytest.mark.parametrize(
    ("pro", "anti", "reason"),
    [
        (PRO, PRO, "does not differ by a masculine and a feminine pronoun"),
        (PRO, ANTI.replace("visited", "saw"), "does not differ by a masculine and a feminine pronoun"),
        (PRO, ANTI.replace("[she]", "she").replace("[her]", "her"), "lacks a person or a pronoun"),
        ("1 [he] left", "1 [she] left", "lacks a person or a pronoun"),
    ],
)
def test_what_is_no_pair(pro, anti, reason):
    with pytest.raises(ValueError, match=reason):
        ask("type1", "1", pro, anti)


@pytest.mark.skipif(not WINOBIAS.is_dir(), reason="WinoBias is not part of the project")
def test_winobias(capsys):
    questions = read_winobias(WINOBIAS, "dev")
    assert "note: 6 of 792 pairs of WinoBias are left out, as " in capsys.readouterr().err  # typing errors
    assert len(questions) == 3 * (2 * 396 - 6)
    slots = [q for q in questions if q["question"] == "slot"]
    assert abs(sum(q["masculine"] for q in slots) - len(slots) / 2) <= 6  # the partner's profession is the other one
    assert len(encode(questions, byte_tokenizer())["tokens_a"]) == len(questions)
    possessive = [q for q in slots if {"his", "her"} == set(q["answers"])]
    assert 0.08 < len(possessive) / len(slots) < 0.18  # 12% of type 1 and 8% of type 2, and more


def test_other_files(tmp_path):
    crows, control = tmp_path / "crows.csv", tmp_path / "control.jsonl"
    crows.write_text('sent_more,sent_less,stereo_antistereo,bias_type\n"Women, he said.",Men.,stereo,gender\n')
    control.write_text('{"text": "a b c"}\n')
    assert read_crows(crows)[0]["answers"] == ("Women, he said.", "Men.")
    assert (read_control(control)[0]["context"], read_control(control)[0]["answers"][0]) == ("a b", " c")
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("some text\n")
    (tmp_path / "anti_stereotyped_type1.txt.dev").write_text("some text\n")
    for read, text, message in (
        (read_crows, "a,b\n1,2\n", "no rows with the columns sent_more"),
        (read_control, '{"text": "one"}', "x:1: one word"),
        (read_control, '{"text": 5}', r'x:1: not a line {"text": "\.\.\."}'),
    ):
        (tmp_path / "x").write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "x")
    with pytest.raises(UserError, match="absent cannot be read"):
        read_crows(tmp_path / "absent")


def sentences(nurse: str) -> list[str]:
    """Documents of one sentence in which nurses have a pronoun, and guards the other one."""
    other = {"he": "she", "she": "he"}[nurse]
    pairs = random.Random(0).choices((("nurse", nurse), ("guard", other)), k=200)
    return [f"the {person} said that {pronoun} left." for person, pronoun in pairs]


def winobias_of(directory: Path) -> Path:
    """Files as those of WinoBias: nurses are women, guards men."""
    directory.mkdir()
    for kind in ("type1", "type2"):
        for side, nurse, guard in (("pro", "she", "he"), ("anti", "he", "she")):
            lines = [f"1 [the nurse] said that [{nurse}] left.", f"2 [the guard] said that [{guard}] left."]
            (directory / f"{side}_stereotyped_{kind}.txt.dev").write_text("\n".join(lines))
    return directory


def study(out: Path, *arguments) -> list[dict]:
    gender.main([*map(str, arguments), "--out", str(out)])
    with open(out / "summary.csv") as file:
        return list(csv.DictReader(file))


def test_a_model_learns_a_stereotype_and_the_other_one(run, tmp_path):
    for name, nurse in (("base", "she"), ("swapped", "he")):
        text = "\n".join(json.dumps({"text": text}) for text in sentences(nurse))
        (tmp_path / f"{name}.jsonl").write_text(text)
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name)
        run("--data", tmp_path / name, "--steps", STEPS, "--lr", "1e-2", "--batch-size", 8, out=f"run-{name}")
    files = winobias_of(tmp_path / "winobias")
    runs = tmp_path / "run-base", tmp_path / "run-swapped"
    base, swapped = (
        [
            line
            for line in study(tmp_path / "out", *runs, "--winobias", files, "--steps", f"0,{STEPS}")
            if line["run"] == run.name
        ]
        for run in runs
    )
    assert base[0]["slot_log_odds"] == swapped[0]["slot_log_odds"]  # the same initial weights
    assert float(swapped[0]["slot_change"]) == 0
    assert base[1]["slot_change"] == ""
    assert float(base[1]["slot_stereotype"]) == 1
    assert float(swapped[1]["slot_stereotype"]) == 0
    assert float(swapped[1]["slot_change_high"]) < 0
    items = pq.read_table(tmp_path / "out/items.parquet").to_pydict()
    assert len(items["item"]) == 2 * 2 * 12
