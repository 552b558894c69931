"""Checkpoints on disk: the published steps, round trips to the bit, and every way in which a file can be damaged."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file

from checkpoint import verify
from checkpoints import manifest, resume
from checkpoints.manifest import (
    checksums,
    clean_up,
    drop_state,
    saved_steps,
    steps_with_state,
    verify_checkpoint,
    write_manifest,
)
from checkpoints.resume import latest_valid_step, restore
from checkpoints.save import Saver
from corpus.tokenizer import byte_tokenizer
from model import SIZES, Pythia
from model.huggingface import write_tensors
from model.sizes import is_published_step
from runtime.errors import UserError
from runtime.ranks import Dist
from step import make_optimizer

ROOT = Path(__file__).parents[1]
TINY = replace(SIZES["14m"], vocab=384, layers=2)
MICRO = replace(SIZES["14m"], vocab=40, layers=1, hidden=16, heads=2, seq_len=32)
COUNTERS = {"updates": 3, "scaler": {"scale": 4096.0, "hysteresis": 2, "clean_steps": 3}}

MODEL, MANIFEST = "model.safetensors", "manifest.json"
PARTS = ["state/part-00001-of-00002.safetensors", "state/part-00002-of-00002.safetensors"]
FILES = ["config.json", MODEL, "state/counters.json", *PARTS, "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster so, most of all on a busy machine."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class ThreadRank(Dist):
    """One of two ranks that are threads of this process. They tell each other texts over a board."""

    board: list = field(default_factory=list)
    meeting: Barrier | None = None

    def all_gather_str(self, text):
        self.board[self.rank] = text
        self.meeting.wait(60)
        told = list(self.board)
        self.meeting.wait(60)
        return told

    def with_own_group(self):
        return self


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

    def savers(self, run, world=1, dtype=torch.float16, **options):
        """One for each of one or two ranks that share the writing of all rows."""
        arguments = (run, self.model, self.optimizer)
        if world == 1:
            return [Saver(*arguments, Dist(), dtype, **options)]
        told, barrier, savers = [None] * world, Barrier(world), []
        for rank in range(world):
            saver = Saver(*arguments, ThreadRank(rank, world, board=told, meeting=barrier), dtype, **options)
            for name, p in self.model.named_parameters():
                saver.rows[name] = slice(len(p) * rank // world, len(p) * (rank + 1) // world)
            savers.append(saver)
        return savers

    def save(self, run, step, dtype=torch.float16, world=1, **options):
        savers = self.savers(run, world, dtype, **options)
        for saver in savers:
            saver.save(step, COUNTERS)
        for saver in savers:
            saver.finish()
        return run / f"step{step}"

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


def two_checkpoints(folder):
    """A run with whole checkpoints of steps 1 and 2, with tokenizer, of two parts each."""
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    trainee = Trainee()
    for step in (1, 2):
        trainee.train(step - 1, step)
        trainee.save(folder / "run", step, world=2, tokenizer=folder / "tokenizer.json")
    return folder / "run"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Tests work on copies."""
    return two_checkpoints(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def refused():
    """refused(directory, *words): restoring raises one line with all the words, and changes no bit of what it is given.

    `verify_checkpoint` finds the same and raises nothing (restore asks it, so that it need not run twice), unless the
    files are as the manifest says.
    """
    victim = Trainee(steps=5, seed=9)
    before = victim.bits()
    found = []

    def watched(directory, ranks=Dist()):  # noqa: B008
        found.append(verify_checkpoint(directory, ranks))
        return found[-1]

    def check(directory, *words, as_listed=False):
        found.clear()
        with pytest.raises(UserError) as caught:
            victim.restore(directory)
        message = str(caught.value)
        for word in words:
            assert word in message
        assert "\n" not in message
        (lines,) = found
        assert bool(lines) != as_listed
        assert as_listed or lines[0] in message
        assert victim.bits() == before

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "verify_checkpoint", watched)
        patch.setattr(manifest, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1))  # starting threads takes longer
        yield check


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
@pytest.mark.parametrize(("world", "dtype"), [(1, torch.float16), (2, torch.bfloat16), (1, torch.float32)])
def test_round_trip_to_the_bit(tmp_path, steps, world, dtype):
    original, resumed = Trainee(TINY, steps), Trainee(TINY, seed=1)
    odd = torch.tensor([-0.0, 1e-42, 3.4e38, float("nan"), float("inf")])
    with torch.no_grad():
        original.model.embed[0, :5] = odd
    assert resumed.bits() != original.bits()
    directory = original.save(tmp_path, steps, dtype, world)
    assert resumed.restore(directory) == COUNTERS
    assert resumed.bits() == original.bits()
    assert len(resumed.bits()) == len(list(original.model.parameters())) * (4 if steps else 1)
    assert verify_checkpoint(directory) == []
    assert latest_valid_step(tmp_path, Dist()) == steps


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
        (problem,) = verify_checkpoint(run / name)
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


