"""Saving in the background: a checkpoint holds the state at the call of save. When disks fail or processes are killed
at any write, visible checkpoints stay valid."""

import errno
import json
import os
import random
import re
import resource
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import BrokenBarrierError, Event, Lock, Thread
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from trainee import COUNTERS, MANIFEST, MICRO, MODEL, TINY, Trainee, two_checkpoints

from checkpoints import resume
from checkpoints import save as save_module
from checkpoints.manifest import clean_up, steps_with_state, verify_checkpoint
from checkpoints.resume import latest_valid_step
from checkpoints.save import Saver
from model import huggingface
from runtime import files, manifests, tensors
from runtime.errors import UserError
from runtime.manifests import saved_steps
from runtime.ranks import Dist

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


def temporaries(run):
    return [path for path in run.rglob("*") if path.name.startswith(".") or "tmp" in path.name]


def restored(directory):
    """All bits that the checkpoint holds."""
    trainee = Trainee(seed=1)
    trainee.restore(directory)
    return trainee.bits()


# What is written


def test_model_files_of_many_shards(tmp_path, monkeypatch):
    """With a small limit, two ranks write many files. What is read back does not depend on the limit."""
    original, limit = Trainee(steps=2), 4000
    monkeypatch.setattr(huggingface.shard, "__defaults__", (limit,))
    directory = original.save(tmp_path, 2, torch.float32, world=2)
    monkeypatch.undo()
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 3
    for i, file in enumerate(shards):
        assert file.name.endswith(f"-{i + 1:05}-of-{len(shards):05}.safetensors")
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(4 * t.numel() for t in tensors.values()) <= limit
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert not (directory / MODEL).exists()
    assert index["metadata"]["total_size"] == 4 * MICRO.parameters
    assert index["weight_map"] == {name: file.name for file in shards for name in load_file(file)}
    assert verify_checkpoint(directory) == []

    theirs = transformers.GPTNeoXForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ours = {huggingface.huggingface_name(name): p for name, p in original.model.named_parameters()}
    found = {name.replace("lm_head", "embed_out"): p for name, p in theirs.named_parameters()}
    assert found.keys() == ours.keys()
    assert all(torch.equal(found[name], p) for name, p in ours.items())
    assert restored(directory) == original.bits()
    again = original.save(tmp_path, 2, torch.float32)  # with the usual limit; it replaces the old shards
    assert [path.name for path in sorted(again.rglob("*.safetensors"))] == [MODEL, "part-00001-of-00001.safetensors"]
    assert restored(again) == original.bits()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_checkpoints_hold_what_an_export_holds(tmp_path, dtype):
    """The bytes of the files do not depend on the number of ranks that wrote them."""
    trainee = Trainee(TINY, steps=2)
    huggingface.save(trainee.model, tmp_path / "export", dtype)
    for world in (1, 2):
        directory = trainee.save(tmp_path / f"{world}", 2, dtype, world)
        for name in (MODEL, "config.json"):
            assert (directory / name).read_bytes() == (tmp_path / "export" / name).read_bytes()


def test_pieces(tmp_path, monkeypatch):
    """The files do not depend on the size of the pieces, even if a row is larger than a piece."""
    trainee = Trainee(steps=2)
    expected = trainee.save(tmp_path / "whole", 2, world=2)
    for size in (1, 100, 1000):
        for module in (save_module, resume):
            monkeypatch.setattr(module, "CHUNK_BYTES", size)
        directory = trainee.save(tmp_path / f"{size}", 2, world=2)
        assert (directory / MANIFEST).read_bytes() == (expected / MANIFEST).read_bytes()
        assert restored(directory) == trainee.bits()


def test_saving_a_step_again_replaces_it_whole(run):
    newer = Trainee(steps=7, seed=3)
    newer.save(run, 2)  # without tokenizer: no old file may stay
    present = sorted(
        path.relative_to(run / "step2").as_posix() for path in (run / "step2").rglob("*") if path.is_file()
    )
    part = "state/part-00001-of-00001.safetensors"
    assert present == sorted(["config.json", MANIFEST, MODEL, "state/counters.json", part])
    assert restored(run / "step2") == newer.bits()
    assert verify_checkpoint(run / "step1") == []
    assert temporaries(run) == []


