"""Checkpoints: the published steps, round trips to the bit, and every way in which a file or a disk can fail."""

import errno
import json
import os
import random
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

import checkpoint
import model.huggingface as huggingface
from checkpoint import checksums, clean_up, is_published_step, problems, restore, saved_steps, steps_with_state, verify
from errors import UserError
from model import SIZES, Pythia
from prepare import byte_tokenizer
from train import make_optimizer

ROOT = Path(__file__).parents[1]
TINY = replace(SIZES["14m"], vocab=384, layers=2)
MICRO = replace(SIZES["14m"], vocab=40, layers=1, hidden=16, heads=2, seq_len=32)
COUNTERS = {"updates": 3, "scaler": {"scale": 4096.0, "hysteresis": 2, "clean_steps": 3}}

MODEL, STATE, MANIFEST = "model.safetensors", "state/state-00001-of-00001.safetensors", "manifest.json"
FILES = ["config.json", MODEL, "state/counters.json", STATE, "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster so, most of all on a busy machine."""
    torch.set_num_threads(1)


class Trainee:
    """A model, its optimizer, and steps on gradients that depend on nothing but the number of the step."""

    def __init__(self, config=MICRO, steps=0, seed=0):
        self.model = Pythia(config, seed)
        self.optimizer = make_optimizer(self.model, 1e-2)
        self.train(0, steps)

    def train(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self, run, step, dtype=torch.float16, **options):
        return checkpoint.save(run, step, self.model, self.optimizer, COUNTERS, dtype, **options)

    def restore(self, directory):
        return restore(directory, self.model, self.optimizer)

    def bits(self):
        """Every bit that training depends on, by name: weights, both moments, Adam's step."""
        found = {}
        for name, p in self.model.named_parameters():
            found[name] = p.detach().numpy().tobytes()
            for key, value in self.optimizer.state.get(p, {}).items():
                found[f"{name} {key}"] = value.numpy().tobytes()
        return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with whole checkpoints of steps 1 and 2, with tokenizer. Tests work on copies."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    byte_tokenizer().save(str(run.parent / "tokenizer.json"))
    trainee = Trainee()
    for step in (1, 2):
        trainee.train(step - 1, step)
        trainee.save(run, step, tokenizer=run.parent / "tokenizer.json")
    return run


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def refused():
    """refused(directory, *words): restoring raises one line with all the words, and changes no bit of what it is given.

    `problems` finds the same and raises nothing (restore asks it, so that it need not run twice).
    """
    victim = Trainee(steps=5, seed=9)
    before = victim.bits()
    found = []

    def watched(directory):
        found.append(problems(directory))
        return found[-1]

    def check(directory, *words):
        found.clear()
        with pytest.raises(UserError) as caught:
            victim.restore(directory)
        message = str(caught.value)
        for word in words:
            assert word in message
        assert "\n" not in message
        for lines in found or [problems(directory)]:
            assert lines
            assert lines[0] in message
        assert victim.bits() == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "problems", watched)
        patch.setattr(checkpoint, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1))  # starting threads takes longer
        yield check


