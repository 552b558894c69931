"""Resuming: round trips to the bit, state that does not fit the model, and falling back to an older checkpoint."""

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch
from safetensors.torch import load_file
from trainee import (
    COUNTERS,
    FILES,
    MANIFEST,
    MICRO,
    PARTS,
    TINY,
    ThreadRank,
    Trainee,
    flip,
    header_of,
    refusals,
    two_checkpoints,
)

from checkpoints import manifest, resume
from checkpoints.manifest import verify_checkpoint
from checkpoints.resume import find_rows, latest_valid_step, read_rows, recover_record, state_shapes
from model.huggingface import load
from runtime.errors import UserError
from runtime.manifests import checksums, write_manifest
from runtime.ranks import Dist
from runtime.tensors import write_tensors


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


# Round trips


@pytest.mark.parametrize("steps", [0, 1, 3])  # before the first step the optimizer has no moments
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
    shutil.rmtree(directory)  # the restored state does not depend on the files
    for step in range(steps, steps + 4):
        original.train(step, step + 1)
        resumed.train(step, step + 1)
        assert resumed.bits() == original.bits()
    assert {int(state["step"]) for state in resumed.optimizer.state.values()} == {steps + 4}


@pytest.mark.parametrize("steps", [0, 3])
def test_restore_rewinds_a_model_that_trained_further(tmp_path, steps):
    original = Trainee(steps=steps)
    directory = original.save(tmp_path, steps)
    expected = original.bits()
    trained_further = Trainee(steps=steps + 2)
    trained_further.restore(directory)
    original.train(steps, steps + 1)
    trained_further.train(steps, steps + 1)
    assert original.bits() != expected
    assert trained_further.bits() == original.bits()


def test_another_model_is_refused(run, refused):
    for config in (TINY, replace(MICRO, vocab=41), replace(MICRO, layers=2)):
        other = Trainee(config, steps=1)
        before = other.bits()
        with pytest.raises(UserError, match="step2"):
            other.restore(run / "step2")
        assert other.bits() == before
    smaller = Trainee(replace(MICRO, layers=2), steps=1).save(run, 3)  # it has more tensors than the model
    victim = Trainee(steps=1)
    with pytest.raises(UserError, match="does not belong to this model"):
        victim.restore(smaller)
    assert victim.bits() == Trainee(steps=1).bits()


def resealed(directory):
    """Rewrite the manifest with the checksums of the files as they are now."""
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in manifest["files"]:
        manifest["files"][name] = (
            checksums_of_hostile(directory / name) if name == PARTS[0] else checksums(directory / name)
        )
    write_manifest(directory, manifest)
    return directory


def checksums_of_hostile(path):
    """Like `checksums`, but for headers that the safetensors library refuses."""
    (length, header), data = header_of(path), path.read_bytes()
    header.pop("__metadata__", None)
    tensors = {name: data[8 + length :][slice(*entry["data_offsets"])] for name, entry in header.items()}
    return {
        "bytes": len(data),
        "header_sha256": hashlib.sha256(data[: 8 + length]).hexdigest(),
        "tensors": {name: hashlib.sha256(tensor).hexdigest() for name, tensor in tensors.items()},
    }


def rewrite_header(path, header):
    """Replace the header of a safetensors file; the tensors stay."""
    length, data = header_of(path)[0], path.read_bytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


ROWS = "0:20 of 40"  # the rows of weight/embed in the first part


def _tell(text):
    return lambda tensors, notes: notes.update({"weight/embed": text})


def _hold(rows, text):
    """Change a part: other rows of embed, and metadata that matches them or not."""

    def change(tensors, notes):
        tensors["weight/embed"] = torch.zeros(rows, 16)
        notes["weight/embed"] = text

    return change


def _more(key):
    return lambda tensors, notes: (tensors.update({key: torch.zeros(20, 16)}), notes.update({key: ROWS}))


HOSTILE_PARTS = {
    "a gap": _hold(19, "0:19 of 40"),
    "an overlap": _hold(21, "0:21 of 40"),
    "all rows, though the other part has half": _hold(40, "0:40 of 40"),
    "rows of the other part": _tell("20:40 of 40"),
    "rows of a longer tensor": _tell("0:20 of 41"),
    "rows backwards": _tell("20:0 of 40"),
    "no rows": _hold(0, "0:0 of 40"),
    "rows that begin with the second": _tell("1:21 of 40"),
    "fewer rows than the metadata says": _hold(19, ROWS),
    "2^59 rows": _tell(f"0:{2**59} of {2**59}"),
    "10^30 rows": _tell(f"0:{10**30} of {10**30}"),
    "negative rows": _tell("-20:0 of 40"),
    "digits of another script": _tell("0:२० of 40"),
    "text": _tell("all of them\nand more"),
    "no metadata of a tensor": lambda tensors, notes: notes.pop("weight/embed"),
    "another shape": lambda tensors, notes: tensors.update({"weight/embed": torch.zeros(20, 4, 4)}),
    "a tensor less": lambda tensors, notes: tensors.pop("weight/embed"),
    "a tensor more": _more("weight/embedding"),
    "a moment more": _more("max_exp_avg_sq/embed"),
}