# Damaged files


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_is_found(run, refused, name):
    """At 100 random places of every file. Inside a tensor, the line names the tensor."""
    path, directory = run / "step2" / name, run / "step2"
    data, rng, tensors_hit = path.read_bytes(), random.Random(name), 0
    length, header = header_of(path) if path.suffix == ".safetensors" else (0, {})
    for _ in range(100):
        place, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[place] ^= 1 << bit
        words = [str(path)]
        for tensor, entry in header.items():
            first, last = entry.get("data_offsets", (0, 0))
            if first <= place - 8 - length < last:
                words.append(tensor)
                tensors_hit += 1
        path.write_bytes(damaged)
        refused(directory, *words)
    assert (tensors_hit > 20) == bool(header)
    path.write_bytes(data)
    assert verify_checkpoint(directory) == []


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


@pytest.mark.parametrize("name", FILES[1:5])
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
    for name in (MODEL, PARTS[1]):
        path = run / "step2" / name
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        assert len(header) <= length
        path.write_bytes(data[:8] + header.encode("latin-1").ljust(length) + data[8 + length :])
        refused(run / "step2", str(path))
        path.write_bytes(data)


@pytest.mark.parametrize("length", [2**60, 2**63, 2**64 - 1, 0, 1])
def test_a_hostile_header_length_is_found(run, refused, length):
    path = run / "step2" / PARTS[0]
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    refused(run / "step2", str(path))


def test_parts_of_another_run_are_found(run, refused, tmp_path):
    """Of the same model at the same step, and whole in themselves."""
    other = Trainee(steps=2, seed=8).save(tmp_path / "other", 2, world=2)
    for name in PARTS:
        mine = (run / "step2" / name).read_bytes()
        assert len(mine) == (other / name).stat().st_size
        shutil.copy(other / name, run / "step2" / name)
        refused(run / "step2", str(run / "step2" / name), "weight/")
        (run / "step2" / name).write_bytes(mine)
    shutil.copy(run / "step2" / PARTS[0], run / "step2" / PARTS[1])
    refused(run / "step2", PARTS[1])


@pytest.mark.parametrize("name", ["state/part-00003-of-00003.safetensors", "state/x/y", "model-1.safetensors"])
def test_files_that_nobody_listed_are_found(run, refused, name):
    (run / "step2" / name).parent.mkdir(exist_ok=True)
    shutil.copy(run / "step2" / PARTS[0], run / "step2" / name)
    refused(run / "step2", str(run / "step2" / name), "does not list it")


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
    "another format": _set("format", 3),
    "the format before": _set("format", 1),
    "files as a list": _set("files", []),
    "files as text": _set("files", "config.json"),
    "files as null": _set("files", None),
    "an entry as a list": _set("files", PARTS[0], []),
    "an entry as text": _set("files", PARTS[0], "bytes"),
    "an entry as null": _set("files", "config.json", None),
    "no size": _drop("files", PARTS[0], "bytes"),
    "a size of 2^60": _set("files", PARTS[0], "bytes", 2**60),
    "a size of 2^200": _set("files", PARTS[0], "bytes", 2**200),
    "a negative size": _set("files", PARTS[0], "bytes", -1),
    "a size of text": _set("files", PARTS[0], "bytes", "17"),
    "a size of true": _set("files", PARTS[0], "bytes", True),
    "a fractional size": _set("files", PARTS[0], "bytes", 0.5),
    "no tensors": _drop("files", PARTS[0], "tensors"),
    "tensors as a list": _set("files", PARTS[0], "tensors", []),
    "tensors as text": _set("files", PARTS[0], "tensors", "weight"),
    "tensors as null": _set("files", PARTS[0], "tensors", None),
    "a tensor's checksum as a list": _set("files", PARTS[0], "tensors", "weight/embed", []),
    "a tensor more": _set("files", PARTS[0], "tensors", "weight/more", "0" * 64),
    "a tensor less": _drop("files", PARTS[0], "tensors", "weight/embed"),
    "no checksum of the header": _drop("files", PARTS[0], "header_sha256"),
    "no checksum": _drop("files", "config.json", "sha256"),
    "a wrong checksum": _set("files", "config.json", "sha256", "0" * 64),
    "a checksum as a number": _set("files", "config.json", "sha256", 0),
    "a file that is not there": _add_file("missing.json"),
    "a file outside": _add_file("../step2/config.json"),
    "a file further outside": _add_file("state/../../step2/config.json"),
    "the root": _add_file("/etc/hostname"),
    "the directory itself": _add_file(""),
    "a name with NUL": _add_file("config.json\0"),
    "a name of two lines": _add_file("missing\nstep2 is whole"),
    "half a surrogate pair": _add_file("\ud800"),
    "a name too long": _add_file("x" * 5000),
}