def temporaries(run):
    return [path for path in run.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


def header_of(path):
    """The length and the entries of the header of a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return length, json.loads(data[8 : 8 + length])


# Which steps


def test_the_154_published_steps():
    expected = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)]
    assert len(expected) == 154
    assert [step for step in range(143_001) if is_published_step(step, 143_000)] == expected


def test_a_short_run_keeps_its_last_step():
    assert [step for step in range(61) if is_published_step(step, 60)] == [0, 1, 2, 4, 8, 16, 32, 60]


# Round trips


@pytest.mark.parametrize("steps", [0, 1, 3])  # before the first step there are no moments
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_round_trip_to_the_bit(tmp_path, steps, dtype):
    original, resumed = Trainee(TINY, steps), Trainee(TINY, seed=1)
    odd = torch.tensor([-0.0, 1e-42, 3.4e38, float("nan"), float("inf")])
    with torch.no_grad():
        original.model.embed[0, :5] = odd
    assert resumed.bits() != original.bits()
    directory = original.save(tmp_path, steps, dtype)
    assert directory == tmp_path / f"step{steps}"
    assert resumed.restore(directory) == COUNTERS
    assert resumed.bits() == original.bits()
    assert len(resumed.bits()) == len(list(original.model.parameters())) * (4 if steps else 1)
    assert problems(directory) == []
    assert temporaries(tmp_path) == []


@pytest.mark.parametrize("steps", [0, 3])
def test_further_steps_are_bit_identical(tmp_path, steps):
    original = Trainee(TINY, steps)
    directory = original.save(tmp_path, steps)
    resumed = Trainee(TINY, seed=1)
    resumed.restore(directory)
    shutil.rmtree(directory)  # what was restored does not depend on the files any more
    for step in range(steps, steps + 4):
        original.train(step, step + 1)
        resumed.train(step, step + 1)
        assert resumed.bits() == original.bits()
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {steps + 4}


@pytest.mark.parametrize("steps", [0, 3])
def test_restoring_rewinds_a_model_that_went_on(tmp_path, steps):
    original = Trainee(steps=steps)
    directory = original.save(tmp_path, steps)
    expected = original.bits()
    gone_on = Trainee(steps=steps + 2)
    gone_on.restore(directory)
    original.train(steps, steps + 1)
    gone_on.train(steps, steps + 1)
    assert original.bits() != expected
    assert gone_on.bits() == original.bits()


def test_shards(tmp_path, monkeypatch):
    """A small limit cuts model and state into many files; what is read back does not depend on the limit."""
    original, limit = Trainee(steps=2), 4000
    monkeypatch.setattr(huggingface.shard, "__defaults__", (limit,))
    directory = original.save(tmp_path, 2, torch.float32)
    monkeypatch.undo()

    for pattern, kinds in (("model-*.safetensors", 1), ("state/state-*.safetensors", 3)):
        files = sorted(directory.glob(pattern))
        assert len(files) > 3
        names = [name for file in files for name in load_file(file)]
        assert len(names) == len(set(names)) == kinds * len(list(original.model.parameters()))
        for i, file in enumerate(files):
            assert file.name.endswith(f"-{i + 1:05}-of-{len(files):05}.safetensors")
            tensors = load_file(file)
            assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= limit
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert not (directory / MODEL).exists()
    assert index["metadata"]["total_size"] == 4 * MICRO.parameters
    assert index["weight_map"] == {
        name: file.name for file in directory.glob("model-*.safetensors") for name in load_file(file)
    }
    assert problems(directory) == []

    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = {huggingface.huggingface_name(name): p for name, p in original.model.named_parameters()}
    found = {name.replace("lm_head", "embed_out"): p for name, p in theirs.named_parameters()}
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], p) for name, p in ours.items())

    resumed = Trainee(seed=1)
    resumed.restore(directory)
    assert resumed.bits() == original.bits()
    again = resumed.save(tmp_path, 2, torch.float32)  # under the usual limit, and over the old shards
    assert sorted(path.name for path in again.rglob("*.safetensors")) == [MODEL, Path(STATE).name]
    other = Trainee(seed=2)
    other.restore(again)
    assert other.bits() == original.bits()


def test_saving_a_step_again_replaces_it_whole(run, tmp_path):
    newer = Trainee(steps=7, seed=3)
    newer.save(run, 2)  # without tokenizer: nothing of the old directory may stay
    files = sorted(path.relative_to(run / "step2").as_posix() for path in (run / "step2").rglob("*") if path.is_file())
    assert files == sorted(["config.json", MANIFEST, MODEL, "state/counters.json", STATE])
    resumed = Trainee(seed=1)
    resumed.restore(run / "step2")
    assert resumed.bits() == newer.bits()
    assert problems(run / "step1") == []
    assert temporaries(run) == []


def test_only_the_newest_keep_their_state(tmp_path):
    trainee = Trainee()
    for step in range(1, 6):
        trainee.train(step - 1, step)
        trainee.save(tmp_path, step, keep_state=2)
        assert saved_steps(tmp_path) == list(range(1, step + 1))
        assert steps_with_state(tmp_path) == list(range(max(1, step - 1), step + 1))
    for step in range(1, 6):
        assert problems(tmp_path / f"step{step}") == []
        assert ((tmp_path / f"step{step}" / "state").exists()) == (step >= 4)
        weights = load_file(tmp_path / f"step{step}" / MODEL)["gpt_neox.embed_in.weight"]
        assert torch.equal(weights, Trainee(steps=step).model.embed.half())
    with pytest.raises(UserError, match="state"):
        Trainee().restore(tmp_path / "step1")
    assert temporaries(tmp_path) == []


def test_a_damaged_older_checkpoint_does_not_stop_a_save(run):
    """Its state is about to be dropped: the new checkpoint is whole, and at most a UserError complains."""
    for text in ("", "[]", "{}", '{"files": 7}'):
        (run / "step1" / MANIFEST).write_text(text)
        with suppress(UserError):
            Trainee(steps=3).save(run, 3, keep_state=1)
        assert problems(run / "step3") == []
        assert problems(run / "step2") == []


def test_what_is_not_a_checkpoint(run):
    (run / "step2" / MANIFEST).unlink()
    shutil.copytree(run / "step1", run / ".step3.tmp")
    shutil.copytree(run / "step1", run / "step1-backup")
    (run / "step9").mkdir()
    (run / "step8").write_text("a file")
    assert saved_steps(run) == [1]
    assert steps_with_state(run) == [1]
    assert saved_steps(run / "nowhere") == []
    for name in ("step2", "step8", "step9", "nowhere"):
        (problem,) = problems(run / name)
        assert str(run / name) in problem


def test_checkpoints_are_in_numerical_order(tmp_path):
    trainee = Trainee()
    for step in (10, 9, 100):
        trainee.save(tmp_path, step)
    assert saved_steps(tmp_path) == [9, 10, 100]
    assert steps_with_state(tmp_path) == [10, 100]


def test_another_model_is_refused(run, refused):
    for config in (TINY, replace(MICRO, vocab=41), replace(MICRO, layers=2)):
        other = Trainee(config, steps=1)
        before = other.bits()
        with pytest.raises(UserError, match="step2"):
            other.restore(run / "step2")
        assert other.bits() == before
    smaller = Trainee(replace(MICRO, layers=2), steps=1).save(run, 3)  # one that holds more than is asked for
    victim = Trainee(steps=1)
    with pytest.raises(UserError, match="does not belong to this model"):
        victim.restore(smaller)
    assert victim.bits() == Trainee(steps=1).bits()


def test_permissions_follow_the_umask(tmp_path):
    for mask in (0o022, 0o027, 0o077):
        old = os.umask(mask)
        try:
            directory = Trainee().save(tmp_path, mask)
        finally:
            os.umask(old)
        paths = [directory, *directory.rglob("*")]
        assert len(paths) == 7  # two of them directories
        for path in paths:
            assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Otherwise a power failure leaves a checkpoint of the right name with empty files."""
    flushed, named, fsync, rename = set(), [], os.fsync, Path.rename

    def watched_fsync(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(path, target):
        if Path(target).name == "step1":
            named.append({p for p in [path, *path.rglob("*")] if p.stat().st_ino not in flushed})
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    Trainee(steps=1).save(tmp_path, 1)
    assert named == [set()]
    assert tmp_path.stat().st_ino in flushed  # the name itself


# Damaged files


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_is_found(run, refused, name):
    """At 100 random places of every file. Inside a tensor, the line names the tensor."""
    path, directory = run / "step2" / name, run / "step2"
    data = path.read_bytes()
    rng, tensors_hit = random.Random(name), 0
    for _ in range(100):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        words = [str(path)] if name != MANIFEST else [str(directory)]
        if path.suffix == ".safetensors":
            length, header = (
                int.from_bytes(data[:8], "little"),
                json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]),
            )
            for tensor, entry in header.items():
                first, last = entry.get("data_offsets", (0, 0))
                if first <= place - 8 - length < last:
                    words.append(tensor)
                    tensors_hit += 1
        path.write_bytes(damaged)
        refused(directory, *words)
    assert (tensors_hit > 20) == (path.suffix == ".safetensors")
    path.write_bytes(data)
    assert problems(directory) == []


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_file_cut_extended_zeroed_or_missing_is_found(run, refused, name):
    path, directory = run / "step2" / name, run / "step2"
    data = path.read_bytes()
    sizes = [0, 1, 7, 8, 9, len(data) // 2, len(data) - 2]
    damages = [data[:size] for size in sizes]
    damages += [data + b"x", data + bytes(4096), data + data, bytes(len(data)), bytes([255]) * len(data)]
    for damaged in damages:
        path.write_bytes(damaged)
        refused(directory, str(path))
    path.unlink()
    refused(directory, str(path), "missing")
    path.mkdir()
    refused(directory, str(path))
    path.rmdir()
    path.symlink_to(path)
    refused(directory, str(path))
    path.unlink()
    path.write_bytes(data)
    Trainee().restore(directory)


@pytest.mark.parametrize("name", FILES[1:4])
def test_files_of_another_checkpoint_are_found(run, refused, name):
    one, two = run / "step1" / name, run / "step2" / name
    if name == "state/counters.json":  # differs in Adam's step, at the same size
        assert one.stat().st_size == two.stat().st_size
    first, second = one.read_bytes(), two.read_bytes()
    assert first != second
    one.write_bytes(second)
    two.write_bytes(first)
    refused(run / "step1", str(one))
    refused(run / "step2", str(two))
    two.write_bytes(second)
    Trainee().restore(run / "step2")


def test_a_renamed_checkpoint_is_found(run, refused):
    (run / "step2").rename(run / "step5")
    refused(run / "step5", str(run / "step5" / MANIFEST))


HEADERS = {
    "a list": "[1]",
    "a number": "7",
    "null": "null",
    "deeply nested": "[" * 1500,
    "entries that are lists": '{"a":[1]}',
    "no offsets": '{"a":{}}',
    "offsets of text": '{"a":{"data_offsets":["0","4"]}}',
    "one offset": '{"a":{"data_offsets":[0]}}',
    "offsets that are a number": '{"a":{"data_offsets":7}}',
    "negative offsets": '{"a":{"data_offsets":[-99999999,-1]}}',
    "fractional offsets": '{"a":{"data_offsets":[0.5,4.5]}}',
    "offsets of 2^62": '{"a":{"data_offsets":[4611686018427387904,4611686018427387999]}}',
    "offsets of 10^30": '{"a":{"data_offsets":[1000000000000000000000000000000,1000000000000000000000000000009]}}',
    "infinite offsets": '{"a":{"data_offsets":[Infinity,NaN]}}',
    "offsets backwards": '{"a":{"data_offsets":[8,4]}}',
    "not UTF-8": '{"\xff":{}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_a_hostile_header_is_found(run, refused, header):
    for name in (MODEL, STATE):
        path = run / "step2" / name
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert len(header) <= length
        path.write_bytes(data[:8] + header.encode("latin-1").ljust(length) + data[8 + length :])
        refused(run / "step2", str(path))
        path.write_bytes(data)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 0, 1])