@pytest.mark.parametrize("change", HOSTILE_PARTS.values(), ids=HOSTILE_PARTS)
def test_parts_that_do_not_fit_are_refused(run, refused, change):
    """The checksums are right: another program, or an attacker, wrote the parts."""
    path = run / "step2" / PARTS[0]
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # independent of the file
    notes = header_of(path)[1]["__metadata__"]
    assert notes["weight/embed"] == ROWS
    change(tensors, notes)
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    write_tensors(path, torch.float32, shapes, lambda name: [tensors[name]], notes)
    refused(resealed(run / "step2"), str(run / "step2/state"), "embed", as_listed=True)


HOSTILE_ENTRIES = {
    "integers": {"dtype": "I32"},
    "2^60 dimensions of one": {"shape": [20, 16] + [1] * 1000},
}
# The safetensors library refuses these, and verify_checkpoint reports it.
UNREADABLE_ENTRIES = {
    "another dtype": {"dtype": "BF16"},
    "no dtype": {"dtype": None},
    "2^60 rows": {"shape": [2**60, 16]},
    "negative rows": {"shape": [-20, -16]},
    "a shape of text": {"shape": "20"},
    "no shape": {"shape": None},
}


@pytest.mark.parametrize("name", [*HOSTILE_ENTRIES, *UNREADABLE_ENTRIES])
def test_hostile_entries_are_refused(run, refused, name):
    path = run / "step2" / PARTS[0]
    header = header_of(path)[1]
    header["weight/embed"] |= (HOSTILE_ENTRIES | UNREADABLE_ENTRIES)[name]
    rewrite_header(path, header)
    readable = name in HOSTILE_ENTRIES
    refused(resealed(run / "step2"), str(path), "weight/embed" if readable else "header", as_listed=readable)


@pytest.mark.parametrize("metadata", [None, 7, [], "weight/embed", {"weight/embed": 7}, {}], ids=repr)
def test_hostile_metadata_is_refused(run, refused, metadata):
    path = run / "step2" / PARTS[0]
    rewrite_header(path, header_of(path)[1] | {"__metadata__": metadata})
    refused(resealed(run / "step2"), str(path), as_listed=metadata in (None, {}))


def _overlap(header):
    header["weight/embed"]["data_offsets"] = header["exp_avg/embed"]["data_offsets"]


def _shift(header):
    first, second = sorted(header.values(), key=lambda entry: entry["data_offsets"])[:2]
    first["data_offsets"][1] += 4
    second["data_offsets"][0] += 4


@pytest.mark.parametrize("change", [_overlap, _shift, lambda header: header.popitem()], ids=["same", "shift", "rest"])
def test_hostile_offsets_are_refused(run, refused, change):
    """Two tensors share bytes, a tensor has too many bytes, or bytes belong to no tensor. The checksums are right."""
    path = run / "step2" / PARTS[0]
    header = header_of(path)[1]
    metadata = header.pop("__metadata__")
    change(header)
    rewrite_header(path, {"__metadata__": metadata, **header})
    refused(resealed(run / "step2"), str(path))


def test_a_part_truncated_after_it_was_checked_is_an_error(run):
    """A memory-mapped file would end the process with SIGBUS."""
    parts, shapes = [run / "step2" / name for name in PARTS], state_shapes(dict(Trainee().model.named_parameters()))
    stored = find_rows(parts, shapes)["weight/embed"]
    assert sum(len(values) for _, values in read_rows(stored, slice(0, 40))) == 40
    os.truncate(parts[1], stored[1].offset + 100)
    with pytest.raises(OSError, match=f"{parts[1]} is shorter"):
        list(read_rows(stored, slice(0, 40)))


COUNTS = ["-1", "1.5", "3.0", "NaN", "Infinity", "null", "true", '"3"', "[]", "{}", str(2**60), "1" * 400, "1" * 5000]


@pytest.mark.parametrize(
    "text",
    [f'{{"adam_step": {count}}}' for count in COUNTS] + ["", "{}", "[]", "7", "null", "[" * 100_000, "\xff"],
    ids=lambda text: repr(text[:32]),
)
def test_bad_counters_are_refused(run, refused, text):
    path = run / "step2" / "state/counters.json"
    path.write_bytes(text.encode("latin-1"))
    refused(resealed(run / "step2"), str(path), as_listed=True)


@pytest.mark.parametrize("names", [PARTS, PARTS[1:], ["state/counters.json"], [*PARTS, "state/counters.json"]])
def test_a_checkpoint_without_all_of_its_state_is_refused(run, refused, names):
    """First the files are present but not listed; then they are gone, and the manifest is right."""
    directory = run / "step2"
    manifest = json.loads((directory / MANIFEST).read_text())
    for name in names:
        del manifest["files"][name]
    write_manifest(directory, manifest)
    refused(directory, "does not list it")
    for name in names:
        (directory / name).unlink()