def test_only_the_newest_keep_their_state(tmp_path):
    trainee = Trainee()
    for step in range(1, 6):
        trainee.train(step - 1, step)
        trainee.save(tmp_path, step, keep_state=2)
        assert saved_steps(tmp_path) == list(range(1, step + 1))
        assert steps_with_state(tmp_path) == list(range(max(1, step - 1), step + 1))
    for step in range(1, 6):
        assert verify_checkpoint(tmp_path / f"step{step}") == []
        assert ((tmp_path / f"step{step}" / "state").exists()) == (step >= 4)
        weights = load_file(tmp_path / f"step{step}" / MODEL)["gpt_neox.embed_in.weight"]
        assert torch.equal(weights, Trainee(steps=step).model.embed.half())
    with pytest.raises(UserError, match="state"):
        Trainee().restore(tmp_path / "step1")
    assert temporaries(tmp_path) == []


def test_only_valid_older_checkpoints_count_toward_keep_state(tmp_path):
    """A run that fell back from damaged checkpoints saves steps that were saved before it fell back."""
    trainee = Trainee()
    for step in (4, 5, 8, 16, 32):
        trainee.save(tmp_path, step, keep_state=9)
    (tmp_path / "step5" / MANIFEST).write_text("")
    trainee.save(tmp_path, 6, keep_state=2)
    assert steps_with_state(tmp_path) == [4, 5, 6, 8, 16, 32]
    trainee.save(tmp_path, 7, keep_state=2)
    assert steps_with_state(tmp_path) == [5, 6, 7, 8, 16, 32]
    assert [step for step in saved_steps(tmp_path) if verify_checkpoint(tmp_path / f"step{step}")] == [5]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 7}'])
def test_a_damaged_older_checkpoint_does_not_stop_a_save(run, text):
    (run / "step1" / MANIFEST).write_text(text)
    Trainee(steps=3).save(run, 3, keep_state=1)
    assert verify_checkpoint(run / "step3") == []
    assert verify_checkpoint(run / "step2") == []


def test_missing_state_does_not_stop_a_save(run):
    shutil.rmtree(run / "step1" / "state")
    Trainee(steps=3).save(run, 3, keep_state=1)
    assert steps_with_state(run) == [3]
    assert all(verify_checkpoint(run / f"step{step}") == [] for step in (1, 2, 3))


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


def test_everything_is_flushed_before_the_directory_is_renamed(tmp_path, monkeypatch, capsys):
    """Otherwise a power failure leaves a checkpoint of the right name with empty files."""
    flushed, named, fsync, rename = set(), [], os.fsync, Path.rename

    def watched_fsync(descriptor):
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    def watched_rename(path, target):
        if Path(target).name == "step1":
            named.append({p for p in [path, *path.rglob("*")] if p.stat().st_ino not in flushed})
            flushed.clear()
            assert capsys.readouterr().out == ""
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    Trainee(steps=1).save(tmp_path, 1, world=2)
    assert named == [set()]
    assert tmp_path.stat().st_ino in flushed  # the name itself
    assert capsys.readouterr().out == f"saved {tmp_path / 'step1'}\n"


# In the background


@pytest.fixture
def gate(monkeypatch):
    """write_tensors waits until the test sets this event."""
    event, original = Event(), save_module.write_tensors
    monkeypatch.setattr(save_module, "write_tensors", lambda *args: event.wait(60) and original(*args))
    yield event
    event.set()


@pytest.mark.parametrize("steps", [0, 3])
def test_a_checkpoint_holds_the_state_at_the_call(tmp_path, gate, steps):
    trainee = Trainee(steps=steps)
    expected = trainee.bits()
    (saver,) = trainee.savers(tmp_path)
    counters = {"updates": 5, "list": [1]}
    saver.save(steps, counters)
    counters["list"].append(2)
    for step in range(steps, steps + 4):
        saver.wait_for_snapshot()
        trainee.train(step, step + 1)
    assert trainee.bits() != expected
    assert saved_steps(tmp_path) == []  # training did not wait for any write
    assert saver.failure is None
    gate.set()
    saver.finish()
    resumed = Trainee(seed=1)
    assert resumed.restore(tmp_path / f"step{steps}") == {"updates": 5, "list": [1]}
    assert resumed.bits() == expected


