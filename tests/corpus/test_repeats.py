"""How often tokens are trained on, and duplicates: against loops over every token."""

from collections import Counter

import numpy as np
import pytest
from megatron import random_documents, run_data, write_data

from corpus import repeats
from corpus.order import Order


@pytest.mark.parametrize("samples", [20, 90, 200])  # one epoch, two, and four
def test_times_trained(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(repeats, "BLOCK", 7)
    rng = np.random.default_rng(samples)
    write_data(tmp_path / "data", random_documents(rng, 60, 30))  # some are empty
    order = Order(tmp_path / "data", samples, 17)
    for served in (0, 1, len(order) // 3, len(order)):
        trained = np.zeros(order.data.tokens, np.int64)
        for row in range(served):
            tokens = [order.data.start(d) + k for d, offset, n in order.pieces(row) for k in range(offset, offset + n)]
            np.add.at(trained, tokens[1:], 1)
        expected = np.bincount(trained, minlength=order.epochs + 1)
        assert repeats.times_trained(order, served).tolist() == expected.tolist()


def test_info_counts_what_is_seen_and_what_is_there_twice(tmp_path):
    """Three documents are equal. One repeats the same tokens, and most rows lie in it."""
    rng = np.random.default_rng(0)
    short, half = rng.integers(1, 9, 5).tolist(), rng.integers(10, 99, 40).tolist()
    documents = [short, short, half * 30, short, [7] * 5, []]
    write_data(tmp_path / "data", documents)
    flags = "--data", "data", "--seq-len", "40", "--batch-size", "2", "--steps", "10"
    shown = run_data(tmp_path, "info", *flags, "--seen", "3", "--duplicates")
    assert shown.returncode == 0, shown.stderr
    order = Order(tmp_path / "data", 21, 40)
    copies = Counter(order[i].tobytes() for i in range(20))
    assert sum(copies.values()) - len(copies) > 10
    assert f"duplicates   2 of 6 documents, {20 - len(copies)} of 20 rows equal an earlier one\n" in shown.stdout
    tokens = order.data.tokens
    never, once = (f"{count / tokens:.4%}" for count in (tokens - 240, 240))
    assert f"after 3 steps, as targets: never {never}, once {once} of {tokens:,} tokens\n" in shown.stdout
    refused = run_data(tmp_path, "info", *flags, "--seen", "15")
    assert "error: --seen 15: the data has 14 steps\n" in refused.stderr