# Falling back to an older checkpoint


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_the_newest_valid_checkpoint_is_found(run, capsys, name):
    assert latest_valid_step(run, Dist()) == 2
    assert capsys.readouterr().out == ""
    flip(run / "step2" / name)
    assert latest_valid_step(run, Dist()) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert str(run / "step2" / name) in line
    assert "going back to step 1" in line
    (run / "step1" / name).unlink()
    if name == MANIFEST:  # without a manifest it was never complete
        shutil.rmtree(run / "step1")
    with pytest.raises(UserError) as caught:
        latest_valid_step(run, Dist())
    assert str(run / "step2" / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_renamed_step_is_not_resumed(run, capsys):
    """Neither a renamed directory nor a link: training would go on with the weights of another step."""
    (run / "step2").rename(run / "step4")
    (run / "step3").symlink_to(run / "step1")
    assert latest_valid_step(run, Dist()) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert f"{run / 'step4'} holds step 2" in lines[0]
    assert f"{run / 'step3'} holds step 1" in lines[1]


def test_steps_that_cannot_be_listed_stop_all_ranks(run, monkeypatch):
    def fail(path, pattern):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "glob", fail)
    board, barrier = [None] * 2, Barrier(2)

    def resume_on(rank):
        with pytest.raises(UserError, match=r"cannot be listed: Input/output error \("):
            latest_valid_step(run, ThreadRank(rank, 2, board=board, meeting=barrier))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(resume_on, range(2)))


def test_a_disk_error_while_state_is_loaded(run, monkeypatch):
    """After it was verified. One line that names the file."""

    def fail(path, *_):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(resume, "read_pieces", fail)
    with pytest.raises(UserError) as caught:
        Trainee().restore(run / "step2")
    path = run / "step2" / PARTS[0]
    assert str(caught.value) == f"{run / 'step2'} cannot be read any more: Input/output error ({path})"


# The copy of the settings


RECORD = {"settings": {"size": "14m", "lr": 1e-3, "log": ""}, "data": {"order_sha256": "ab", "documents": [1, None]}}


def test_the_newest_valid_manifest_tells_the_record(tmp_path):
    run, trainee = tmp_path / "run", Trainee()
    assert recover_record(run) is None
    trainee.save(run, 8)
    assert recover_record(run) is None
    for step in (9, 10, 11):
        trainee.save(run, step, record=RECORD | {"step": step}, keep_state=1)
    assert recover_record(run) == RECORD | {"step": 11}
    flip(run / "step11" / MANIFEST)
    assert recover_record(run) == RECORD | {"step": 10}  # its state is gone
    (run / "step10").rename(run / "step12")
    assert recover_record(run) == RECORD | {"step": 9}
    for step in (8, 9):
        assert verify_checkpoint(run / f"step{step}") == []
        load(run / f"step{step}")


@pytest.mark.parametrize("value", [None, 7, [], "settings", {"later": 1}])
def test_manifests_may_have_unknown_entries(run, value):
    """Of a later version: the checkpoint stays valid. Only an object is a record."""
    for key in ("run", "comment"):
        manifest = json.loads((run / "step2" / MANIFEST).read_text())
        write_manifest(run / "step2", manifest | {key: value})
    assert verify_checkpoint(run / "step2") == []
    assert recover_record(run) == (value if isinstance(value, dict) else None)
    Trainee().restore(run / "step2")


def test_missing_state_counts_as_damage(run, capsys):
    shutil.rmtree(run / "step2" / "state")
    assert latest_valid_step(run, Dist()) == 1
    assert "missing" in capsys.readouterr().out


def test_a_run_without_checkpoints(tmp_path):
    assert latest_valid_step(tmp_path, Dist()) is None
    assert latest_valid_step(tmp_path / "nowhere", Dist()) is None


def test_ranks_share_the_hashing(run, capsys, monkeypatch):
    flip(run / "step2" / PARTS[1])
    hashed, original = [], manifest.checksums
    monkeypatch.setattr(manifest, "checksums", lambda path: hashed.append(path) or original(path))
    board, barrier = [None] * 2, Barrier(2)
    ranks = [ThreadRank(rank, 2, board=board, meeting=barrier) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda r: latest_valid_step(run, r), ranks)) == [1, 1]
        assert list(threads.map(lambda r: verify_checkpoint(run / "step1", r), ranks)) == [[], []]
    assert len([path for path in hashed if path.parts[-2] == "step2" or path.parts[-3] == "step2"]) == len(FILES)
    assert len(hashed) == 3 * len(FILES)  # step1 twice
    assert len(capsys.readouterr().out.splitlines()) == 1