def test_a_hostile_header_length_is_found(run, refused, length):
    path = run / "step2" / STATE
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(run / "step2", str(path))


def _set(*keys_and_value):
    """A change of a manifest: the value at a path of keys."""
    *keys, last, value = keys_and_value

    def change(manifest):
        for key in keys:
            manifest = manifest[key]
        manifest[last] = value

    return change


def _drop(*keys):
    def change(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        del manifest[keys[-1]]

    return change


def _add_file(name):
    """A change of a manifest: one more entry, whose size and checksum are right if the name is followed."""
    return lambda manifest: manifest["files"].update({name: manifest["files"]["config.json"]})


MANIFESTS = {
    "no step": _drop("step"),
    "no format": _drop("format"),
    "no files": _drop("files"),
    "another step": _set("step", 1),
    "a step of text": _set("step", "2x"),
    "a list for the step": _set("step", [2]),
    "another format": _set("format", 2),
    "files as a list": _set("files", []),
    "files as text": _set("files", "config.json"),
    "files as null": _set("files", None),
    "an entry as a list": _set("files", STATE, []),
    "an entry as text": _set("files", STATE, "bytes"),
    "an entry as null": _set("files", "config.json", None),
    "no size": _drop("files", STATE, "bytes"),
    "a size of 2^60": _set("files", STATE, "bytes", 2**60),
    "a size of 2^200": _set("files", STATE, "bytes", 2**200),
    "a negative size": _set("files", STATE, "bytes", -1),
    "a size of text": _set("files", STATE, "bytes", "17"),
    "a size of true": _set("files", STATE, "bytes", True),
    "a fractional size": _set("files", STATE, "bytes", 0.5),
    "no tensors": _drop("files", STATE, "tensors"),
    "tensors as a list": _set("files", STATE, "tensors", []),
    "tensors as text": _set("files", STATE, "tensors", "weight"),
    "tensors as null": _set("files", STATE, "tensors", None),
    "a tensor's checksum as a list": _set("files", STATE, "tensors", "weight/embed", []),
    "a tensor more": _set("files", STATE, "tensors", "weight/more", "0" * 64),
    "a tensor less": _drop("files", STATE, "tensors", "weight/embed"),
    "no checksum of the header": _drop("files", STATE, "header_sha256"),
    "no checksum": _drop("files", "config.json", "sha256"),
    "a wrong checksum": _set("files", "config.json", "sha256", "0" * 64),
    "a checksum as a number": _set("files", "config.json", "sha256", 0),
    "a file that is not there": _add_file("missing.json"),
    "a file outside": _add_file("../step2/config.json"),
    "a file further outside": _add_file("state/../../step2/config.json"),
    "the root": _add_file("/etc/hostname"),
    "the directory itself": _add_file(""),
    "a name with NUL": _add_file("config.json\0"),
    "half a surrogate pair": _add_file("\ud800"),
    "a name too long": _add_file("x" * 5000),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_refused(run, refused, change):
    directory = run / "step2"
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))
    refused(directory, str(directory))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\0",
        "nonsense",
        "{",
        "[]",
        "[1]",
        "7",
        "null",
        '"step2"',
        "{}",
        "[" * 100_000,
        '{"step": ' + "1" * 5000,
        "\xff",
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_manifest_that_is_none_is_refused(run, refused, text):
    (run / "step2" / MANIFEST).write_bytes(text.encode("latin-1"))
    refused(run / "step2", str(run / "step2" / MANIFEST))