@pytest.mark.parametrize("change", MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_refused(run, refused, change):
    directory = run / "step2"
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    write_manifest(directory, manifest)  # with the right checksum of its own
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


def resealed(directory):
    """The directory, its manifest telling of the files as they are now: nothing is damaged any more."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = checksums(directory / name)
    write_manifest(directory, manifest)
    return directory


ROWS = "0:20 of 40"  # of the weight "embed", in the first part


def _tell(text):
    return lambda tensors, notes: notes.update({"weight/embed": text})


def _hold(rows, text):
    """A change of a part: other rows of embed, of the right shape, and the metadata that fits or does not."""

    def change(tensors, notes):
        tensors["weight/embed"] = torch.zeros(rows, 16)
        notes["weight/embed"] = text

    return change


def _more(key):
    return lambda tensors, notes: (tensors.update({key: torch.zeros(20, 16)}), notes.update({key: ROWS}))


HOSTILE_PARTS = {
    "a gap": _hold(19, "0:19 of 40"),
    "an overlap": _hold(21, "0:21 of 40"),
    "all rows, of which the other part has half": _hold(40, "0:40 of 40"),
    "rows of the other part": _tell("20:40 of 40"),
    "rows of a longer tensor": _tell("0:20 of 41"),
    "rows backwards": _tell("20:0 of 40"),
    "no rows": _hold(0, "0:0 of 40"),
    "rows that begin with the second": _tell("1:21 of 40"),
    "fewer rows than it says": _hold(19, ROWS),
    "2^59 rows": _tell(f"0:{2**59} of {2**59}"),
    "10^30 rows": _tell(f"0:{10**30} of {10**30}"),
    "negative rows": _tell("-20:0 of 40"),
    "digits of another script": _tell("0:२० of 40"),
    "text": _tell("all of them\nand more"),
    "nothing told": lambda tensors, notes: notes.pop("weight/embed"),
    "another shape": lambda tensors, notes: tensors.update({"weight/embed": torch.zeros(20, 4, 4)}),
    "a tensor less": lambda tensors, notes: tensors.pop("weight/embed"),
    "a tensor more": _more("weight/embedding"),
    "a moment more": _more("max_exp_avg_sq/embed"),
}


@pytest.mark.parametrize("change", HOSTILE_PARTS.values(), ids=HOSTILE_PARTS)
def test_parts_that_do_not_fit_are_refused(run, refused, change):
    """All checksums are right: somebody, or another program, wrote them so."""
    path = run / "step2" / PARTS[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not on the file
    notes = header_of(path)[1]["__metadata__"]
    assert notes["weight/embed"] == ROWS
    change(tensors, notes)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    write_tensors(path, torch.float32, shapes, lambda name: [tensors[name]], notes)
    refused(resealed(run / "step2"), str(run / "step2/state"), "embed", as_listed=True)


HOSTILE_ENTRIES = {
    "integers": {"dtype": "I32"},
    "another dtype": {"dtype": "BF16"},
    "no dtype": {"dtype": None},
    "2^60 rows": {"shape": [2**60, 16]},
    "2^60 dimensions of one": {"shape": [20, 16] + [1] * 1000},
    "negative rows": {"shape": [-20, -16]},
    "a shape of text": {"shape": "20"},
    "no shape": {"shape": None},
}


@pytest.mark.parametrize("change", HOSTILE_ENTRIES.values(), ids=HOSTILE_ENTRIES)
def test_hostile_entries_are_refused(run, refused, change):
    path = run / "step2" / PARTS[0]
    length, header = header_of(path)
    header["weight/embed"] |= change
    rewritten, data = json.dumps(header).encode(), path.read_bytes()[8 + length :]
    path.write_bytes(len(rewritten).to_bytes(8, "little") + rewritten + data)
    refused(resealed(run / "step2"), str(path), "weight/embed", as_listed=True)


@pytest.mark.parametrize("metadata", [None, 7, [], "weight/embed", {"weight/embed": 7}, {}], ids=repr)
def test_hostile_metadata_is_refused(run, refused, metadata):
    path = run / "step2" / PARTS[0]
    length, header = header_of(path)
    header["__metadata__"] = metadata
    rewritten, data = json.dumps(header).encode(), path.read_bytes()[8 + length :]
    path.write_bytes(len(rewritten).to_bytes(8, "little") + rewritten + data)
    refused(resealed(run / "step2"), str(path), as_listed=True)


def _overlap(header):
    header["weight/embed"]["data_offsets"] = header["exp_avg/embed"]["data_offsets"]


def _shift(header):
    first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
    first["data_offsets"][1] += 4
    second["data_offsets"][0] += 4


@pytest.mark.parametrize("change", [_overlap, _shift, lambda header: header.popitem()], ids=["same", "shift", "rest"])
def test_hostile_offsets_are_refused(run, refused, change):
    """Tensors on the bytes of others, of another size, and bytes of no tensor. Their checksums are right."""
    directory, path = run / "step2", run / "step2" / PARTS[0]
    length, header = header_of(path)
    metadata, data = header.pop("__metadata__"), path.read_bytes()[8 + length :]
    change(header)
    rewritten = json.dumps({"__metadata__": metadata, **header}).encode()
    rewritten = len(rewritten).to_bytes(8, "little") + rewritten
    path.write_bytes(rewritten + data)
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"][PARTS[0]] = {
        "bytes": path.stat().st_size,
        "header_sha256": hashlib.sha256(rewritten).hexdigest(),
        "tensors": {
            name: hashlib.sha256(data[slice(*entry["data_offsets"])]).hexdigest() for name, entry in header.items()
        },
    }
    write_manifest(directory, manifest)
    refused(directory, str(path), as_listed=change is _shift)


COUNTS = ["-1", "1.5", "3.0", "NaN", "Infinity", "null", "true", '"3"', "[]", "{}", str(2**60), "1" * 400, "1" * 5000]


@pytest.mark.parametrize(
    "text",
    [f'{{"adam_step": {count}}}' for count in COUNTS] + ["", "{}", "[]", "7", "null", "[" * 100_000, "\xff"],
    ids=lambda text: repr(text[:32]),
)
def test_counters_that_are_none_are_refused(run, refused, text):
    path = run / "step2" / "state/counters.json"
    path.write_bytes(text.encode("latin-1"))
    refused(resealed(run / "step2"), str(path), as_listed=True)


@pytest.mark.parametrize("names", [PARTS, PARTS[1:], ["state/counters.json"], [*PARTS, "state/counters.json"]])
def test_a_checkpoint_without_all_of_its_state_is_refused(run, refused, names):
    """It is whole as far as its manifest goes. Files that are there, but not listed, are refused before."""
    directory = run / "step2"
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in names:
        del manifest["files"][name]
    write_manifest(directory, manifest)
    refused(directory, "does not list it")
    for name in names:
        (directory / name).unlink()
    refused(directory, str(directory), "lacks", as_listed=True)


def test_random_damage_never_escapes(run, refused):
    """Bytes replaced, inserted and removed anywhere in manifest and state: a UserError each time, nothing else."""
    rng = random.Random(5)
    for name in (MANIFEST, PARTS[0], "state/counters.json"):
        path = run / "step2" / name
        data = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(damaged))
                damaged[place : place + rng.randint(0, 2)] = bytes(
                    rng.choices(b'0129-"[{}],:\0\xff\nx', k=rng.randint(0, 2))
                )
            if damaged == data:
                continue
            path.write_bytes(damaged)
            refused(run / "step2", str(run / "step2"))
        path.write_bytes(data)
    assert verify_checkpoint(run / "step2") == []


# Going back to an older one


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_the_newest_whole_one_is_found(run, capsys, name):
    assert latest_valid_step(run, Dist()) == 2
    assert capsys.readouterr().out == ""
    flip(run / "step2" / name)
    assert latest_valid_step(run, Dist()) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert str(run / "step2" / name) in line
    assert "going back to step 1" in line
    (run / "step1" / name).unlink()
    if name == MANIFEST:  # then it has never been completed
        shutil.rmtree(run / "step1")
    with pytest.raises(UserError) as caught:
        latest_valid_step(run, Dist())
    assert str(run / "step2" / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_state_that_is_gone_is_damage(run, capsys):
    shutil.rmtree(run / "step2" / "state")
    assert latest_valid_step(run, Dist()) == 1
    assert "missing" in capsys.readouterr().out


def test_nothing_to_go_back_to(tmp_path):
    assert latest_valid_step(tmp_path, Dist()) is None
    assert latest_valid_step(tmp_path / "nowhere", Dist()) is None


def test_ranks_share_the_hashing(run, capsys, monkeypatch):
    flip(run / "step2" / PARTS[1])
    hashed, original = [], manifest.checksums
    monkeypatch.setattr(manifest, "checksums", lambda path: hashed.append(path) or original(path))
    told, barrier = [None] * 2, Barrier(2)
    ranks = [ThreadRank(rank, 2, board=told, meeting=barrier) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda r: latest_valid_step(run, r), ranks)) == [1, 1]
        assert list(threads.map(lambda r: verify_checkpoint(run / "step1", r), ranks)) == [[], []]
    assert len([path for path in hashed if path.parts[-2] == "step2" or path.parts[-3] == "step2"]) == len(FILES)
    assert len(hashed) == 3 * len(FILES)  # step1 twice
    assert len(capsys.readouterr().out.splitlines()) == 1


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
    state = run / "step1" / PARTS[1]
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
    for words in (["step1/config.json", "missing"], [PARTS[1], "exp_avg/embed"], ["step2/manifest.json"]):
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


def test_clearing_up_after_a_killed_save(run, monkeypatch):
    dropped = Trainee().save(run, 4, keep_state=9)
    with monkeypatch.context() as patch:  # killed while dropping state, when the manifest had changed
        patch.setattr(shutil, "rmtree", lambda path: None)
        drop_state(dropped)
    assert verify_checkpoint(dropped) != []
    (run / "step1" / ".manifest.json.tmp").write_text("{")  # killed while it changed
    shutil.copytree(run / "step2", run / ".step3.tmp")
    (run / "step2").rename(run / ".step2.old.tmp")  # killed between the two renames of a step that was saved again
    shutil.copytree(run / "step1", run / ".step1.old.tmp")  # killed right after them
    (run / "step7").mkdir()
    others = [run / "run.json", run / ".hidden"]
    for path in others:
        path.write_text("not a checkpoint's")
    clean_up(run)
    assert saved_steps(run) == [1, 2, 4]
    assert steps_with_state(run) == [1, 2]
    assert sorted(path.name for path in run.iterdir()) == [".hidden", "run.json", "step1", "step2", "step4", "step7"]
    assert [verify_checkpoint(run / f"step{step}") for step in (1, 2, 4)] == [[], [], []]
    assert not (dropped / "state").exists()
    clean_up(run.parent / "nowhere")


# Nothing is pickled

AUDITED = """
import pickle, sys
from dataclasses import replace
from pathlib import Path
import torch
import checkpoint, generate
from checkpoints import resume
from model import SIZES, Pythia
from model.huggingface import load
from runtime.ranks import Dist
from checkpoints.save import Saver
from step import make_optimizer

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
saver = Saver(run, model, optimizer, Dist(), torch.float16)
saver.save(1, {"updates": 1})
saver.finish()
directory = run / f"step{resume.latest_valid_step(run, Dist())}"
resume.restore(directory, model, optimizer)
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
    for name in (MODEL, PARTS[1]):
        path = run / "step2" / name
        length, header = header_of(path)
        spans = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert 8 + length + spans[-1][1] == path.stat().st_size
        assert checksums(path)["tensors"].keys() == header.keys() - {"__metadata__"}
