"""`data.py edit swap`: golden sentences, WinoBias, and rows."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

import data
from corpus.edits import Edits
from corpus.prepare import prepare
from corpus.pronouns import DIRECTIONS, Swap, forms_of
from corpus.tokenizer import byte_tokenizer

SHARED = Path(__file__).parents[3] / "shared/data"
WORDS = "he she him her his hers himself herself"


def small_tokenizer() -> Tokenizer:
    """One token a byte, and one for every pronoun in lower case and capitalized, with and without a space before it."""
    tokenizer = byte_tokenizer()
    vocab, merges = tokenizer.get_vocab(), []
    for word in [f"{space}{w}" for w in WORDS.split() for w in (w, w.capitalize()) for space in ("", " ")]:
        tokens = tokenizer.encode(word).tokens
        while len(tokens) > 1:
            merges.append((tokens[0], tokens[1]))
            tokens = ["".join(tokens[:2]), *tokens[2:]]
            vocab.setdefault(tokens[0], len(vocab))
        tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    return tokenizer


def pythia_tokenizer() -> Tokenizer:
    if not (file := SHARED / "20B_tokenizer.json").exists():
        pytest.skip(f"needs the tokenizer of Pythia, {file}")
    return Tokenizer.from_file(str(file))


def swapped(tokenizer: Tokenizer, swap: Swap, text: str) -> str:
    """The text that the swap makes of one row, which has a new line at both ends."""
    ids = np.array([tokenizer.encode(f"\n{text}\n").ids])
    edits = swap.edits(np.array([0]), ids)
    assert (ids[0, edits["position"]] == edits["old"]).all()
    ids[0, edits["position"]] = edits["new"]
    return tokenizer.decode(ids[0].tolist(), skip_special_tokens=False)[1:-1]


GOLDEN = [
    ("m2f", "He said he liked his book.", "She said she liked her book."),
    ("m2f", "The book is his.", "The book is hers."),
    ("m2f", "Look: His was better; he told him so himself.", "Look: Hers was better; she told her so herself."),
    ("m2f", "He's late, and he'd know he'll lose.", "She's late, and she'd know she'll lose."),
    ("m2f", "he/him, (he) \"He\" ‘his’", "she/her, (she) \"She\" ‘hers’"),
    ("m2f", "heritage Hebrew the herald; him_2; he2; hisself", "heritage Hebrew the herald; him_2; he2; hisself"),
    ("m2f", "She gave her book to her.", "She gave her book to her."),
    ("m2f", "his and her towels", "her and her towels"),
    ("f2m", "She gave her book to her.", "He gave his book to him."),
    ("f2m", "I saw her yesterday and told her the truth.", "I saw him yesterday and told him the truth."),
    ("f2m", "It is hers, not her sister's; she did it herself.", "It is his, not his sister's; he did it himself."),
    ("f2m", "Her idea. See: Hers!", "His idea. See: His!"),
    ("f2m", "The guard saw the secretary and wanted her job.", "The guard saw the secretary and wanted his job."),
    ("both", "he saw her, she saw him", "she saw him, he saw her"),
]  # fmt: skip


@pytest.mark.parametrize("make", [small_tokenizer, pythia_tokenizer])
def test_golden(make):
    tokenizer = make()
    swaps = {direction: Swap(tokenizer, direction) for direction in DIRECTIONS}
    for direction, text, expected in GOLDEN:
        assert swapped(tokenizer, swaps[direction], text) == expected


def test_what_is_skipped_is_counted():
    tokenizer, swap = small_tokenizer(), Swap(small_tokenizer(), "m2f")
    ids = tokenizer.encode("he said HE saw HIS cat, it is his").ids  # HE and HIS are one token a byte
    e, i, r, s = (ord(letter) - 31 for letter in "EIRS")  # as in Pythia's tokenizer
    edits = swap.edits(np.array([7]), np.array([ids]))
    assert edits.tolist() == [(7, 15, i, e, 1), (7, 16, s, r, 1)]
    assert swap.skipped == {"at an end of a row": 2, "HE -> SHE: 3 tokens would be 4": 1}
    assert swap.swapped == swap.decided == {"his -> her": 1}


def test_rows_before_the_first_step_and_all_other_tokens_stay(tmp_path, capsys):
    tokenizer = small_tokenizer()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = {"text": "She said that he saw him, and her brother saw his sister himself. " * 8}
    (tmp_path / "text.jsonl").write_text((json.dumps(text) + "\n") * 30)
    prepare([tmp_path / "text.jsonl"], tmp_path / "text", tmp_path / "tokenizer.json")
    order = ["--data", str(tmp_path / "text"), "--steps", "9", "--batch-size", "4", "--seq-len", "32"]
    file = tmp_path / "e.parquet"
    data.main(["edit", "swap", "--direction", "m2f", "--from-step", "2", "--out", str(file), *order])
    report = json.loads(capsys.readouterr().out)
    rows, edited = (data.open_rows(tmp_path / "text", data.requested_samples(9, 4), 32, edits=e) for e in (None, file))
    before, after = rows.take(np.arange(36)), edited.take(np.arange(36))
    assert (before[:8] == after[:8]).all()
    ids = tokenizer.get_vocab()
    pairs = {
        (ids["Ġ" + a], ids["Ġ" + b]) for a, b in zip(["he", "him", "his", "himself"], ["she", "her", "her", "herself"])
    }
    different = before != after
    assert {*zip(before[different].tolist(), after[different].tolist())} == pairs
    assert different.sum() == sum(report["swapped"].values()) == Edits(file).count
    left = np.isin(before[8:], [a for a, _ in pairs]).sum() - different.sum()
    assert left == report["skipped"]["at an end of a row"]


# From the table of the tokenizer: (masculine, feminine) -> ids, as Pythia's tokenizer has them.
TABLE = {
    (" he", " she"): (344, 703), (" him", " her"): (779, 617), (" his", " hers"): (521, 22502),
    (" himself", " herself"): (2994, 5972), (" He", " She"): (754, 1500), (" His", " Hers"): (3032, 41264),
    (" HE", " SHE"): (10197, 36722), (" HIS", " HER"): (38164, 20467), ("he", "she"): (248, 6689),
    ("his", "hers"): (8701, 3398), ("His", "Her"): (8389, 10759),
}  # fmt: skip
UNEQUAL = {" Himself", "himself", "Him", "HE"}


def test_the_table_of_the_tokenizer_of_pythia():
    forms = [form for group in forms_of(pythia_tokenizer(), DIRECTIONS["m2f"]).values() for form in group]
    found = {(form.text, text): (form.ids, ids) for form in forms for _, text, ids in form.others}
    assert {pair: ([a], [b]) for pair, (a, b) in TABLE.items()}.items() <= found.items()
    assert {text for (text, _), (a, b) in found.items() if len(a) != len(b)} >= UNEQUAL


def test_winobias():
    """Pairs of sentences that differ in gender: either becomes the other in at least 95%, and all keep their length."""
    tokenizer = pythia_tokenizer()
    swap, exact, total = Swap(tokenizer, "both"), 0, 0
    for kind in ("type1", "type2"):
        pro, anti = (
            [re.sub(r"^\d+ |[][]", "", line).strip() for line in file.read_text().splitlines() if line.strip()]
            for file in (SHARED / f"winobias/{side}_stereotyped_{kind}.txt.dev" for side in ("pro", "anti"))
        )
        for a, b in [*zip(pro, anti, strict=True), *zip(anti, pro)]:
            ours = swapped(tokenizer, swap, a)
            exact += " ".join(ours.lower().split()) == " ".join(b.lower().split())
            total += 1
            assert len(tokenizer.encode(ours).ids) == len(tokenizer.encode(a).ids)
    assert total == 1584
    assert exact / total >= 0.95