@pytest.mark.parametrize("name", [STATE, "state/counters.json"])
@pytest.mark.parametrize("there", [True, False])
def test_state_that_the_manifest_does_not_list_is_not_trusted(run, name, there):
    directory = run / "step2"
    manifest = json.loads((directory / MANIFEST).read_text())
    del manifest["files"][name]
    (directory / MANIFEST).write_text(json.dumps(manifest))
    if not there:
        (directory / name).unlink()
    victim = Trainee(steps=5, seed=9)
    before = victim.bits()
    with pytest.raises(UserError, match="step2"):
        victim.restore(directory)
    assert victim.bits() == before


def test_random_damage_never_escapes(run, refused):
    """Bytes replaced, inserted and removed anywhere in manifest and state: a UserError each time, nothing else."""
    rng = random.Random(5)
    for name in (MANIFEST, STATE, "state/counters.json"):
        path = run / "step2" / name
        data = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(damaged))
                damaged[place : place + rng.randint(0, 2)] = bytes(
                    rng.choices(b'0129-"[{}],:\0\xff\nx', k=rng.randint(0, 2))
                )
            if damaged == data or (name == MANIFEST and json_equal(damaged, data)):
                continue
            path.write_bytes(damaged)
            refused(run / "step2", str(run / "step2"))
        path.write_bytes(data)
    assert problems(run / "step2") == []


