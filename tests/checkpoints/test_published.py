"""checkpoint.py fetch: published layouts from a hub on 127.0.0.1, as verified checkpoints."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from mock_hub import Hub, use
from safetensors.torch import load_file

import checkpoint
from checkpoints.manifest import verify_checkpoint
from checkpoints.published import NAMES, audit, fetch, repository, warnings
from corpus.tokenizer import byte_tokenizer
from model import SIZES, Pythia, huggingface
from model.huggingface import load, save
from runtime.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = replace(SIZES["14m"], vocab=384, layers=2)
REPO = "EleutherAI/pythia-14m"


def as_torch(directory, shards=1):
    """Replace model.safetensors by pytorch_model.bin as it was published: float16, with the old buffers."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    for layer in range(TINY.layers):
        attention = f"gpt_neox.layers.{layer}.attention."
        tensors[attention + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
        tensors[attention + "masked_bias"] = torch.tensor(-1e4, dtype=torch.float16)
        tensors[attention + "rotary_emb.inv_freq"] = torch.ones(4, dtype=torch.float16)
    if shards == 1:
        torch.save(OrderedDict(tensors), directory / "pytorch_model.bin")
        return
    names, files = sorted(tensors), {}
    for k in range(shards):
        file = f"pytorch_model-{k + 1:05}-of-{shards:05}.bin"
        torch.save({name: tensors[name] for name in names[k::shards]}, directory / file)
        files |= dict.fromkeys(names[k::shards], file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": files}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    """A hub folder: step0 has safetensors, step1 a torch file, step1000 three of them, main all of step143000."""
    root = tmp_path_factory.mktemp("layout")
    tokenizer = root / "tokenizer.json"
    byte_tokenizer().save(str(tokenizer))
    for seed, branch in enumerate(("step0", "step1", "step1000", "main")):
        directory = root / "models" / REPO / branch
        save(Pythia(TINY, seed), directory, torch.float16, tokenizer=tokenizer)
        if branch in ("step1", "step1000"):
            as_torch(directory, 1 if branch == "step1" else 3)
    return root


@pytest.fixture
def server(layout, tmp_path, monkeypatch):
    with Hub(shutil.copytree(layout, tmp_path / "hub")) as server:
        use(monkeypatch, server.url)
        yield server


def refused(call, *words):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_names():
    assert len(NAMES) == len({*NAMES})
    assert repository("70m-deduped") == "EleutherAI/pythia-70m-deduped"
    assert repository("pythia-12b") == "EleutherAI/pythia-12b"
    assert repository("410m", 3) == repository("410m-seed3") == "EleutherAI/pythia-410m-seed3"
    assert repository("160m-data-seed2") == "EleutherAI/pythia-160m-data-seed2"
    assert repository("somebody/else") == "somebody/else"
    refused(lambda: repository("71m"), "did you mean pythia-70m")
    refused(lambda: repository("1b", 2), "there is no pythia-1b-seed2")
    refused(lambda: repository("a/b", 2), "--seed")


def test_fetched_models_equal_those_of_transformers(server, tmp_path):
    """All revisions, in float32; and every tool takes them like our own checkpoints."""
    out, tokens = tmp_path / "out", torch.randint(0, 384, (2, 40))
    fetch(REPO, "all", out)
    assert sorted(path.name for path in out.iterdir()) == ["step0", "step1", "step1000", "step143000"]
    for step in (0, 1, 1000, 143_000):
        directory = out / f"step{step}"
        assert verify_checkpoint(directory) == []
        assert not list(directory.glob("*.bin*"))
        source = tmp_path / "hub" / "models" / REPO / (f"step{step}" if step < 143_000 else "main")
        theirs = transformers.GPTNeoXForCausalLM.from_pretrained(source, dtype=torch.float32)
        with torch.no_grad():
            assert (load(directory)(tokens) - theirs(tokens).logits).abs().max() < 1e-5
        assert {t.dtype for t in load_file(directory / "model.safetensors").values()} == {torch.float16}
    assert checkpoint.verify(out)
    command = [sys.executable, "generate.py", "--checkpoint", out / "step1", "--prompt", "a", "--tokens", "2"]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, capture_output=True)


def test_what_is_there_is_not_fetched_again(server, tmp_path, capsys):
    fetch(REPO, "1", tmp_path / "out")
    server.log.clear()
    fetch(REPO, "0:1:1", tmp_path / "out")
    assert not [entry for entry in server.log if "cdn" in entry["path"] and "bin" in entry["path"]]
    assert "1 of 2 checkpoints were there already" in capsys.readouterr().out
    config = server.root / "models" / REPO / "step1" / "config.json"
    config.write_text(config.read_text() + " ")
    refused(lambda: fetch(REPO, "1", tmp_path / "out"), "is not EleutherAI/pythia-14m at")


def test_an_interrupted_fetch_goes_on(server, tmp_path, monkeypatch):
    """Stopped at every stage after the download, it downloads no weights again."""
    for stage in ("read_weights", "write_manifest", "convert_torch_files"):
        out = tmp_path / stage
        with monkeypatch.context() as patch:
            patch.setattr(f"checkpoints.published.{stage}", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                fetch(REPO, "1000", out)
        assert not (out / "step1000").exists()
        server.log.clear()
        fetch(REPO, "1000", out)
        assert not [entry for entry in server.log if "cdn" in entry["path"]]
        assert verify_checkpoint(out / "step1000") == []


def test_a_killed_fetch_goes_on(server, tmp_path):
    """Killed while it downloads the second of three shards: what is whole is not asked for again."""
    server.stall = {"pytorch_model-00002-of-00003.bin"}
    environment = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, ROOT / "checkpoint.py", "fetch", "14m", "--steps", "all", "--out", tmp_path / "out"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not any("cdn" in entry["path"] and "00002-of" in entry["path"] for entry in server.log):
        assert child.poll() is None
        time.sleep(0.05)
    child.kill()
    child.wait()
    assert sorted(path.name for path in (tmp_path / "out").glob("step*")) == ["step0", "step1"]
    server.stall, before = set(), len(server.log)
    fetch(REPO, "all", tmp_path / "out")
    sent = {entry["path"].rpartition("/")[2] for entry in server.log[before:] if "cdn" in entry["path"]}
    assert sent == {"pytorch_model-00002-of-00003.bin", "pytorch_model-00003-of-00003.bin", "model.safetensors"}
    assert checkpoint.verify(tmp_path / "out")


def test_refusals(server, tmp_path):
    out = tmp_path / "out"
    refused(lambda: fetch("lab/none", "all", out), "no repository lab/none")
    refused(lambda: fetch(REPO, "2", out), "no branch step2")
    refused(lambda: fetch(REPO, "x", out), "--steps x")
    server.flip = {"pytorch_model-00002-of-00003.bin"}
    refused(lambda: fetch(REPO, "1000", out), "pytorch_model-00002-of-00003.bin", "damaged")
    server.flip = set()
    (out / "step0").mkdir()
    refused(lambda: fetch(REPO, "0", out), "has no manifest.json")
    (out / "run.json").write_text("{}")
    refused(lambda: fetch(REPO, "1", out), "is a run that was trained here")
    assert not (out / "step1000").exists()


def test_space_is_checked_first(server, tmp_path, monkeypatch):
    """For all steps together; a torch file needs its room twice while it is converted."""
    sizes = {
        step: sum(path.stat().st_size for path in (server.root / "models" / REPO / f"step{step}").glob("*model*"))
        for step in (0, 1)
    }
    for free, enough in ((sizes[0] + 2 * sizes[1], True), (sizes[0] + 2 * sizes[1] - 1, False)):
        server.log.clear()
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path, free=free: shutil._ntuple_diskusage(free, 0, free))
            out = tmp_path / str(enough)
            if enough:
                fetch(REPO, "0,1", out)
            else:
                refused(
                    lambda out=out: fetch(REPO, "0,1", out), "no room in", "2 checkpoints", "nothing was downloaded"
                )
                assert not [entry for entry in server.log if "resolve" in entry["path"]]


def test_weights_that_do_not_fit(server, tmp_path):
    branch = server.root / "models" / REPO / "step1"
    tensors = torch.load(branch / "pytorch_model.bin", weights_only=True)
    name = "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"
    for number, (change, words) in enumerate(
        [
            ({name: torch.zeros(3).half()}, [name, "shape"]),
            ({"extra": torch.zeros(3).half()}, ["extra", "unknown"]),
            ({name: None}, ["lacks", name]),
            ({name: torch.zeros(128)}, ["several dtypes"]),
            ({name: torch.full((128,), float("nan")).half()}, [name, "NaN"]),
        ]
    ):
        changed = {key: value for key, value in (tensors | change).items() if value is not None}
        torch.save(changed, branch / "pytorch_model.bin")
        refused(lambda n=number: fetch(REPO, "1", tmp_path / str(n)), *words)
        assert not (tmp_path / str(number) / "step1").exists()


def test_errata_are_warned_of(capsys, server, tmp_path):
    (line,) = warnings("EleutherAI/pythia-2.8b", [0, 1, 2, 4, 8, 143_000])
    assert "step0, step1, step2 and 2 more: 86 of its 154 branches" in line
    assert "step50000: its first shard" in warnings("EleutherAI/pythia-12b", [50_000, 51_000])[0]
    assert "issues/198" in warnings("EleutherAI/pythia-160m-weight-seed2", [0])[0]
    assert warnings("EleutherAI/pythia-12b", [51_000]) == warnings("EleutherAI/pythia-2.8b-deduped", [0]) == []
    (server.root / "models/EleutherAI/pythia-14m").rename(server.root / "models/EleutherAI/pythia-2.8b")
    fetch("EleutherAI/pythia-2.8b", "0", tmp_path / "out")
    assert "warning: EleutherAI/pythia-2.8b, step0: 86 of its 154 branches" in capsys.readouterr().out


def test_audit(server, tmp_path):
    """Every fault that FIELD reports of the published files is named; no weights travel."""
    repo = server.root / "models" / REPO
    problems = audit(REPO)
    assert len(problems) == 151
    assert all("is missing" in line for line in problems)
    shutil.copytree(repo, server.root / "models/lab/good")
    shutil.copytree(repo / "main", server.root / "models/lab/good/step143000")
    server.log.clear()
    assert audit("lab/good") == []
    assert not [entry for entry in server.log if "safetensors" in entry["path"] or entry["path"].endswith(".bin")]
    bad = shutil.copytree(server.root / "models/lab/good", server.root / "models/lab/bad")
    for path in (bad / "main").glob("*.safetensors"):
        path.unlink()
    shutil.copy(bad / "step143000/model.safetensors", bad / "step0/model.safetensors")
    shutil.copytree(bad / "step1000", bad / "step2000")
    shard = bad / "step2000/pytorch_model-00003-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-40_000])
    found = "\n".join(audit("lab/bad"))
    assert "main: the revision has no weights" in found
    assert "step0, step143000: 2 branches have the same model.safetensors" in found
    assert "step1000, step2000: 2 branches have the same pytorch_model-00001-of-00003.bin" in found
    assert "step2000: pytorch_model.bin.index.json does not fit the shards" in found


def test_the_command(server, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": server.url, "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(*arguments):
        command = [sys.executable, ROOT / "checkpoint.py", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("fetch", "14m", "--steps", "0,1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "published/pythia-14m/step1/manifest.json").exists()
    assert checkpoint.verify(tmp_path / "published/pythia-14m")
    done = run("fetch", "14m", "--audit")
    assert (done.returncode, done.stdout.count("\n")) == (1, 151)
    done = run("fetch", "lab/none")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_sharded_export(server, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 200_000)
    monkeypatch.setattr(huggingface.shard, "__defaults__", (200_000,))
    fetch(REPO, "1", tmp_path / "out")
    assert (tmp_path / "out/step1/model.safetensors.index.json").exists()
    assert verify_checkpoint(tmp_path / "out/step1") == []
    assert load(tmp_path / "out/step1").config.layers == 2
