"""Manifests and verification: every way in which a file can be damaged, the command, and cleaning up."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from trainee import FILES, MANIFEST, MODEL, PARTS, Trainee, header_of, refusals, two_checkpoints

from checkpoint import verify
from checkpoints.manifest import clean_up, drop_state, steps_with_state, verify_checkpoint
from model.sizes import is_published_step
from runtime import manifests
from runtime.errors import UserError
from runtime.manifests import checksums, saved_steps, write_manifest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small models are faster with one thread, above all on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two checkpoints. Tests change copies of it."""
    return two_checkpoints(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def refused():
    with refusals() as check:
        yield check


# Which steps


def test_the_154_published_steps():
    expected = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, *range(1000, 144_000, 1000)]
    assert len(expected) == 154
    assert [step for step in range(143_001) if is_published_step(step, 143_000)] == expected


def test_a_short_run_keeps_its_last_step():
    assert [step for step in range(61) if is_published_step(step, 60)] == [0, 1, 2, 4, 8, 16, 32, 60]


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
        (error,) = verify_checkpoint(run / name)
        assert str(run / name) in error


def test_checkpoints_are_in_numerical_order(tmp_path):
    trainee = Trainee()
    for step in (10, 9, 100):
        trainee.save(tmp_path, step)
    assert saved_steps(tmp_path) == [9, 10, 100]
    assert steps_with_state(tmp_path) == [10, 100]


# Damaged files


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_flipped_bit_is_found(run, refused, name):
    """At 100 random offsets of every file. For a bit inside a tensor, the line names the tensor."""
    path, directory = run / "step2" / name, run / "step2"
    data, rng, tensors_hit = path.read_bytes(), random.Random(name), 0
    length, header = header_of(path) if path.suffix == ".safetensors" else (0, {})
    for _ in range(100):
        offset, bit = rng.randrange(len(data)), rng.randrange(8)
        damaged = bytearray(data)
        damaged[offset] ^= 1 << bit
        words = [str(path)]
        for tensor, entry in header.items():
            first, last = entry.get("data_offsets", (0, 0))
            if first <= offset - 8 - length < last:
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
    refused(run / "step5", f"{run / 'step5'} holds step 2")
    (run / "step7").symlink_to(run / "step1")
    refused(run / "step7", f"{run / 'step7'} holds step 1")
    assert steps_with_state(run) == [1, 5, 7]  # as damaged ones: resuming names them and falls back
    assert not verify(run)


def test_a_copy_may_have_any_name(run):
    """Only a name stepN says something about the step."""
    for name in ("s60", "step", "step2 (copy)", "STEP7"):
        copy = shutil.copytree(run / "step2", run.parent / name)
        assert verify_checkpoint(copy) == []
        assert verify(copy)
        trainee = Trainee(seed=1)
        trainee.restore(copy)
        assert trainee.bits() == Trainee(steps=2).bits()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_what_is_no_plain_file_is_found(run, refused, name):
    """FIFOs, devices, /proc and files of absurd size: nothing waits, and nothing takes all memory."""
    path = run / "step2" / name
    for kind in ("fifo", "/dev/zero", "/dev/stdin", "/proc/self/mem", "sparse"):
        path.unlink()
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(2**42)
        else:
            path.symlink_to(kind)
        refused(run / "step2", str(path))


def test_a_directory_that_cannot_be_listed_is_damage(run, monkeypatch):
    def fail(path, pattern):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "rglob", fail)
    line = f"{run / 'step2'} cannot be read: Input/output error ({run / 'step2' / 'state'})"
    assert verify_checkpoint(run / "step2") == [line]
    monkeypatch.setattr(Path, "glob", fail)
    with pytest.raises(UserError, match=re.escape(f"the checkpoints of {run} cannot be listed: Input/output error")):
        steps_with_state(run)


def test_a_disk_error_names_the_file(run, monkeypatch):
    """As of read: it knows no name."""

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(manifests.hashlib, "file_digest", fail)
    errors = verify_checkpoint(run / "step2")
    path = run / "step2" / "config.json"
    assert f"{path} is damaged: Input/output error ({path})" in errors