def json_equal(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except (ValueError, RecursionError):
        return False


# The command


def command(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "checkpoint.py", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT
    )


def test_verify_command(run):
    good = command("verify", run)
    assert good.returncode == 0, good.stderr
    assert [line.split() for line in good.stdout.splitlines()[:2]] == [["ok", str(run / f"step{i}")] for i in (1, 2)]

    (run / "step1" / "config.json").unlink()
    state = run / "step1" / STATE
    length, header = header_of(state)
    damaged = bytearray(state.read_bytes())
    damaged[8 + length + header["exp_avg/embed"]["data_offsets"][0]] ^= 1
    state.write_bytes(damaged)
    (run / "step2" / MANIFEST).write_text("")
    bad = command("verify", run)
    assert bad.returncode == 1
    assert "Traceback" not in bad.stdout + bad.stderr
    lines = [line for line in bad.stdout.splitlines() if line.startswith("BAD")]
    assert len(lines) == 3
    for words in (["step1/config.json", "missing"], [STATE, "exp_avg/embed"], ["step2/manifest.json"]):
        assert sum(all(word in line for word in words) for line in lines) == 1
    assert "0 of 2" in bad.stdout.splitlines()[-1]


def test_verify_one_checkpoint(run, monkeypatch, capsys):
    (run / "step1" / MODEL).unlink()
    assert not verify(run)
    assert verify(run / "step2")
    assert not verify(run / "step1")
    monkeypatch.chdir(run / "step2")
    assert verify(Path("."))
    for name in ("nowhere", "step2/state", "step2/config.json"):
        with pytest.raises(UserError, match=name):
            verify(run / name)


# Disks that fail


def test_full_disk_is_noticed_before_writing(run, monkeypatch):
    trainee = Trainee(TINY, steps=1)
    size = sum(path.stat().st_size for path in trainee.save(run, 3).rglob("*") if path.is_file())
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    with pytest.raises(UserError, match=r"no room for .*step4"):
        trainee.save(run, 4)
    assert sorted(run.rglob("*")) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size + 2**26))
    trainee.save(run, 4)
    assert problems(run / "step4") == []


