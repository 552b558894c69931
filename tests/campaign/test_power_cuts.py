"""60 power cuts. The trainer writes on ext4, on a disk that may lose everything that it was not told to flush.

After each cut the file system recovers by its journal, every checkpoint that was reported as saved is there and whole,
and the same command resumes from the newest one and ends with the bits of a run that was never disturbed.
"""

import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from harness import Tally, Trainer, folder_in_memory, kill, scaled, shared_server
from test_faults import SLOW_DISK, START, assert_same, assert_whole, checkpoints
from test_kills import FLAGS, STEPS

CUTS = 60
SIZE, BLOCK = 48 * 2**20, 4096  # bytes
OPTIONS = ["defaults", "noauto_da_alloc", "noauto_da_alloc,commit=1", "noauto_da_alloc,data=writeback"]
MODES = [
    "flushed",
    "written",
    "mixed",
]  # what the disk still has: what was flushed, all, or that and a part of the rest


def command(*words: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout.strip()


class Disk:
    """A mounted ext4 on two loop devices, one on the other: image file <- outer <- inner <- ext4.

    The inner device writes to the page cache of the outer one. Only when ext4 tells the inner device to flush (in
    fsync, or when it commits its journal), the kernel writes these pages to the image. So the image holds what was
    flushed, and the outer device holds all that was written: a disk with its cache.
    """

    def __init__(self, image: Path, folder: Path, options: str = "defaults"):
        self.image, self.folder, self.devices, self.mounted = image, folder, [], False
        folder.mkdir(exist_ok=True)
        try:
            for backing in (image, None):
                self.devices.append(command("losetup", "--find", "--show", backing or self.devices[0]))
            command("mount", "-t", "ext4", "-o", options, self.devices[1], folder)
            self.mounted = True
        except OSError:
            self.close()
            raise

    def _traffic(self) -> list[int]:
        """The counters of the inner device: requests that are done, by kind, and requests on their way."""
        return [*map(int, Path(f"/sys/block/{Path(self.devices[1]).name}/stat").read_text().split())]

    def cut_power(self, mode: str, rng: random.Random) -> bytes:
        """What is on the disk after a power cut at this moment. Nothing may write to files meanwhile."""
        while True:
            before = self._traffic()
            written = Path(self.devices[0]).read_bytes()
            flushed = self.image.read_bytes()
            if before == self._traffic() and not before[8]:  # else ext4 wrote something while we read
                break
        if mode == "written":
            return written
        if mode == "flushed":
            return flushed
        a, b = (np.frombuffer(content, np.uint8).reshape(-1, BLOCK) for content in (flushed, written))
        survives = np.random.default_rng(rng.randrange(2**32)).random(len(a)) < rng.random()
        return np.where(survives[:, None], b, a).tobytes()

    def close(self) -> None:
        if self.mounted:
            command("umount", self.folder)
        for device in reversed(self.devices):
            command("losetup", "--detach", device)
        self.mounted, self.devices = False, []


class Computer:
    """A disk that survives power cuts, and the trainer on it."""

    def __init__(self, corpus: Path, folder: Path, fault: str = ""):
        self.folder, self.mount, self.fault, self.logs = folder, folder / "disk", fault, 0
        self.image, self.blank, self.disk = folder / "image", folder / "blank", None
        with self.blank.open("wb") as file:
            file.truncate(SIZE)
        command("mkfs.ext4", "-q", "-b", BLOCK, "-E", "lazy_itable_init=0,lazy_journal_init=0", self.blank)
        shutil.copy(self.blank, self.image)
        self.start_up("defaults")
        for file in corpus.parent.glob(f"{corpus.name}.*"):
            if file.is_file():
                shutil.copy(file, self.mount)
        self.shut_down()
        shutil.copy(self.image, self.blank)
        self.data = self.mount / corpus.name

    def start_up(self, options: str) -> None:
        self.disk = Disk(self.image, self.mount, options)

    def shut_down(self) -> None:
        if self.disk:
            self.disk.close()
        self.disk = None

    def cut_power(self, mode: str, rng: random.Random) -> None:
        content = self.disk.cut_power(mode, rng)
        self.shut_down()
        self.image.write_bytes(content)

    def train(self, fault: str, keep: int = 2) -> Trainer:
        self.logs += 1
        logs = self.folder / f"log{self.logs}"
        logs.mkdir()
        flags = [*FLAGS, "--data", self.data, "--out", self.mount / "run", "--keep-state", keep]
        return Trainer(shared_server(), flags, self.mount / "run", logs, fault + self.fault)

    def play(self, cuts: int, seed: int, part: str) -> Tally:
        """Cut the power again and again. The start after a cut shows what the cut has done."""
        expected, rng, tally = self.undisturbed(), random.Random(seed), Tally(part)
        reported, cut = {0}, ""
        shutil.copy(self.blank, self.image)
        while tally.counts.total() < cuts:
            self.start_up(rng.choice(OPTIONS))
            found, why, killed = *self.judge_disk(reported, expected), False
            if found == "harmless":
                trainer = self.train(SLOW_DISK)
                if tally.counts.total() + bool(cut) < cuts:
                    killed = kill(trainer, rng.random() < 0.7, rng)
                found, why = self.judge(trainer, reported, expected, killed)
            if cut:
                tally.add(found, f"{cut}: {why}")
            if killed and found == "harmless":
                mode = MODES[tally.counts.total() % 3]
                self.cut_power(mode, rng)
                cut = f"cut {tally.counts.total() + 1}, {mode}, reported {max(reported)}"
            else:
                self.shut_down()
                shutil.copy(self.blank, self.image)
                reported, cut = {0}, ""
        return tally

    def undisturbed(self) -> Path:
        self.start_up("defaults")
        trainer = self.train("", STEPS + 1)
        assert trainer.end() == 0, trainer.output
        expected = Path(shutil.copytree(trainer.run, self.folder / "undisturbed"))
        self.shut_down()
        return expected

    def judge_disk(self, reported: set[int], expected: Path) -> tuple[str, str]:
        """The outcome of a cut, by the files on the disk."""
        run = self.mount / "run"
        if missing := reported - {0} - set(checkpoints(run)):
            return "lost", f"steps {missing}"
        try:
            assert_whole(run, expected)
        except (AssertionError, OSError, ValueError, LookupError) as error:
            return "lost", f"a checkpoint is damaged: {str(error)[:300]}"
        return "harmless", ""

    def judge(self, trainer: Trainer, reported: set[int], expected: Path, killed: bool) -> tuple[str, str]:
        """The outcome of the cut before this start. New checkpoints are added to `reported`."""
        trainer.end()
        output = trainer.output
        if "Traceback" in output:
            return "tracebacks", repr(output[-700:])
        if error := re.search("^error: .*", output, re.MULTILINE):
            return "lost", f"the same command does not resume: {error[0]}"
        if (started := re.search(START, output)) and int(started[1]) < max(reported):
            return "lost", f"resumed from step {started[1]}, not {max(reported)}"
        reported |= {int(step) for step in re.findall(r"saved \S+/step(\d+)\n", output)}
        try:
            if not killed:
                assert_same(trainer, expected)
        except AssertionError as error:
            return "wrong", str(error)[:300]
        return "harmless", ""


@pytest.fixture
def computer(corpus) -> Iterator[Computer]:
    with folder_in_memory() as folder:
        try:
            computer = Computer(corpus, folder)
        except OSError as error:
            pytest.skip(f"needs root, loop devices and mkfs.ext4: {error}")
        yield computer
        computer.shut_down()


@pytest.mark.parametrize("cuts", [3, pytest.param(scaled(CUTS), marks=pytest.mark.slow)])
def test_power_cuts(cuts, computer):
    computer.play(cuts, 1, "power cuts").check()


# The harness finds what it is meant to find.


def test_the_disk_loses_what_was_not_flushed(computer):
    """A file that was flushed survives in every mode; one that was not is empty or absent, unless all was written."""
    for mode in MODES:
        shutil.copy(computer.blank, computer.image)
        computer.start_up("noauto_da_alloc")
        for name in ("flushed", "not flushed"):
            with (computer.mount / name).open("wb") as file:
                file.write(b"x" * 100_000)
                if name == "flushed":
                    file.flush()
                    os.fsync(file.fileno())
        computer.cut_power(mode, random.Random(1))
        computer.start_up("defaults")
        assert (computer.mount / "flushed").read_bytes() == b"x" * 100_000
        lost = computer.mount / "not flushed"
        assert not lost.exists() or lost.read_bytes() != b"x" * 100_000
        computer.shut_down()


def test_a_trainer_that_does_not_flush_is_caught(computer):
    computer.fault = "os.fsync = lambda descriptor: None\n"
    tally = computer.play(4, 2, "broken")
    assert tally.counts["lost"] + tally.counts["tracebacks"] + tally.counts["wrong"] > 0
