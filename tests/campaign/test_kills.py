"""100 SIGKILLs at random moments, half of them while a checkpoint is written: of one process, and of one or two of two
ranks. No checkpoint that was reported as saved is lost, none is partial, and the same command ends with the bits of a
run that was never disturbed.
"""

import random
import re
import shutil
from pathlib import Path

import pytest
from harness import GOOD, Tally, Trainer, error_line, kill, scaled, shared_server
from test_faults import SLOW_DISK, START, assert_same, assert_whole, checkpoints

KILLS = 100
STEPS = 20
FLAGS = ["--size", "14m", "--steps", STEPS, "--batch-size", 4, "--seq-len", 32, "--lr", 1e-2]


class Campaign:
    """Runs that are killed and continued until they end."""

    def __init__(self, corpus: Path, folder: Path, fault: str = ""):
        self.corpus, self.folder, self.fault, self.logs = corpus, folder, fault, 0

    def start(self, run: str, ranks: int, fault: str, keep: int) -> Trainer:
        self.logs += 1
        logs = self.folder / f"log{self.logs}"
        logs.mkdir()
        flags = [*FLAGS, "--data", self.corpus, "--out", self.folder / run, "--keep-state", keep]
        return Trainer(shared_server(), flags, self.folder / run, logs, fault, ranks)

    def undisturbed(self, ranks: int) -> Path:
        trainer = self.start(f"undisturbed-{ranks}", ranks, "", STEPS + 1)
        assert trainer.end() == 0, trainer.output
        return trainer.run

    def play(self, kills: int, ranks: int, seed: int, part: str) -> Tally:
        rng, expected, run, reported, tally = random.Random(seed), self.undisturbed(ranks), 0, {0}, Tally(part)
        killed = False
        while killed or tally.counts.total() < kills:  # the last run also continues until it ends
            before = checkpoints(self.folder / f"killed-{run}")
            more = tally.counts.total() < kills
            trainer = self.start(f"killed-{run}", ranks, (SLOW_DISK if more else "") + self.fault, 2)
            victims = rng.choice([trainer.process.pids, rng.sample(trainer.process.pids, 1)])
            killed = more and kill(trainer, tally.counts.total() % 2 == 0, rng, victims)
            if killed:
                found, why = self.judge(trainer, before, reported, expected)
                tally.add(found, why)
                killed = found in GOOD
            else:
                try:
                    assert_same(trainer, expected)
                except AssertionError as error:
                    tally.add("lost", f"the same command: {str(error)[-300:]!r}")
            if not killed:
                run, reported = run + 1, {0}
            shutil.rmtree(trainer.logs)
        return tally

    def judge(self, trainer: Trainer, before: list[int], reported: set[int], expected: Path) -> tuple[str, str]:
        """The outcome of a kill. `reported` are the checkpoints that were reported as saved; new ones are added."""
        output = trainer.output
        reported |= {int(step) for step in re.findall(r"saved \S+/step(\d+)\n", output)}
        if trainer.hangs:
            return "hangs", repr(output[-300:])
        if "Traceback" in output:
            return "tracebacks", repr(output[-700:])
        if (started := re.search(START, output)) and int(started[1]) != max(before, default=0):
            return "lost", f"resumed from step {started[1]} of {before}"
        if missing := reported - {0} - set(checkpoints(trainer.run)):
            return "lost", f"steps {missing}"
        try:
            assert_whole(trainer.run, expected)
        except (AssertionError, OSError) as error:
            return "wrong", str(error)[:300]
        if re.search("^error: ", output, re.MULTILINE) and not error_line(output):
            return "wrong", repr(output[-300:])
        return "harmless", ""


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kills", [2, pytest.param(scaled(KILLS // 2), marks=pytest.mark.slow)])
def test_kills(kills, ranks, corpus, tmp_path):
    Campaign(corpus, tmp_path).play(kills, ranks, ranks, f"kills, {ranks} process{'es' * (ranks > 1)}").check()


def test_a_save_that_is_not_atomic_is_caught(corpus, tmp_path):
    """A checkpoint gets its name before all of its files are there."""
    fault = """
import shutil
def copy_slowly(source, target, rename=os.rename):
    if not os.path.isdir(source):
        return rename(source, target)
    def copy(*paths):
        time.sleep(0.3)
        shutil.copy2(*paths)
    os.makedirs(target)
    shutil.copy2(os.path.join(source, "manifest.json"), target)
    shutil.copytree(source, target, copy_function=copy, dirs_exist_ok=True)
    shutil.rmtree(source)
os.rename = copy_slowly
"""
    tally = Campaign(corpus, tmp_path, fault).play(3, 1, 5, "broken")
    assert tally.counts["wrong"] + tally.counts["lost"] > 0