@contextmanager
def small_disk(path):
    """A disk of one megabyte. Only root may mount one, and not in every container."""
    path.mkdir()
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk can not be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_a_disk_that_runs_full(tmp_path, monkeypatch):
    """A real disk fills up while a checkpoint is written, at every place: the one before stays whole."""
    trainee = Trainee(steps=1)
    with small_disk(tmp_path / "disk") as run:
        # The disk claims to have room, as it does when somebody else fills it at the same time.
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
        trainee.save(run, 1)
        failed = 0
        for pages in range(0, 40):
            filler = run / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            os.truncate(filler, filler.stat().st_size - 4096 * pages)
            try:
                trainee.save(run, 2)
                assert problems(run / "step2") == []
                break
            except UserError:
                failed += 1
                assert saved_steps(run) == [1]
                assert [path.name for path in run.iterdir() if path != filler] == ["step1"]
            finally:
                filler.unlink(missing_ok=True)
            assert problems(run / "step1") == []
        assert failed >= 5
        assert saved_steps(run) == [1, 2]
        trainee.save(run, 3)
        assert saved_steps(run) == [1, 2, 3]
        assert all(problems(run / f"step{step}") == [] for step in (1, 2, 3))
        assert temporaries(run) == []


def test_a_disk_that_can_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    trainee = Trainee(steps=1)
    if os.getuid() != 0:
        trainee.save(tmp_path, 1)
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(UserError, match="step2"):
                trainee.save(tmp_path, 2)
        finally:
            tmp_path.chmod(0o755)
        assert saved_steps(tmp_path) == [1]
        return
    with small_disk(tmp_path / "disk") as run:  # root may write everywhere but here
        trainee.save(run, 1)
        subprocess.run(["mount", "-o", "remount,ro", run], check=True)
        with pytest.raises(UserError, match="step2"):
            trainee.save(run, 2)
        assert problems(run / "step1") == []
        assert saved_steps(run) == [1]


def test_a_run_directory_that_is_gone(tmp_path):
    """Somebody removed the run while it trained: made anew, or one line."""
    with suppress(UserError):
        assert problems(Trainee().save(tmp_path / "gone", 1)) == []


class Killed(BaseException):
    """The process ends here: no handler runs."""


