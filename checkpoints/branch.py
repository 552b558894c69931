"""A branch: a run of its own that starts from the weights, moments and counters of another run's checkpoint.

The settings of the parent are the defaults of the branch. Size, seed, rows and data cannot change: step t of the branch
would not see the rows of step t of its parent. Edits can: they change single tokens of these rows.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from checkpoints.manifest import read_checkpoint
from runtime.errors import UserError
from runtime.manifests import MANIFEST
from runtime.run_directory import flag, read_run

SAME = ("size", "seed", "batch_size", "seq_len")  # settings that a branch has in common with its parent
OWN = ("branch", "init_from", "data", "edits")  # not compared by name: files may be at another place


@dataclass(frozen=True)
class Parent:
    """The checkpoint that a branch starts from."""

    directory: Path
    step: int
    settings: dict  # those that decide the weights, the path of the data, and the micro-batch
    data: dict  # fingerprint of the data

    def record(self) -> dict:
        """What run.json of the branch says about its parent."""
        sha256 = hashlib.sha256((self.directory / MANIFEST).read_bytes()).hexdigest()
        origin = {"checkpoint": str(self.directory), "step": self.step, "manifest_sha256": sha256}
        return origin | {"settings": self.settings, "data": self.data}

    def differences(self, settings: dict) -> list[str]:
        """One phrase for each setting of the branch that the parent has otherwise. Raises UserError for one of SAME."""
        found = []
        for name, here in settings.items():
            there = self.settings.get(name, here)
            if there != here and name in SAME:
                raise UserError(
                    f"{flag(name)} {here}: {self.directory} has {there}, which a branch keeps; leave out {flag(name)}"
                )
            if there != here and name not in OWN:
                found.append(f"{flag(name)} ({there} there, {here} here)")
        return found


def read_parent(directory: Path) -> Parent:
    """The parent of a branch, from the manifest of its checkpoint. Raises UserError."""
    manifest = read_checkpoint(directory)
    record = manifest.get("run")
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in ("settings", "data")):
        raise UserError(
            f"--branch {directory}: its manifest does not say how it was trained: give a checkpoint of a run"
        )
    return Parent(directory, manifest["step"], record["settings"], record["data"])


def inherited_settings(branch: str, out: str) -> dict:
    """The settings that a branch takes from its parent; if the branch `out` has started, those it has recorded.

    Raises UserError.
    """
    if (Path(out) / "run.json").exists():
        recorded = read_run(Path(out))["settings"]
        if recorded.get("branch") == branch:
            return recorded
    return read_parent(Path(branch)).settings | {"nudge": 0}