def test_no_update_before_the_snapshot_is_taken(tmp_path, monkeypatch):
    begin, copy = Event(), Saver._copy
    monkeypatch.setattr(Saver, "_copy", lambda self, tensors: begin.wait(60) and copy(self, tensors))
    trainee = Trainee(steps=1)
    (saver,) = trainee.savers(tmp_path)
    saver.wait_for_snapshot()  # nothing to wait for
    saver.save(1, COUNTERS)
    update = Thread(target=saver.wait_for_snapshot)
    update.start()
    update.join(0.1)
    assert update.is_alive()
    begin.set()
    update.join(60)
    assert not update.is_alive()
    saver.finish()
    assert restored(tmp_path / "step1") == trainee.bits()


def test_a_second_save_waits_for_the_first(tmp_path, gate):
    trainee = Trainee(steps=1)
    (saver,) = trainee.savers(tmp_path)
    saver.save(1, COUNTERS)
    saver.wait_for_snapshot()
    trainee.train(1, 2)
    second = Thread(target=saver.save, args=(2, COUNTERS))
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.set()
    second.join(60)
    saver.finish()
    assert restored(tmp_path / "step1") == Trainee(steps=1).bits()
    assert restored(tmp_path / "step2") == Trainee(steps=2).bits()


def test_the_snapshot_takes_its_memory_once(tmp_path):
    trainee = Trainee(steps=1)
    (saver,) = trainee.savers(tmp_path)
    saver.save(1, COUNTERS)
    saver.finish()
    snapshot = dict(saver.snapshot)
    saver.save(2, COUNTERS)
    saver.finish()
    assert all(saver.snapshot[key] is tensor for key, tensor in snapshot.items())
    memory = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saver.snapshot.values()
    }
    steps = 4 * len(list(trainee.model.parameters()))
    assert sum(memory.values()) == 12 * MICRO.parameters + steps


# Disks that fail


def assert_failed(trainee, run, step, *words, world=1):
    """Saving fails on all ranks with the same line, now and at the next call, and no rank hangs."""
    savers = trainee.savers(run, world)
    for saver in savers:
        saver.save(step, COUNTERS)
        saver.wait_for_snapshot()
    for saver in savers:
        saver.wait()
        with pytest.raises(UserError) as caught:
            saver.finish()
        with pytest.raises(UserError):
            saver.save(step + 1, COUNTERS)
        assert saver.failure == str(caught.value) == savers[0].failure
        for word in (str(run / f"step{step}"), *words):
            assert word in saver.failure
        assert "\n" not in saver.failure


def test_full_disk_is_noticed_before_writing(run, monkeypatch):
    trainee = Trainee(TINY, steps=1)
    size = sum(path.stat().st_size for path in trainee.save(run, 3).rglob("*") if path.is_file())
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size - 1))
    assert_failed(trainee, run, 4, "no room for", world=2)
    assert sorted(run.rglob("*")) == before
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size + 2**26))
    assert verify_checkpoint(trainee.save(run, 4)) == []


@contextmanager
def small_disk(path):
    """A disk of one megabyte. Mounting it needs root, and some containers forbid it."""
    path.mkdir()
    if os.getuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("world", [1, 2])
def test_a_disk_that_runs_full(tmp_path, monkeypatch, world):
    """A real disk fills up at every point of a save: the earlier checkpoint stays valid."""
    trainee = Trainee(steps=1)
    with small_disk(tmp_path / "disk") as run:
        # The disk reports enough room, as when another program fills it at the same time.
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
        trainee.save(run, 1)
        failed = 0
        for pages in range(0, 40):
            filler = run / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
            os.truncate(filler, filler.stat().st_size - 4096 * pages)
            savers = trainee.savers(run, world)
            for saver in savers:
                saver.save(2, COUNTERS)
            for saver in savers:
                saver.wait()
            filler.unlink()
            assert verify_checkpoint(run / "step1") == []
            if savers[0].failure is None:
                break
            failed += 1
            assert "No space left" in savers[0].failure
            assert [path.name for path in run.iterdir()] == ["step1"]
        assert verify_checkpoint(run / "step2") == []
        assert failed >= 5
        assert saved_steps(run) == [1, 2]
        trainee.save(run, 3)
        assert saved_steps(run) == [1, 2, 3]
        assert all(verify_checkpoint(run / f"step{step}") == [] for step in (1, 2, 3))
        assert temporaries(run) == []


