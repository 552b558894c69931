"""checkpoint.py publish: the layout of an upload, what transformers makes of it, and uploads that resume."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from mock_hub import Hub, use

from checkpoints.manifest import verify_checkpoint
from checkpoints.publish import publish
from checkpoints.published import fetch
from corpus.tokenizer import byte_tokenizer
from model.huggingface import load
from runtime.errors import UserError


@pytest.fixture
def trained(run, tmp_path):
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    return run("--steps", "9", "--save-steps", "8")


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    with Hub(tmp_path / "hub") as server:
        use(monkeypatch, server.url)
        monkeypatch.setenv("HF_TOKEN", "hf_x")
        yield server


def test_dry_run(trained, tmp_path, server, monkeypatch):
    publish(trained, "lab/mine", "all", False, dry_run=True)
    assert server.log == []
    layout = tmp_path / "run.publish"
    assert sorted(path.name for path in layout.iterdir()) == ["main", *(f"step{n}" for n in (0, 1, 2, 4, 8, 9))]
    shutil.copytree(layout, server.root / "models/lab/mine")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        "lab/mine", revision="step8", dtype=torch.float32, cache_dir=tmp_path / "cache"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained("lab/mine", revision="step8", cache_dir=tmp_path / "cache")
    inputs = tokenizer("ab", return_tensors="pt")
    with torch.no_grad():
        difference = model(**inputs).logits - load(trained / "step8")(inputs["input_ids"])
    assert difference.abs().max() < 1e-5
    assert model.generation_config.eos_token_id == 0
    if hasattr(HfApi, "verify_repo_checksums"):  # what `hf cache verify` runs, since huggingface_hub 1
        found = HfApi().verify_repo_checksums("lab/mine", revision="step8", cache_dir=tmp_path / "cache")
        assert found.mismatches == []
        assert found.checked_count > 3
    model.generate(**inputs, max_new_tokens=2)
    assert not (layout / "step8/config.json").samefile(trained / "step8/config.json")  # a user may edit it
    for branch in layout.iterdir():
        assert verify_checkpoint(branch) == []
        assert not (branch / "state").exists()
        assert str(tmp_path) not in (branch / "manifest.json").read_text()
    assert (layout / "main/model.safetensors").read_bytes() == (trained / "step9/model.safetensors").read_bytes()


def test_the_card(trained, tmp_path):
    publish(trained, "lab/mine", "8", False, dry_run=True)
    card = (tmp_path / "run.publish/step8/README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    loss = json.loads((trained / "metrics.jsonl").read_text().splitlines()[7])["loss"]
    order = json.loads((trained / "run.json").read_text())["data"]["order_sha256"]
    for text in (f"{loss:.4f}", order, "step 8 of 9", f"{8 * 4 * 32:,}: 4 rows of 32", "tanh form", "lab/mine"):
        assert text in card
    assert "{" not in re.sub(r"`[^`]*`", "", card)


def uploaded(server):
    directory = server.root / "models/lab/mine"
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_upload_resume_and_fetch(trained, tmp_path, server, monkeypatch):
    """Stopped between two files of the third branch, the same call sends the rest; what arrives is a verified run."""
    upload_folder, calls = HfApi.upload_folder, []

    def stop(self, **options):
        calls.append(options["revision"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return upload_folder(self, **options)

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "upload_folder", stop)
        with pytest.raises(KeyboardInterrupt):
            publish(trained, "lab/mine", "all", True, False)
    assert calls == ["step0", "step1", "step2"]
    calls.clear()
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, **o: [calls.append(o["revision"]), upload_folder(self, **o)][1]
    )
    publish(trained, "lab/mine", "all", True, False)
    assert calls == ["step2", "step4", "step8", "step9", "main"]
    assert not (tmp_path / "run.publish").exists()
    publish(trained, "lab/mine", "all", True, True)
    for path in (tmp_path / "run.publish").rglob("*"):
        if path.is_file():
            assert uploaded(server)[path.relative_to(tmp_path / "run.publish").as_posix()] == path.read_bytes()
    fetch("lab/mine", "8,9", tmp_path / "fetched")
    ours, theirs = (directory / "step9/model.safetensors" for directory in (trained, tmp_path / "fetched"))
    assert ours.read_bytes() == theirs.read_bytes()
    before = uploaded(server)
    calls.clear()
    publish(trained, "lab/mine", "2:4:2", True, False)
    assert calls == []  # all is there, and main stays the last step
    assert uploaded(server) == before


def test_refusals(trained, tmp_path, server):
    def refused(*arguments, words):
        with pytest.raises(UserError) as caught:
            publish(*arguments)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)

    refused(trained, "mine", "all", False, True, words="OWNER/NAME")
    refused(trained, "lab/mine", "3", False, True, words="has no checkpoint step3")
    refused(trained, "lab/mine", "x", False, True, words="--steps x")
    refused(tmp_path / "nowhere", "lab/mine", "all", False, True, words="run.json cannot be read")
    path = trained / "step4/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(trained, "lab/mine", "all", False, False, words=f"{path} is damaged")
    assert server.log == []
    assert not Path(f"{trained}.publish").exists()