def test_leftovers_that_cannot_be_removed(run, monkeypatch):
    """One line that names the file, never a traceback."""

    def fail(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", "part-00001")  # as of rmtree: without its directory

    (run / ".step3.tmp").symlink_to(run / "step2")
    with pytest.raises(UserError, match="symbolic link"):
        clean_up(run)
    (run / ".step3.tmp").unlink()
    shutil.copytree(run / "step2", run / ".step3.0123456789abcdef.tmp")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.raises(UserError, match=re.escape(f"Read-only file system ({run}/.step3.0123456789abcdef.tmp)")):
            clean_up(run)
    clean_up(run)
    (run / ".x.tmp").mkdir()
    with pytest.raises(UserError, match=re.escape(f"({run}/.x.tmp)")):
        clean_up(run)


def test_names_with_control_characters_are_not_printed_raw(run):
    path = run / "step2" / MODEL
    data = path.read_bytes()
    name = b"gpt_neox.embed_in.weight"
    damaged = data.replace(name, b"\\u001b[2J" + name[9:])
    assert len(damaged) == len(data)
    path.write_bytes(damaged)
    (line,) = verify_checkpoint(run / "step2")
    assert "\x1b" not in line
    (run / "step\x1b[2J").mkdir()
    assert "\x1b" not in command("verify", run).stdout


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
    "a name of two lines": '{"a\\nb":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
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
    """They come from the same model at the same step, and each of them is valid in its own run."""
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
def test_unlisted_files_are_found(run, refused, name):
    (run / "step2" / name).parent.mkdir(exist_ok=True)
    shutil.copy(run / "step2" / PARTS[0], run / "step2" / name)
    refused(run / "step2", str(run / "step2" / name), "does not list it")


def _set(*keys_and_value):
    """Change a manifest: set the value at a path of keys."""
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
    """Change a manifest: add an entry whose size and checksum are right if the name is resolved."""
    return lambda manifest: manifest["files"].update({name: manifest["files"]["config.json"]})


MANIFESTS = {
    "no step": _drop("step"),
    "no format": _drop("format"),
    "no files": _drop("files"),
    "another step": _set("step", 1),
    "a step of text": _set("step", "2x"),
    "a list for the step": _set("step", [2]),
    "another format": _set("format", 3),
    "the previous format": _set("format", 1),
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
    write_manifest(directory, manifest)  # with its own right checksum
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
def test_an_unreadable_manifest_is_refused(run, refused, text):
    (run / "step2" / MANIFEST).write_bytes(text.encode("latin-1"))
    refused(run / "step2", str(run / "step2" / MANIFEST))


def test_random_damage_never_escapes(run, refused):
    """Replace, insert and remove bytes anywhere in manifest and state: each time a UserError, and nothing else."""
    rng = random.Random(5)
    for name in (MANIFEST, PARTS[0], "state/counters.json"):
        path = run / "step2" / name
        data = path.read_bytes()
        for _ in range(100):
            damaged = bytearray(data)
            for _ in range(rng.randint(1, 4)):
                offset = rng.randrange(len(damaged))
                damaged[offset : offset + rng.randint(0, 2)] = bytes(
                    rng.choices(b'0129-"[{}],:\0\xff\nx', k=rng.randint(0, 2))
                )
            if damaged == data:
                continue
            path.write_bytes(damaged)
            refused(run / "step2", str(run / "step2"))
        path.write_bytes(data)
    assert verify_checkpoint(run / "step2") == []


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


def test_clean_up_after_a_killed_save(run, monkeypatch):
    dropped = Trainee().save(run, 4, keep_state=9)
    with monkeypatch.context() as patch:  # killed while dropping state, after the manifest changed
        patch.setattr(shutil, "rmtree", lambda path: None)
        drop_state(dropped)
    assert verify_checkpoint(dropped) != []
    shutil.copytree(run / "step2", run / ".step6.0123456789abcdef.tmp")
    (run / ".run.json.0123456789abcdef.tmp").write_text("{")
    (run / "step1" / ".manifest.json.123.tmp").write_text("{")  # killed while the manifest was replaced
    (run / "step1" / ".manifest.json.tmp").write_text("{")  # the name in older versions
    shutil.copytree(run / "step2", run / ".step3.tmp")
    (run / "step2").rename(run / ".step2.old.tmp")  # killed between the two renames of a step that was saved again
    shutil.copytree(run / "step1", run / ".step1.old.tmp")  # killed right after them
    (run / "step7").mkdir()
    others = [run / "run.json", run / ".hidden"]
    for path in others:
        path.write_text("not part of a checkpoint")
    clean_up(run)
    assert saved_steps(run) == [1, 2, 4]
    assert steps_with_state(run) == [1, 2]
    assert sorted(path.name for path in run.iterdir()) == [".hidden", "run.json", "step1", "step2", "step4", "step7"]
    assert [verify_checkpoint(run / f"step{step}") for step in (1, 2, 4)] == [[], [], []]
    assert not (dropped / "state").exists()
    clean_up(run.parent / "nowhere")


def test_the_command_takes_a_copy_of_the_model(run, tmp_path, capsys):
    """Under any name, and without state/. Resuming still needs the state."""
    copy = shutil.copytree(run / "step2", tmp_path / "my model", ignore=shutil.ignore_patterns("state"))
    assert verify(copy)
    assert f"ok   {copy}" in capsys.readouterr().out
    assert any("state" in error for error in verify_checkpoint(copy))
    (copy / MODEL).write_bytes((copy / MODEL).read_bytes()[:-1])
    assert not verify(copy)
    copy = shutil.copytree(run / "step2", tmp_path / "other")
    (copy / "state" / "counters.json").unlink()
    assert not verify(copy)


# Nothing is pickled

AUDITED = """
import pickle, sys
from dataclasses import replace
from pathlib import Path
import torch
import checkpoint, generate
from checkpoints import resume
from model import SIZES, Pythia
from model.huggingface import Export, load
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
saver = Saver(run, model, optimizer, Dist(), Export(torch.float16))
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
    """Header and tensors are disjoint and fill the file, so that their checksums cover every byte."""
    for name in (MODEL, PARTS[1]):
        path = run / "step2" / name
        length, header = header_of(path)
        spans = sorted(entry["data_offsets"] for key, entry in header.items() if key != "__metadata__")
        assert spans[0][0] == 0
        assert all(a[1] == b[0] for a, b in pairwise(spans))
        assert 8 + length + spans[-1][1] == path.stat().st_size
        assert checksums(path)["tensors"].keys() == header.keys() - {"__metadata__"}