def test_a_read_only_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**40))
    trainee = Trainee(steps=1)
    if os.getuid() != 0:
        trainee.save(tmp_path, 1)
        tmp_path.chmod(0o555)
        try:
            assert_failed(trainee, tmp_path, 2)
        finally:
            tmp_path.chmod(0o755)
        assert saved_steps(tmp_path) == [1]
        return
    with small_disk(tmp_path / "disk") as run:  # root may write to a read-only directory, but not to a read-only mount
        trainee.save(run, 1)
        subprocess.run(["mount", "-o", "remount,ro", run], check=True)
        assert_failed(trainee, run, 2, "Read-only file system")
        assert verify_checkpoint(run / "step1") == []
        assert saved_steps(run) == [1]


def test_files_of_limited_size(run):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert_failed(Trainee(TINY, steps=1), run, 3, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert saved_steps(run) == [1, 2]
    assert temporaries(run) == []


def test_a_run_directory_that_is_gone(tmp_path):
    """It is not created again: if its disk was unmounted, another disk would fill up."""
    (saver,) = Trainee().savers(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    saver.save(1, COUNTERS)
    with pytest.raises(UserError, match=r"step1 could not be saved, .*: No such file or directory"):
        saver.finish()
    assert not (tmp_path / "gone").exists()


def test_a_part_that_changes_on_disk_during_a_save(run, monkeypatch):
    """The model is written from the parts on disk. A flipped bit there must not end in a model with right checksums."""
    original = save_module.find_rows

    def find_damaged_rows(parts, shapes):
        stored = original(parts, shapes)
        with stored["weight/embed"][-1].path.open("r+b") as file:
            file.seek(stored["weight/embed"][-1].offset)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        return stored

    monkeypatch.setattr(save_module, "find_rows", find_damaged_rows)
    assert_failed(Trainee(steps=3), run, 3, "part-00002-of-00002.safetensors", world=2)
    assert temporaries(run) == []


def test_an_unexpected_error_on_one_rank_ends_all(run, monkeypatch):
    monkeypatch.setattr(save_module, "find_rows", lambda *_: 1 / 0)
    assert_failed(Trainee(steps=3), run, 3, "ZeroDivisionError", world=2)
    assert saved_steps(run) == [1, 2]
    assert temporaries(run) == []


def test_an_update_does_not_wait_for_a_failed_snapshot(tmp_path, monkeypatch):
    def fail(self, tensors):
        raise MemoryError

    monkeypatch.setattr(Saver, "_copy", fail)
    (saver,) = Trainee(steps=1).savers(tmp_path)
    saver.save(1, COUNTERS)
    update = Thread(target=saver.wait_for_snapshot, daemon=True)
    update.start()
    update.join(20)
    assert not update.is_alive()
    with pytest.raises(UserError, match="MemoryError"):
        saver.finish()


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("failing_call", [1, 2, 3])
def test_a_run_directory_that_was_replaced(run, world, failing_call):
    """The check runs on the main rank before a directory is created, renamed, or loses its state. All ranks fail."""
    calls = []

    def check(step):
        assert step == 3
        calls.append(sorted(path.name for path in run.iterdir()))
        if len(calls) == failing_call:
            raise UserError(f"{run} is not the directory that this run has locked")

    savers = Trainee(steps=3).savers(run, world, check=check, keep_state=1)
    for saver in savers:
        saver.save(3, COUNTERS)
    for saver in savers:
        saver.wait()
    assert {saver.failure for saver in savers} == {f"{run} is not the directory that this run has locked"}
    assert calls[0] == ["step1", "step2"]
    assert len(calls) == failing_call
    assert saved_steps(run) == ([1, 2, 3] if failing_call == 3 else [1, 2])
    assert steps_with_state(run) == saved_steps(run)
    assert temporaries(run) == []


def test_nobody_can_guess_the_temporary_directory(run, monkeypatch):
    """It has another name at every save, the same on all ranks. clean_up finds it (see test_killed_at_any_call)."""
    names, original = [], save_module.write_tensors

    def watched(path, *args):
        names.append(path.relative_to(run).parts[0])
        return original(path, *args)

    monkeypatch.setattr(save_module, "write_tensors", watched)
    trainee = Trainee(steps=3)
    for _ in range(3):
        trainee.save(run, 3, world=2)
    assert len(names) == 3 * 3  # two parts and a model
    assert len(set(names)) == 3
    assert all(re.fullmatch(r"\.step3\.[0-9a-f]{16}\.tmp", name) for name in names)


def test_a_tokenizer_that_cannot_be_read(run, tmp_path):
    """One line that names it, whatever it is."""
    fifo, missing = tmp_path / "fifo.json", tmp_path / "missing.json"
    os.mkfifo(fifo)
    for path, words in ((fifo, "not a regular file"), (missing, "No such file"), (Path("/dev/zero"), "not a regular")):
        (saver,) = Trainee(steps=3).savers(run, tokenizer=path)
        saver.save(3, COUNTERS)
        saver.wait()
        assert saver.failure.startswith(f"{run / 'step3'} could not be saved, earlier checkpoints are whole: ")
        assert str(path) in saver.failure
        assert words in saver.failure
    assert saved_steps(run) == [1, 2]
    assert temporaries(run) == []


# Killed processes


class Killed(BaseException):
    """The process ends here."""


class File:
    """A file that is open for writing; the saboteur watches its writes."""

    def __init__(self, file, saboteur):
        self.file, self.fileno, self.flush = file, file.fileno, file.flush
        self.write = saboteur.watched("write", file.write, lambda data: file.write(data[: len(data) // 2]))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


class Saboteur:
    """Counts the calls that change the disk, and lets the n-th fail: before it acts, half-way, or after it.

    A killed process makes no further calls: all threads fail at every call until the patches are undone.
    """

    def __init__(self, patch, n=None, how="before", killed=True, barrier=None):
        self.n, self.how, self.killed, self.barrier = n, how, killed, barrier
        self.calls, self.dead, self.seen, self.lock = 0, False, set(), Lock()
        patch.setattr(Path, "open", self.opened(Path.open))
        patch.setattr(files, "open", self.opened(open), raising=False)  # of atomic_write
        patch.setattr(os, "fsync", self.watched("fsync", lambda descriptor: None))  # faster: nobody cuts the power here
        for owner, name in ((Path, "mkdir"), (Path, "rename"), (os, "unlink"), (os, "rmdir")):
            patch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def opened(self, call):
        def opened(path, mode="r", *args, **kwargs):
            if "r" in mode:
                return call(path, mode, *args, **kwargs)
            return File(self.watched("open", call)(path, mode, *args, **kwargs), self)

        return opened

    def watched(self, name, call, half=lambda *_: None):
        def watched(*args, **kwargs):
            if self.dead:
                raise Killed
            self.seen.add(name)
            with self.lock:  # or two ranks could count past n before either compares
                self.calls += 1
                number = self.calls
            if number != self.n:
                return call(*args, **kwargs)
            if self.how == "after":
                with suppress(FileNotFoundError):  # atomic_write unlinks a temporary file that may be gone
                    call(*args, **kwargs)
            elif self.how == "half":
                half(*args)
            if not self.killed:
                named = args[:1] if name not in ("write", "fsync") else ()  # as the real calls
                raise OSError(errno.ENOSPC, "No space left on device", *map(str, named))
            self.dead = True
            if self.barrier:
                self.barrier.abort()
            raise Killed

        return watched


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(manifests, "ThreadPoolExecutor", partial(ThreadPoolExecutor, 1))
    printed = []
    monkeypatch.setattr(Dist, "print", lambda dist, line: printed.append(line) if dist.is_main else None)
    return printed


@pytest.mark.parametrize("trials", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_any_call(saved, tmp_path, quick, trials):
    """After a restart the newest reported checkpoint, or a newer one, has the right bits; all visible checkpoints are
    valid; and no leftover stays."""
    tokenizer, rng = saved.parent / "tokenizer.json", random.Random(trials)
    # A run that fell back to step 1 saves step 2 again; then it saves step 3 twice.
    saves = [(step, Trainee(steps=n, seed=n)) for step, n in ((2, 2), (3, 3), (3, 4))]
    bits = {1: [Trainee(steps=1).bits()], 2: [Trainee(steps=2).bits()], 3: []}
    lengths, seen = {}, set()
    for trial in range(trials):
        world, keep = rng.choice([1, 2]), rng.choice([1, 2])
        calls = lengths.get((world, keep))
        n, how = rng.randint(1, calls) if calls else None, rng.choice(["before", "half", "after"])
        run = shutil.copytree(saved, tmp_path / f"{trial}")
        sound = {step: list(allowed) for step, allowed in bits.items()}
        quick.clear()
        reported = 2
        with pytest.MonkeyPatch.context() as patch:
            savers = [trainee.savers(run, world, tokenizer=tokenizer, keep_state=keep) for _, trainee in saves]
            saboteur = Saboteur(patch, n, how)
            with suppress(Killed, BrokenBarrierError):
                for (step, trainee), group in zip(saves, savers):
                    saboteur.barrier = getattr(group[0].dist, "meeting", None)
                    sound[step].append(trainee.bits())
                    for saver in group:
                        saver.save(step, COUNTERS)
                    for saver in group:
                        saver.wait()
                    if f"saved {run / f'step{step}'}" in quick:
                        quick.clear()
                        sound[step], reported = sound[step][-1:], max(reported, step)
                    for saver in group:
                        saver.finish()
            assert saboteur.dead == (n is not None)
        seen |= saboteur.seen
        if n is None:  # the first trial of its kind is not killed: it counts the calls
            lengths[world, keep] = saboteur.calls
            assert saboteur.calls > 60
        assert all(verify_checkpoint(run / f"step{step}") == [] for step in set(saved_steps(run)) - {1, 2}), (
            trial,
            n,
            how,
        )
        clean_up(run)
        assert temporaries(run) == [], (trial, n, how)
        assert all(verify_checkpoint(run / f"step{step}") == [] for step in saved_steps(run)), (trial, n, how)
        newest = latest_valid_step(run, Dist())
        assert newest >= reported, (trial, n, how)
        assert restored(run / f"step{newest}") in sound[newest], (trial, n, how)
        shutil.rmtree(run)
    assert seen == {"open", "write", "fsync", "mkdir", "rename", "unlink", "rmdir"}


@pytest.mark.parametrize(
    ("step", "world"),
    [pytest.param(2, 1, marks=pytest.mark.slow), (3, 2)],
    ids=["saved again", "new step of two ranks"],
)
def test_an_error_at_any_call(saved, tmp_path, quick, step, world):
    """All ranks fail with the same line, unless the call only cleans up; the earlier checkpoints stay."""
    tokenizer, newer, failures = saved.parent / "tokenizer.json", Trainee(steps=6, seed=4), 0
    sound = [Trainee(steps=2).bits(), newer.bits()]
    for n in range(1, 200):
        run = shutil.copytree(saved, tmp_path / f"{n}")
        with pytest.MonkeyPatch.context() as patch:
            savers = newer.savers(run, world, tokenizer=tokenizer, keep_state=1)
            saboteur = Saboteur(patch, n, "half", killed=False)
            for saver in savers:
                saver.save(step, COUNTERS)
            for saver in savers:
                saver.wait()
        lines = {saver.failure for saver in savers}
        assert len(lines) == 1, n
        if line := lines.pop():
            failures += 1
            assert str(run / f"step{step}") in line
            assert re.search(rf"No space left on device \({run}.*\)$", line), n
            assert ("is saved" in line) == (f"saved {run / f'step{step}'}" in quick)
            assert "is saved" in line or not list(run.glob(".step3.*.tmp"))
        assert {1, 2} <= set(saved_steps(run)) <= {1, 2, step}, n
        clean_up(run)
        assert temporaries(run) == [], n
        assert all(verify_checkpoint(run / f"step{s}") == [] for s in saved_steps(run)), n
        assert restored(run / f"step{latest_valid_step(run, Dist())}") in sound[not line and 1 :], n
        shutil.rmtree(run)
        quick.clear()
        if saboteur.calls < n:
            break
    assert not line
    assert failures > 30


# Several processes

RANKS = """
import json, os, sys, zlib
sys.path[:0] = sys.argv[1:3]
from pathlib import Path
import torch
import torch.distributed as torch_dist
from trainee import MICRO, make_optimizer
from checkpoints import manifest, resume, save
from runtime.errors import UserError
from model import Pythia
from model.huggingface import Export
from parallel.fsdp import local, local_rows, shard_weights
from runtime.ranks import init_dist

run, what = Path(sys.argv[3]), sys.argv[4]
dist = init_dist()


def values(name, step):
    # the whole weight and moments of a parameter: arbitrary, but the same in every process
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    return [torch.randn(shapes[name], generator=generator) for _ in range(3)]


def trainee(shard, step=None):
    with torch.device("meta"):
        model = Pythia(MICRO)
    shard_weights(model, shard, dist, torch.float32)
    model.to_empty(device="cpu")
    optimizer = make_optimizer(model, 1e-3)
    if step is not None:
        fill(model, optimizer, step)
    return model, optimizer


@torch.no_grad()
def fill(model, optimizer, step):
    for name, p in model.named_parameters():
        optimizer.state[p].update(step=torch.tensor(float(step)), exp_avg=torch.empty_like(p))
        optimizer.state[p]["exp_avg_sq"] = torch.empty_like(p)
        held = (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])
        for tensor, value in zip(held, values(name, step)):
            local(tensor).copy_(value[local_rows(p)])


def check(model, optimizer, step):
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        for tensor, value in zip((p, state["exp_avg"], state["exp_avg_sq"]), values(name, step)):
            assert torch.equal(local(tensor), value[local_rows(p)]), name
        assert state["step"].item() == step


shapes = {name: p.shape for name, p in Pythia(MICRO).named_parameters()}
if what == "save":
    for step, shard in ((1, "full"), (2, "none")):
        model, optimizer = trainee(shard, step)
        saver = save.Saver(run, model, optimizer, dist, Export(torch.float16))
        saver.save(step, {"updates": step})
        saver.wait_for_snapshot()
        fill(model, optimizer, 99)  # training continues
        saver.finish()
    # The disk of one rank is full.
    original = save.write_tensors
    def full(path, *args):
        if dist.rank == 1:
            raise OSError(28, "No space left on device")
        return original(path, *args)
    save.write_tensors = full
    saver.save(3, {})
    try:
        saver.finish()
        raise SystemExit("saved on a full disk")
    except UserError as error:
        lines = set(dist.all_gather_str(str(error)))
        assert len(lines) == 1 and "step3" in str(error) and "rank 1: No space left" in str(error), lines
    save.write_tensors = original
    assert sorted(path.name for path in run.iterdir()) == ["step1", "step2"]
else:
    assert resume.latest_valid_step(run, dist) == 2
for step in (1, 2):
    for shard in ("full", "none"):
        model, optimizer = trainee(shard)
        assert resume.restore(run / f"step{step}", model, optimizer, dist) == {"updates": step}
        check(model, optimizer, step)
# Only one rank hashes the damaged file, but all ranks learn of it.
if what != "save":
    part = run / "step2" / f"state/part-00002-of-00003.safetensors"
    if dist.is_main:
        part.write_bytes(part.read_bytes()[:-1] + b"x")
    dist.barrier()
    assert resume.latest_valid_step(run, dist) == 1
    try:
        resume.restore(run / "step2", model, optimizer, dist)
        raise SystemExit("a damaged part was loaded")
    except UserError as error:
        assert str(part) in str(error)
    check(model, optimizer, 2)
if torch_dist.is_initialized():
    torch_dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_ranks_write_and_read_side_by_side(tmp_path, world):
    """Three ranks save, sharded or not. They, and fewer ranks, restore every bit, sharded or not."""
    (tmp_path / "ranks.py").write_text(RANKS)
    for n, what in ((3, "save"), (world, "restore")):
        line = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node", n]
        line += [tmp_path / "ranks.py", ROOT, Path(__file__).parent, tmp_path / "run", what]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=120, env=environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("saved") == (2 if what == "save" else 0)
        assert ("going back to step 1" in done.stdout) == (what == "restore")
    files = sorted(path.name for path in (tmp_path / "run" / "step1" / "state").iterdir())
    assert files == ["counters.json", *(f"part-0000{i}-of-00003.safetensors" for i in (1, 2, 3))]
    for i in (1, 2, 3):  # no part holds all rows
        held = load_file(tmp_path / "run" / "step1" / "state" / f"part-0000{i}-of-00003.safetensors")["weight/embed"]
        assert len(held) in (12, 14)


# What it costs

MEMORY = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from model import SIZES, Pythia, huggingface
from runtime.ranks import Dist
from checkpoints.save import Saver
from step import make_optimizer

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

def measured(name, call):
    def wrapped(*args):
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = status("VmRSS")
        result = call(*args)
        print(name, status("VmHWM") - before)
        return result
    return wrapped

torch.set_num_threads(1)
model = Pythia(replace(SIZES["31m"], layers=2), seed=0)
optimizer = make_optimizer(model, 1e-3)
saver = Saver(Path(sys.argv[1]), model, optimizer, Dist(), huggingface.Export(torch.float32))
saver._write_part = measured("state", saver._write_part)
saver._write_model = measured("model", saver._write_model)
saver.save(0, {})
saver.finish()
measured("export", huggingface.save)(model, Path(sys.argv[1]) / "export", torch.float16)
"""


def test_the_order_of_copies_and_waits_on_a_gpu(streams, tmp_path, monkeypatch):
    """Weights are copied after the update that made them, and the next update waits until they are copied."""
    (saver,) = Trainee(steps=1).savers(tmp_path)
    saver.stream = torch.cuda.Stream()
    monkeypatch.setattr(saver, "_pin", lambda memory: streams.append(("pin",)))
    copy = torch.Tensor.copy_

    def logged(self, source, non_blocking=False):
        if non_blocking:
            streams.append(("copy", torch.cuda.current_stream().name))
        return copy(self, source)

    monkeypatch.setattr(torch.Tensor, "copy_", logged)
    saver.save(1, COUNTERS)
    saver.wait_for_snapshot()
    saver.finish()
    asked = list(dict.fromkeys(streams))  # each kind once, in the order of the first
    assert asked.index(("wait", "copies", "main")) == 0
    assert asked.index(("pin",)) == 1
    assert asked.index(("copy", "copies")) == 2
    assert {*asked[3:]} == {("wait", "main", "copies"), ("synchronize", "copies")}
    last_copy = len(streams) - 1 - streams[::-1].index(("copy", "copies"))
    assert streams.index(("wait", "main", "copies")) > last_copy  # the host queues the wait behind all copies
    assert streams.index(("synchronize", "copies")) > last_copy  # before the file is written


@pytest.mark.parametrize("refused", [False, True])
def test_page_locking(refused, tmp_path, monkeypatch, capfd):
    """Memory that is page-locked is released with its saver. A system that refuses it does not stop a run."""
    calls = []
    cudart = SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: calls.append(("lock", address, size)) or 2 * refused,
        cudaHostUnregister=lambda address: calls.append(("unlock", address)),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    (saver,), memory = Trainee().savers(tmp_path), torch.empty(1000)
    saver._pin(memory)
    del saver
    assert calls[0] == ("lock", memory.data_ptr(), 4000)
    assert calls[1:] == ([] if refused else [("unlock", memory.data_ptr())])
    assert ("rank 0 cannot page-lock 0.00 GB" in capfd.readouterr().out) == refused


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads memory from Linux's /proc")
def test_memory(tmp_path):
    """Files are written piece by piece: no whole tensor is copied."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, tmp_path / "run"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    taken = dict(line.split() for line in done.stdout.splitlines() if not line.startswith("saved"))
    tensor = 4 * 50304 * 256
    assert (tmp_path / "run/step0" / MODEL).stat().st_size > 2 * tensor
    assert int(taken["state"]) < tensor / 4
    assert tensors.CHUNK_BYTES < int(taken["model"]) < tensor / 4  # float32 needs no cast
    assert tensor / 2 < int(taken["export"]) < 1.2 * tensor  # float16: a tensor and the previous one


MANY_SAVES = """
import shutil, sys
from pathlib import Path
import torch
from trainee import COUNTERS, TINY, Trainee

run = Path(sys.argv[1])
trainee, resumed = Trainee(TINY, steps=1), Trainee(TINY)
(saver,) = trainee.savers(run)
for cycle in range(200):
    saver.save(cycle, COUNTERS)
    saver.finish()
    resumed.restore(run / f"step{cycle}")
    shutil.rmtree(run / f"step{cycle - 1}", ignore_errors=True)
    if cycle in (40, 199):
        resident = Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]
        print("taken", resident, len(list(Path("/proc/self/fd").iterdir())))
"""


@pytest.mark.slow
def test_many_saves_leak_nothing(tmp_path):
    """In its own process, because memory that other tests freed would blur the count."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{ROOT}"}
    line = [sys.executable, "-c", MANY_SAVES, tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    early, late = re.findall(r"taken (\d+) (\d+)", done.stdout)
    assert int(late[0]) < 1.01 * int(early[0])  # kilobytes
    assert late[1] == early[1]  # open files
