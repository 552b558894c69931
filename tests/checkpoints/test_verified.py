"""Every way to use a checkpoint verifies it: model.huggingface.load, generate.py, and train.py --init-from."""

import json
import os
import random
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
from checkpoints.manifest import COUNTERS
from model import huggingface
from model.huggingface import huggingface_name, load
from runtime.errors import UserError
from runtime.manifests import checksums, read_manifest, write_manifest

FILES = ["config.json", "manifest.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def step(run, capsys):
    """The last checkpoint of a short run."""
    directory = run("--stop-at", "2", out="first") / "step2"
    capsys.readouterr()
    return directory


@pytest.fixture
def users(run, monkeypatch, tmp_path):
    """The name of every way to use a checkpoint, and a function that does it."""

    def text(directory):
        line = ["generate.py", "--checkpoint", str(directory), "--prompt", "a", "--tokens", "2"]
        monkeypatch.setattr(sys, "argv", line)
        generate.main()

    def train(directory):
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        run("--init-from", str(directory), "--stop-at", "1", out="second")

    return {"load": load, "generate": text, "init-from": train}


def refused(users, directory, names, *words):
    """Every user refuses the directory with one line that contains all words."""
    for name in names:
        with pytest.raises(UserError) as caught:
            users[name](directory)
        message = str(caught.value)
        assert "\n" not in message, name
        for word in words:
            assert word in message, name


def tensor_at(data, offset):
    """The tensor of a safetensors file that has this byte; "" for a byte of the header."""
    length = int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8 : 8 + length]).items():
        first, last = entry.get("data_offsets", (0, 0))
        if first <= offset - 8 - length < last:
            return name
    return ""


def test_a_whole_checkpoint_is_used(step, users, capsys):
    for use in users.values():
        use(step)
    assert capsys.readouterr().out.startswith("a")


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_refused(step, users, name):
    """At random places of every file; for a bit inside a tensor, the line names the tensor."""
    path, rng, tensors = step / name, random.Random(name), set()
    data = path.read_bytes()
    for trial in range(40):
        offset, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[offset] ^= 1 << bit
        path.write_bytes(damaged)
        words = [str(path)]
        if name == "model.safetensors":
            tensors.add(tensor_at(data, offset))
            words.append(tensor_at(data, offset))
        everybody = ["load", "generate"] + ["init-from"] * (trial < 8)
        refused(users, step, everybody if name != "tokenizer.json" else ["generate"], *words)
    assert len(tensors) > 5 or name != "model.safetensors"
    path.write_bytes(data)
    load(step)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_or_longer_is_refused(step, users, name):
    path = step / name
    data = path.read_bytes()
    for damaged in (b"", data[:9], data[:-1], data + b"\n", bytes(len(data))):
        path.write_bytes(damaged)
        refused(users, step, users if name != "tokenizer.json" else ["generate"], str(path))


@pytest.mark.parametrize("name", [*FILES, "model.safetensors.index.json"])
def test_what_is_no_plain_file_is_refused(step, users, name):
    """Nothing waits, and nothing takes all memory: with a manifest, and without one."""
    path, manifest = step / name, step / "manifest.json"
    kept = path.read_bytes() if path.exists() else None
    for with_manifest in (True, False) if name != "manifest.json" else (True,):
        if not with_manifest:
            manifest.unlink()
        for kind in ("fifo", "/dev/zero", "/proc/self/mem", "sparse", "loop"):
            path.unlink(missing_ok=True)
            if kind == "fifo":
                os.mkfifo(path)
            elif kind == "sparse":
                with path.open("wb") as file:
                    file.truncate(2**42)
            else:
                path.symlink_to(path if kind == "loop" else kind)
            refused(users, step, users if name != "tokenizer.json" else ["generate"], name)
        path.unlink()
        if kept:
            path.write_bytes(kept)
    load(step)


def test_a_copy_may_have_any_name(step, users):
    for name in ("s60", "step60", "copy of step2"):
        copy = shutil.copytree(step, step.with_name(name))
        for use in users.values():
            use(copy)


