"""data.py fetch: shards and single steps from a hub on 127.0.0.1."""

import argparse
import json

import numpy as np
import pytest
from megatron import cut_into_shards, write_data, write_index
from mock_hub import Hub, use

from corpus import fetch
from corpus.fetch import add_fetch_arguments, run_fetch
from corpus.order import ShuffledRows
from corpus.repeats import absent_rows
from corpus.tokenizer import byte_tokenizer
from data import batch, fingerprint, known_sha256
from runtime.errors import UserError

STEPS, BATCH, ROW = 6, 4, 33
CUTS = [1000, 1300]  # bytes: the third batch lies in three shards; the cuts fall within rows and tokens


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A pre-shuffled data set of six steps of four rows, in three shards."""
    main = tmp_path / "hub/datasets/EleutherAI/pile-standard-pythia-preshuffled/main"
    main.mkdir(parents=True)
    monkeypatch.setattr(fetch, "BATCH", BATCH)
    monkeypatch.setattr(fetch, "ROW", ROW)
    rows = np.random.default_rng(0).integers(0, 50_277, (STEPS * BATCH, ROW))
    write_data(main / "document", list(rows), marks=[0])
    cut_into_shards(main / "document", CUTS)
    models = tmp_path / "hub/models/EleutherAI/pythia-70m/main"
    models.mkdir(parents=True)
    byte_tokenizer().save(str(models / "tokenizer.json"))
    with Hub(tmp_path / "hub") as server:
        use(monkeypatch, server.url)
        server.main, server.rows = main, rows
        yield server


def run(*line):
    parser = argparse.ArgumentParser()
    add_fetch_arguments(parser)
    run_fetch(parser.parse_args([*map(str, line)]))


def refused(*line, words):
    with pytest.raises(UserError) as caught:
        run(*line)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_shards(server, tmp_path):
    run("standard", "--out", tmp_path / "out")
    rows = ShuffledRows(tmp_path / "out", ROW - 1)
    np.testing.assert_array_equal(np.stack([rows[i] for i in range(len(rows))]), server.rows)
    assert (tmp_path / "out/tokenizer.json").exists()
    server.log.clear()
    run("standard", "--out", tmp_path / "out")
    assert not [entry for entry in server.log if "cdn" in entry["path"]]


def test_some_shards(server, tmp_path):
    run("standard", "--shards", "1-2", "--out", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    shards = [f"document-0000{n}-of-00002.bin" for n in range(3)]
    assert names == {*shards[1:], "document.idx", "document.shards.json", "tokenizer.json"}
    record = json.loads((tmp_path / "out/document.shards.json").read_text())["shards"]
    assert {name: entry["bytes"] for name, entry in record.items()} == {
        name: (server.main / name).stat().st_size for name in shards
    }
    rows = ShuffledRows(tmp_path / "out", ROW - 1)
    whole = [i for i in range(len(rows)) if i * ROW * 2 >= CUTS[0]]
    np.testing.assert_array_equal(np.stack([rows[i] for i in whole]), server.rows[whole])
    assert absent_rows(rows) == f"0 to {whole[0] - 1}"
    assert known_sha256(rows.data) is None
    with pytest.raises(UserError, match=r"00000-of-00002.bin is not here.*--shards 0"):
        rows[whole[0] - 1]
    with pytest.raises(UserError, match=r"00000-of-00002.bin is not here"):
        fingerprint(rows)
    run("standard", "--shards", "0", "--out", tmp_path / "out")
    assert len(fingerprint(ShuffledRows(tmp_path / "out", ROW - 1))["shards"]) == 3
    (tmp_path / "out/document.shards.json").write_text("[")
    with pytest.raises(UserError, match=r"shards.json is damaged"):
        ShuffledRows(tmp_path / "out", ROW - 1)
    for text in ("3", "0-3", "2-1", "a", "-1"):
        refused("standard", f"--shards={text}", "--out", tmp_path / "out", words="--shards")


@pytest.mark.parametrize("step", range(STEPS))
def test_a_step_by_ranges(server, tmp_path, step):
    """Equal to the bytes of the whole data set, also across shards; only these bytes travel."""
    run("standard", "--step", step, "--out", tmp_path / "out")
    rows = ShuffledRows(tmp_path / f"out/step{step}", ROW - 1)
    np.testing.assert_array_equal(batch(rows, 0, BATCH)[0], server.rows[step * BATCH : (step + 1) * BATCH])
    ranges = [entry["range"] for entry in server.log if "cdn" in entry["path"] and "document" in entry["path"]]
    spans = [[int(n) for n in text.removeprefix("bytes=").split("-")] for text in ranges]
    assert sum(last - first + 1 for first, last in spans) == BATCH * ROW * 2
    begin, end = step * BATCH * ROW * 2, (step + 1) * BATCH * ROW * 2
    assert len(ranges) == 1 + sum(begin < cut < end for cut in CUTS)


def test_refusals(server, tmp_path):
    out = tmp_path / "out"
    refused("standard", "--step", STEPS, "--out", out, words=f"the steps 0 .. {STEPS - 1}")
    refused("standard", "--step", "-1", "--out", out, words="the steps 0 ..")
    refused("standard", "--step", "1", "--shards", "0", "--out", out, words="--step works alone")
    refused("deduped-documents", "--step", "1", "--out", out, words="--step works alone")
    refused("deduped", "--out", out, words="no repository EleutherAI/pile-deduped-pythia-preshuffled")
    server.flip = {"document-00001-of-00002.bin"}
    refused("standard", "--out", out, words="document-00001-of-00002.bin: what")
    server.flip = set()
    (server.main / "document-00001-of-00002.bin").unlink()
    refused("standard", "--out", out, words="does not have the shards of one data set")


def test_a_range_with_other_tokens(server, tmp_path):
    shard = server.main / "document-00000-of-00002.bin"
    shard.write_bytes(b"\xff\xff" + shard.read_bytes()[2:])
    refused("standard", "--step", "0", "--out", tmp_path / "out", words="not rows of Pythia's tokens")
    assert not list((tmp_path / "out/step0").iterdir())


def test_documents_and_their_maps(server, tmp_path):
    """The unshuffled data, and GPT-NeoX's cached maps where they are published."""
    main = tmp_path / "hub/datasets/EleutherAI/pythia_deduped_pile_idxmaps/main"
    main.mkdir(parents=True)
    stem = "pile_0.87_deduped_text_document"
    write_index(main / stem, [3, 4])
    for number, data in enumerate((b"\1\0" * 3, b"\2\0" * 4)):
        (main / f"{stem}-0000{number}-of-00001.bin").write_bytes(data)
    np.save(main / f"{stem}_train_0_indexmap_8ns_2048sl_1234s_doc_idx.npy", np.arange(2))
    run("deduped-documents", "--out", tmp_path / "out")
    expected = {path.name for path in main.iterdir()} | {f"{stem}.shards.json", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
