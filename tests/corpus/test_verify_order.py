"""data.py verify-order: maps on a hub on 127.0.0.1, written by NumPy as EleutherAI's were."""

import numpy as np
import pytest
from megatron import MAPS, arrays, copy_golden
from mock_hub import Hub, use

import data
from corpus.verify_order import MOST, REPO
from runtime.errors import UserError

SAMPLES = 57  # two epochs of edgeA


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The maps that GPT-NeoX's own code made, and only the index of their data here."""
    folder = tmp_path / "hub/datasets" / REPO / "main" / "seed0"
    folder.mkdir(parents=True)
    truth = arrays("edgeA_golden")
    for name in MAPS:
        np.save(folder / f"edgeA_train_0_indexmap_{SAMPLES}ns_64sl_1234s_{name}.npy", truth[f"s1234_ep2_{name}"])
    copy_golden(tmp_path)
    (tmp_path / "edgeA.bin").unlink()
    monkeypatch.setattr(data, "requested_samples", lambda *_: SAMPLES)
    monkeypatch.chdir(tmp_path)
    with Hub(tmp_path / "hub") as server:
        use(monkeypatch, server.url)
        server.folder = folder
        yield server


def verify(*flags):
    data.main(["verify-order", "--data", "edgeA", "--seq-len", "64", *flags])


def test_equal_maps(hub, capsys):
    verify()
    assert "the published order" in capsys.readouterr().out
    assert sum(entry.get("bytes", 0) for entry in hub.log if "cdn" in entry["path"]) <= 3 * MOST


@pytest.mark.parametrize("name", MAPS)
def test_one_other_number_is_named(hub, name, capsys):
    (path,) = hub.folder.glob(f"*{name}.npy")
    raw = bytearray(path.read_bytes())
    raw[-4] ^= 1
    path.write_bytes(raw)
    with pytest.raises(SystemExit):
        verify()
    out = capsys.readouterr().out
    assert out.count("are others") == 1
    assert f"{name}: the numbers of seed0/" in out


def test_another_dtype_or_size_is_named(hub, capsys):
    paths = {name: next(hub.folder.glob(f"*{name}.npy")) for name in MAPS}
    np.save(paths["doc_idx"], np.load(paths["doc_idx"]).view("<u4"))
    np.save(paths["sample_idx"], np.load(paths["sample_idx"]).astype("<i8"))
    with pytest.raises(SystemExit):
        verify()
    out = capsys.readouterr().out
    assert "doc_idx: ours is int32" in out
    assert "sample_idx: ours has" in out
    assert "shuffle_idx" not in out


def test_maps_that_are_not_published(hub):
    with pytest.raises(UserError, match="no doc_idx of 57 samples of 64 tokens with seed 7"):
        verify("--seed", "7")
