"""Probes: a line that is none is named."""

import pytest

from corpus.probes import read_probes
from corpus.tokenizer import byte_tokenizer
from runtime.errors import UserError

GOOD = '{"tokens": [1, 2]}\n'


@pytest.mark.parametrize(
    "text", ['{"tokens": [1]}', '{"tokens": [1, -2]}', '{"tokens": [1, "2"]}', '{"text": 3}', "[1]", "{"]
)
def test_a_line_that_is_no_probe_is_named(text, tmp_path):
    (tmp_path / "p.jsonl").write_text(GOOD + text)
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: "):
        read_probes(tmp_path / "p.jsonl", byte_tokenizer)


def test_no_probes(tmp_path):
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(UserError, match=r"p\.jsonl has no probes"):
        read_probes(tmp_path / "p.jsonl", byte_tokenizer)