class Saboteur:
    """Counts the calls that write, and lets the n-th fail half-way."""

    def __init__(self, monkeypatch, n, killed):
        self.n, self.calls, self.killed = n, 0, killed
        for owner in (checkpoint, huggingface):
            if hasattr(owner, "save_file"):
                self.wrap(monkeypatch, owner, "save_file", lambda tensors, path, **_: Path(path).write_bytes(b"half"))
        self.wrap(monkeypatch, huggingface, "copyfile", lambda source, path: Path(path).write_bytes(b"half"))
        self.wrap(monkeypatch, Path, "write_text", lambda path, text: path.write_bytes(text.encode()[: len(text) // 2]))
        for owner, name in ((Path, "mkdir"), (Path, "chmod"), (Path, "rename"), (os, "fsync")):
            self.wrap(monkeypatch, owner, name, lambda *_, **__: None)

    def wrap(self, monkeypatch, owner, name, write_half):
        original = getattr(owner, name)

        def wrapped(*args, **kwargs):
            self.calls += 1
            if self.calls != self.n:
                return original(*args, **kwargs)
            write_half(*args, **kwargs)
            if self.killed:
                raise Killed
            message = "No space left on device"
            if name == "save_file":  # safetensors 0.8 has an error of its own for this, which is no OSError
                raise SafetensorError(f"Error while serializing: I/O error: {message} (os error 28)")
            raise OSError(errno.ENOSPC, message)

        monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize("killed", [False, True], ids=["error", "killed"])
@pytest.mark.parametrize("step", [2, 3], ids=["saved again", "new step"])
def test_a_save_that_fails_at_any_write(saved, tmp_path, monkeypatch, step, killed):
    """Whatever fails, and whenever the process dies: what is visible is whole, and nothing half done stays.

    A killed process can not clear up behind itself; the next run does, before it looks for checkpoints.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # quick, as is the next
    monkeypatch.setattr(checkpoint, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1))
    newer, tokenizer = Trainee(steps=6, seed=4), saved.parent / "tokenizer.json"
    ends = Killed if killed else UserError
    sound = {"old": Trainee(steps=2).bits(), "new": newer.bits()}
    for n in range(1, 100):
        run = shutil.copytree(saved, tmp_path / f"run{n}")
        with monkeypatch.context() as patch:
            saboteur = Saboteur(patch, n, killed)
            try:
                newer.save(run, step, keep_state=1, tokenizer=tokenizer)
                failed = False
            except ends:
                failed = True
        assert failed == (saboteur.calls >= n)
        visible = saved_steps(run)
        assert set(visible) <= {1, 2, step}
        for s in visible:
            assert problems(run / f"step{s}") == [], f"write {n}"
        if killed:
            clean_up(run)
        visible = saved_steps(run)
        assert set(visible) >= {1, 2}, f"write {n}"
        for s in visible:
            assert problems(run / f"step{s}") == [], f"write {n}"
        resumed, newest = Trainee(seed=1), steps_with_state(run)[-1]
        assert newest >= 2
        resumed.restore(run / f"step{newest}")
        assert resumed.bits() in sound.values(), f"write {n}"

        newer.save(run, step, keep_state=1, tokenizer=tokenizer)
        assert saved_steps(run) == list(range(1, step + 1))
        assert steps_with_state(run) == [step]
        assert all(problems(run / f"step{s}") == [] for s in saved_steps(run)), f"write {n}"
        assert temporaries(run) == [], f"write {n}"
        resumed = Trainee(seed=1)
        resumed.restore(run / f"step{step}")
        assert resumed.bits() == sound["new"]
        shutil.rmtree(run)
        if not failed:
            break
    assert not failed
    assert n > 20  # many writes were made to fail


def test_clearing_up_after_a_killed_save(run):
    shutil.copytree(run / "step2", run / ".step3.tmp")
    (run / "step2").rename(run / ".step2.old.tmp")  # killed between the two renames of a step that was saved again
    shutil.copytree(run / "step1", run / ".step1.old.tmp")  # killed right after them
    (run / "step7").mkdir()
    others = [run / "run.json", run / ".hidden"]
    for path in others:
        path.write_text("not a checkpoint's")
    clean_up(run)
    assert saved_steps(run) == [1, 2]
    assert sorted(path.name for path in run.iterdir()) == [".hidden", "run.json", "step1", "step2", "step7"]
    assert problems(run / "step1") == problems(run / "step2") == []
    clean_up(run.parent / "nowhere")


# Nothing is pickled

AUDITED = """
import pickle, sys
from dataclasses import replace
from pathlib import Path
import torch
import checkpoint, generate
from model import SIZES, Pythia
from model.huggingface import load
from train import make_optimizer

run = Path(sys.argv[1])
model = Pythia(replace(SIZES["14m"], vocab=40, layers=1, hidden=16, heads=2))
optimizer = make_optimizer(model, 1e-3)
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
harmless = pickle.dumps(Path)

events = []
def hook(event, args):
    if event == "pickle.find_class":
        events.append(args)
sys.addaudithook(hook)
directory = checkpoint.save(run, 1, model, optimizer, {"updates": 1}, torch.float16)
checkpoint.restore(directory, model, optimizer)
checkpoint.verify(run)
list(generate.generate(load(directory), [1, 2], 3))
found = len(events)
pickle.loads(harmless)
print("found", found, "and with one pickle", len(events))
"""


def test_nothing_is_unpickled(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", AUDITED, tmp_path], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "found 0 and with one pickle 1"


def test_checksums_cover_every_byte(run):
    """Header and tensors are disjoint and fill the file, so that no byte escapes the sum over the parts."""
    for name in (MODEL, STATE):
        path = run / "step2" / name
        length, header = header_of(path)
        spans = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert 8 + length + spans[-1][1] == path.stat().st_size
        assert checksums(path)["tensors"].keys() == header.keys() - {"__metadata__"}
