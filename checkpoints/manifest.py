"""What a checkpoint is on disk: verified before it is loaded, readable by any number of ranks, never pickled.

    RUN/stepN/   config.json, model.safetensors, tokenizer.json    opens in transformers as it is
                 state/           what resuming needs; kept for the newest steps
                   part-0000R-of-0000W.safetensors    float32 weights and Adam moments: the rows that rank R of W wrote;
                                                      its metadata names them, "weight/embed": "0:96 of 384"
                   counters.json
                 manifest.json    a checksum of every file and tensor, and of itself; written last

save.py writes a checkpoint under a temporary name, flushes it to disk, and renames it: a directory named stepN is
complete. Checksums find any damage that happens later.
"""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from model.sizes import parse_steps
from runtime.errors import UserError
from runtime.files import READ_ERRORS, naming, reason
from runtime.manifests import checksums, read_manifest, saved_steps, write_manifest
from runtime.ranks import Dist

COUNTERS = "state/counters.json"


def read_checkpoint(directory: Path) -> dict:
    """The verified manifest of a checkpoint. Raises UserError if it is missing or damaged.

    A copy may have any name. But a directory stepN must hold step N: a run resumes at the step that the name says.
    """
    manifest, name = read_manifest(directory), directory.absolute().name
    if re.fullmatch(r"step\d+", name) and name != f"step{manifest['step']}":
        raise UserError(f"{directory} holds step {manifest['step']}: rename it to step{manifest['step']}")
    return manifest


# The checkpoints of a run


def choose_steps(text: str, present: Collection[int], lacks: str) -> list[int]:
    """The steps of --steps, ascending: "all", "final" (the last), or a list such as 0,512,1000:143000:10000.

    Raises UserError if one is not present; the message begins with `lacks`, for example "runs/a has no".
    """
    if text in ("all", "final"):
        return sorted(present) if text == "all" else [max(present)]
    try:
        steps = sorted(parse_steps(text, max(present)))
    except ValueError as error:
        raise UserError(f"--steps {text}: {error}") from None
    if missing := [step for step in steps if step not in present]:
        raise UserError(f"{lacks} step{missing[0]}" + f", one of {len(missing)} that are missing" * (len(missing) > 1))
    return steps


def steps_with_state(run: Path, count_damaged: bool = True) -> list[int]:
    """The steps a run can resume from, ascending.

    If a manifest is damaged, its state/ directory decides; with count_damaged=False that checkpoint is left out.
    """

    def has_state(directory: Path) -> bool:
        try:
            return COUNTERS in read_checkpoint(directory)["files"]
        except UserError:
            return count_damaged and os.path.isdir(directory / "state")  # noqa: PTH112 (never raises)

    return [step for step in saved_steps(run) if has_state(run / f"step{step}")]


def drop_old_state(run: Path, newest: int, keep: int) -> None:
    """Remove the state of all but the `keep` newest checkpoints up to step `newest`.

    Only valid manifests count toward `keep`. Steps after `newest` do not count and stay: the run wrote them before it
    fell back to an older checkpoint.
    """
    for step in [s for s in steps_with_state(run, count_damaged=False) if s <= newest][:-keep]:
        drop_state(run / f"step{step}")


def drop_state(directory: Path) -> None:
    """Remove the state of a checkpoint, not its model. The manifest changes first, so that it is valid at any time."""
    manifest = read_checkpoint(directory)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("state/")}
    write_manifest(directory, manifest)
    if (directory / "state").is_dir():
        with naming(directory / "state"):
            shutil.rmtree(directory / "state")


def clean_up(run: Path) -> None:
    """Remove what a killed process left unfinished in a run directory. Raises UserError if one cannot be removed."""
    try:
        for old in run.glob(".step*.old.tmp"):  # killed between the two renames of a step that was saved again
            if not (final := run / old.name[1:].removesuffix(".old.tmp")).exists():
                old.rename(final)
        for leftover in run.glob(".step*.tmp"):
            with naming(leftover):
                shutil.rmtree(leftover)
        for leftover in (*run.glob(".*.tmp"), *run.glob("step*/.*.tmp")):  # of atomic_write
            leftover.unlink()
        for step in sorted(set(saved_steps(run)) - set(steps_with_state(run))):  # killed while its state was dropped
            if (state := run / f"step{step}" / "state").is_dir():
                with naming(state):
                    shutil.rmtree(state)
    except OSError as error:
        raise UserError(
            f"{run}: cannot remove the leftovers of a killed process: {reason(error)}; remove them by hand"
        ) from None


# Verification


def verify_checkpoint(directory: Path, dist: Dist = Dist(), state: bool = True) -> list[str]:  # noqa: B008 (immutable)
    """One line for each damaged, missing or unlisted file of a checkpoint, naming file and tensor; [] if it is valid.

    state=False leaves out state/, which a copy of the model need not have.
    The ranks share the work: all must call this, and all get the same answer.
    """
    try:
        files = read_checkpoint(directory)["files"]
        errors = []
        if not state:
            files = {name: entry for name, entry in files.items() if not name.startswith("state/")}
        for name in list(files)[dist.rank :: dist.world_size]:
            errors += _verify_file(directory / name, files[name])
        if dist.is_main:
            present = [*directory.glob("*.safetensors*"), *(directory / "state").rglob("*")]
            unlisted = {p for p in present if not p.is_dir()} - {directory / name for name in files}
            errors += [
                f"{path} is not part of the checkpoint: the manifest does not list it" for path in sorted(unlisted)
            ]
    except UserError as error:
        errors = [str(error)]
    except OSError as error:  # of listing the directory
        errors = [f"{directory} cannot be read: {reason(error)}"]
    all_errors = [line for text in dist.all_gather_str(json.dumps(errors)) for line in json.loads(text)]
    return list(dict.fromkeys(all_errors))


def _verify_file(path: Path, expected: dict) -> list[str]:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return [f"{path} has {size} bytes, not {expected['bytes']}"]
        actual = checksums(path)
    except FileNotFoundError:
        return [f"{path} is missing"]
    except READ_ERRORS as error:
        return [f"{path} is damaged: {reason(error)}"]
    if actual == expected:
        return []
    bad = [t for t, digest in expected.get("tensors", {}).items() if actual.get("tensors", {}).get(t) != digest]
    return [f"{path} is damaged" + (f" in tensor {bad[0]}" if bad else "")]