def test_files_that_the_manifest_does_not_list_are_refused(step, users):
    index = step / "model.safetensors.index.json"
    shutil.copy(step / "model.safetensors", step / "other.safetensors")
    names = read_manifest(step)["files"]["model.safetensors"]["tensors"]
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    refused(users, step, users, str(index), "does not list it")


def test_without_a_manifest_a_model_is_used(step, users):
    (step / "manifest.json").unlink()
    for use in users.values():
        use(step)


def test_a_file_that_becomes_shorter_while_it_is_read_is_an_error(step, users, monkeypatch):
    """Under a memory map it would be a SIGBUS, which ends the process without a message."""
    original = huggingface.read_header

    def shorten(path):
        found = original(path)
        os.truncate(path, len(found[0]) + 100)
        return found

    data = (step / "model.safetensors").read_bytes()
    monkeypatch.setattr(huggingface, "read_header", shorten)
    for name in users:
        (step / "model.safetensors").write_bytes(data)
        refused(users, step, [name], "model.safetensors", "shorter")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(step, users, value):
    (step / "manifest.json").unlink()
    tensors = load_file(step / "model.safetensors")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    tensors[name][-1, -1] = value
    save_file(tensors, step / "model.safetensors", metadata={"format": "pt"})
    refused(users, step, users, str(step / "model.safetensors"), name, "NaN or infinity")


def test_the_run_has_its_own_length(step, users, capsys):
    """Rows of 32 tokens: max_position_embeddings is 32, and the model is still a 14m."""
    assert json.loads((step / "config.json").read_text())["max_position_embeddings"] == 32
    assert json.loads((step / "tokenizer_config.json").read_text())["model_max_length"] == 32
    assert (load(step).config.seq_len, load(step).config.name) == (32, "14m")
    users["generate"](step)
    assert capsys.readouterr().err == ""


def test_the_newest_step_of_a_run(step, users, capsys):
    """generate.py takes it and says which; a step that was not saved to its end does not count."""
    users["generate"](step)
    expected = capsys.readouterr().out
    (step.parent / "step9").mkdir()
    (step.parent / "step8").mkdir()
    (step.parent / "step8" / "config.json").write_text("{}")
    users["generate"](step.parent)
    out, err = capsys.readouterr()
    assert out == expected
    assert re.fullmatch(rf"note: step 2 is the newest checkpoint of {step.parent}\n", err)
    (step / "config.json").unlink()
    refused(users, step.parent, ["generate"], str(step))


def test_the_values_loaded_are_those_saved(step):
    """An independent reader finds the same bits."""
    theirs = load_file(step / "model.safetensors")
    ours = {huggingface_name(name): p for name, p in load(step).named_parameters()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)


def test_counters_of_another_program_stop_a_run(run):
    """The checksums are right. (A run in float16 also has the state of its loss scaler.)"""
    flags = ("--precision", "fp16", "--keep-state", 9)
    path = run(*flags, "--stop-at", 2) / "step2" / COUNTERS
    good = json.loads(path.read_text())
    scaler, edits = good["scaler"], []
    for key in ("updates", "scaler"):
        edits += [good | {key: value} for value in (None, -1, 0.5, "1", [], {}, 10**400, True)]
        edits.append({name: value for name, value in good.items() if name != key})
    for key in scaler:
        for value in (None, -1, "1", 10**400, float("inf"), float("nan")):
            edits.append(good | {"scaler": scaler | {key: value}})
    edits += [good | {"scaler": scaler | {"window": 0}}, good | {"scaler": scaler | {"scale": 0.0}}]
    edits += [good | {"scaler": scaler | {"more": 1}}]
    for counters in edits:
        path.write_text(json.dumps(counters))
        manifest = read_manifest(path.parents[1])
        manifest["files"][COUNTERS] = checksums(path)
        write_manifest(path.parents[1], manifest)
        with pytest.raises(UserError, match=f"{path.parents[1]} does not hold the counters"):
            run(*flags, "--stop-at", 3)
    path.write_text(json.dumps(good))
    manifest["files"][COUNTERS] = checksums(path)
    write_manifest(path.parents[1], manifest)
    run(*flags, "--stop-at", 3)
