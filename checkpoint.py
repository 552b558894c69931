"""What a checkpoint is on disk: verified before it is trusted, read on any number of ranks, never pickled.

    RUN/stepN/   config.json, model.safetensors, tokenizer.json    opens in transformers as it is
                 state/           what resuming needs; kept for the newest steps
                   part-0000R-of-0000W.safetensors    float32 weights and Adam's moments: the rows that one of W ranks
                                                      wrote; its metadata says which, "weight/embed": "0:96 of 384"
                   counters.json
                 manifest.json    a checksum for every file and tensor, and for itself; written last

A checkpoint is written (saving.py) under a temporary name, flushed to disk, and renamed: a directory called stepN is
complete. What happens to it afterwards is seen by its checksums.

    python checkpoint.py verify RUN        re-hash every checkpoint, name each bad file
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from errors import Parser, UserError, run_command
from model import Pythia
from parallel import Ranks, local, local_rows

FORMAT = 2
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's first and second moment
PIECE = 2**22  # bytes that are read, or written, at a time
MOST_HEADER = 10**8  # bytes of the header of a safetensors file, as the library has it
COUNTERS = "state/counters.json"


def is_published_step(step: int, last: int) -> bool:
    """Whether Pythia publishes this step: 0, the powers of two to 512, every thousand, the last. 154 of 143,000."""
    return step in (0, last) or step % 1000 == 0 or (step <= 512 and step.bit_count() == 1)


# What a damaged or hostile file can make of reading it: json nests too deep, offsets overflow, entries are no dicts.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


# The manifest


def write_manifest(directory: Path, manifest: dict) -> None:
    """Put a manifest, all but its own checksum, in the place of the one that may be there."""
    temporary = directory / ".manifest.json.tmp"
    temporary.write_bytes(_text(manifest))
    flush(temporary)
    temporary.rename(directory / "manifest.json")
    flush(directory)


def _text(manifest: dict) -> bytes:
    """A manifest as it is written. It ends with the sha256 of what it says, so that a flipped bit in it is seen too."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def _read_manifest(directory: Path) -> dict:
    path = directory / "manifest.json"
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if manifest["format"] == 1:
            raise UserError(f"{path} is of format 1, which is not read any more: start anew, in another directory")
        if text != _text(manifest):
            raise ValueError("it is not as it was written")
        if manifest["format"] != FORMAT or f"step{manifest['step']}" != directory.resolve().name:
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        for name, entry in manifest["files"].items():
            tensors = entry.get("tensors", {})
            sound = isinstance(entry["bytes"], int) and isinstance(tensors, dict)
            inside = ".." not in Path(name).parts and not Path(name).is_absolute()
            if not sound or not inside or not "".join([name, *tensors]).isprintable():
                raise ValueError(f"bad entry {name[:100]!r}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return manifest


def flush(path: Path) -> None:
    """Have the operating system put a file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Which checkpoints there are


def saved_steps(run: Path) -> list[int]:
    """The steps of all checkpoints of a run that were completed, ascending."""
    names = (path.parent.name.removeprefix("step") for path in run.glob("step*/manifest.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def steps_with_state(run: Path) -> list[int]:
    """The steps a run could be resumed from, ascending: also those of which it can not be told because the manifest is
    damaged."""
    return [step for step in saved_steps(run) if _has_state(run / f"step{step}", if_damaged=True)]


def _has_state(directory: Path, if_damaged: bool) -> bool:
    try:
        return COUNTERS in _read_manifest(directory)["files"]
    except UserError:
        return if_damaged and (directory / "state").is_dir()


def drop_old_state(run: Path, newest: int, keep: int) -> None:
    """Drop the state of all but the `keep` newest checkpoints up to step `newest`.

    Later ones are of a future that was given up when the run went back behind a damaged checkpoint. Neither they nor
    those of a damaged manifest may push out a whole one.
    """
    steps = [step for step in saved_steps(run) if step <= newest and _has_state(run / f"step{step}", if_damaged=False)]
    for step in steps[:-keep]:
        drop_state(run / f"step{step}")


def drop_state(directory: Path) -> None:
    """Remove the resumable state of a checkpoint, not its model. The manifest changes first: it is always whole."""
    manifest = _read_manifest(directory)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("state/")}
    write_manifest(directory, manifest)
    if (directory / "state").is_dir():
        shutil.rmtree(directory / "state")


def clean_up(run: Path) -> None:
    """Remove what a save that was killed has left behind. Raises UserError when it can not be removed."""
    try:
        for old in run.glob(".step*.old.tmp"):  # killed between the two renames of a step that was saved again
            if not (final := run / old.name[1:].removesuffix(".old.tmp")).exists():
                old.rename(final)
        for leftover in run.glob(".step*.tmp"):
            shutil.rmtree(leftover)
        for leftover in run.glob("step*/.manifest.json.tmp"):
            leftover.unlink()
        for step in sorted(set(saved_steps(run)) - set(steps_with_state(run))):  # killed while dropping its state
            if (state := run / f"step{step}" / "state").is_dir():
                shutil.rmtree(state)
    except OSError as error:
        raise UserError(f"{run}: what a killed save has left behind can not be removed ({error})") from None


# Checksums


def read_header(path: Path) -> tuple[bytes, dict, dict]:
    """The header of a safetensors file: as bytes, as entries in the order of their data, and its metadata.

    Raises OSError, or another of DAMAGE when tensors do not fill the file without gap or overlap.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(f"header of {length} bytes in a file of {size}")
        file.seek(0)
        header = file.read(8 + length)
    layout = json.loads(header[8:])
    metadata = layout.pop("__metadata__", {})
    entries = dict(sorted(layout.items(), key=lambda item: item[1]["data_offsets"]))
    end = 0
    for name, entry in entries.items():
        begin, stop = entry["data_offsets"]
        if begin != end or not isinstance(stop, int) or stop < begin:
            raise ValueError(f"tensor {name[:100]!r} does not begin where the one before it ends")
        end = stop
    if len(header) + end != size:
        raise ValueError(f"tensors of {end} bytes in a file of {size}")
    return header, entries, metadata


def checksums(path: Path) -> dict:
    """The size and sha256 of a file; of a safetensors file, the sha256 of its header and of every tensor instead.

    Header and tensors together are the whole file, so every byte is covered. Raises one of DAMAGE when the file can not
    be read or has no sound header.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    header, entries, _ = read_header(path)

    def tensor_sha256(offsets: list[int]) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(len(header) + offsets[0])
            left = offsets[1] - offsets[0]
            while left > 0 and (piece := file.read(min(left, PIECE))):
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        digests = threads.map(tensor_sha256, (entry["data_offsets"] for entry in entries.values()))
        tensors = dict(zip(entries, digests))
    return {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def problems(directory: Path, ranks: Ranks = Ranks()) -> list[str]:  # noqa: B008 (immutable)
    """What is wrong with a checkpoint, a line each naming the file and tensor; empty when it is as it was saved.

    Several ranks, which must all call this, share the work and get the same answer.
    """
    try:
        files = _read_manifest(directory)["files"]
        found = [
            line for name in list(files)[ranks.rank :: ranks.world] for line in _problems(directory / name, files[name])
        ]
        there = [*directory.glob("*.safetensors*"), *(directory / "state").rglob("*")] if ranks.first else []
        unlisted = (path for path in there if path.relative_to(directory).as_posix() not in files and not path.is_dir())
        found += [
            f"{path} does not belong to the checkpoint: its manifest does not list it" for path in sorted(unlisted)
        ]
    except UserError as error:
        found = [str(error)]
    every = [line for text in ranks.texts(json.dumps(found)) for line in json.loads(text)]
    return list(dict.fromkeys(every))


def _problems(path: Path, expected: dict) -> list[str]:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return [f"{path} has {size} bytes, not {expected['bytes']}"]
        actual = checksums(path)
    except FileNotFoundError:
        return [f"{path} is missing"]
    except DAMAGE as error:
        return [f"{path} is damaged: {error}"]
    if actual == expected:
        return []
    bad = [t for t, digest in expected.get("tensors", {}).items() if actual.get("tensors", {}).get(t) != digest]
    return [f"{path} is damaged" + (f" in tensor {bad[0]}" if bad else "")]


# The parts


@dataclass(frozen=True)
class Stored:
    """Rows first .. last - 1 of a tensor of the given shape as they lie in a part, `offset` bytes behind its start."""

    path: Path
    first: int
    last: int
    offset: int
    shape: tuple[int, ...]


def state_shapes(parameters: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What the parts hold together: the shape of every weight and moment, by the name it has there."""
    return {f"{kind}/{name}": tuple(p.shape) for kind in ("weight", *MOMENTS) for name, p in parameters.items()}


def find_rows(parts: list[Path], shapes: dict[str, tuple[int, ...]]) -> dict[str, list[Stored]]:
    """Where the rows of every tensor lie in the parts, ascending.

    Raises UserError, naming file and tensor, unless the parts hold every row of every tensor once, and nothing else.
    """
    found: dict[str, list[Stored]] = {key: [] for key in shapes}
    for path in parts:
        try:
            header, entries, metadata = read_header(path)
            for key, entry in entries.items():
                if key not in shapes:
                    raise UserError(f"{path}: {key[:100]!r} does not belong to this model")
                shape, (begin, end) = shapes[key], entry["data_offsets"]
                rows = re.fullmatch(r"(\d{1,18}):(\d{1,18}) of (\d{1,18})", metadata[key], re.ASCII)
                first, last, total = map(int, rows.groups()) if rows else (0, 0, 0)
                here = (last - first, *shape[1:])
                sound = total == shape[0] and entry["dtype"] == "F32" and entry["shape"] == list(here)
                if not sound or last <= first or end - begin != 4 * math.prod(here):
                    raise UserError(f"{path}: {key} does not belong to this model, where it is {list(shape)}")
                found[key].append(Stored(path, first, last, len(header) + begin, shape))
        except DAMAGE as error:
            raise UserError(f"{path} is damaged: {error}") from None
    for key, stored in found.items():
        stored.sort(key=lambda s: s.first)
        end = 0
        for s in stored:
            if s.first != end:
                raise UserError(f"{s.path}: {key} begins with row {s.first}, where row {end} is due")
            end = s.last
        if end != shapes[key][0]:
            raise UserError(f"{parts[0].parent if parts else 'state'} lacks {key}, rows {end} to {shapes[key][0] - 1}")
    return found


def read_rows(stored: list[Stored], wanted: slice) -> Iterator[tuple[int, Tensor]]:
    """The wanted rows, in pieces: the number of the first and their values, float32 [rows, ..] on the CPU. Each piece
    takes the memory of the one before."""
    for s in stored:
        first, last, row_bytes = max(s.first, wanted.start), min(s.last, wanted.stop), 4 * math.prod(s.shape[1:])
        if first >= last:
            continue
        memory = torch.empty(min(max(PIECE // row_bytes, 1), last - first), *s.shape[1:])
        with s.path.open("rb") as file:
            file.seek(s.offset + (first - s.first) * row_bytes)
            while first < last:
                values = memory[: last - first]
                if file.readinto(values.view(torch.uint8).numpy()) < values.nbytes:
                    raise OSError(f"{s.path} is shorter than it was")
                yield first, values
                first += len(values)


# Resuming


def restorable(run: Path, ranks: Ranks) -> int | None:
    """The newest step whose checkpoint is whole, every checksum verified; None when there is none to resume from.

    Says which damaged ones it passes over. Raises UserError when there are only such. All ranks must call this: they
    share the work and get the same answer, for the list of steps is that of the first (network file systems may show
    others an older one).
    """
    steps = json.loads(ranks.texts(json.dumps(steps_with_state(run) if ranks.first else None))[0])
    damaged = []
    for step in reversed(steps):
        if not (found := problems(run / f"step{step}", ranks)):
            for line in damaged:
                ranks.print(f"{line}: going back to step {step}")
            return step
        damaged.append(found[0])
    if damaged:
        raise UserError(
            f"{damaged[0]}, and no older checkpoint of {run} is whole: put back a good copy, or choose another --out"
        )
    return None


def restore(
    directory: Path,
    model: Pythia,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks = Ranks(),  # noqa: B008 (immutable)
    verified: bool = False,
) -> dict:
    """Load weights and moments, of which every rank takes its rows, into model and optimizer. Returns the counters.

    Every checksum is verified before, unless `verified` says that restorable has done so. Raises UserError, before
    anything is changed, when a file is missing or damaged or belongs to another model. All ranks must call this.
    """
    if not verified and (found := problems(directory, ranks)):
        raise UserError(
            f"{found[0]}: can not resume from it; remove {directory} to resume from the checkpoint before it"
        )
    files = _read_manifest(directory)["files"]
    parts = [directory / name for name in files if name.startswith("state/") and name.endswith(".safetensors")]
    if not parts or COUNTERS not in files:
        raise UserError(f"{directory} lacks {COUNTERS if parts else 'state'}: its model can be used, not resumed from")
    counters = _read_counters(directory / COUNTERS)
    parameters = dict(model.named_parameters())
    stored = find_rows(parts, state_shapes(parameters))

    adam_step = float(counters.pop("adam_step"))
    optimizer.state.clear()
    with torch.no_grad():
        for name, p in parameters.items():
            targets = {"weight": p}
            if adam_step:
                targets |= {moment: torch.empty_like(p) for moment in MOMENTS}
                moments = {moment: targets[moment] for moment in MOMENTS}
                optimizer.state[p].update(step=torch.tensor(adam_step, device=p.device), **moments)
            rows = local_rows(p)
            for kind, target in targets.items():
                for first, values in read_rows(stored[f"{kind}/{name}"], rows):
                    local(target)[first - rows.start :][: len(values)].copy_(values)
    return counters


def _read_counters(path: Path) -> dict:
    try:
        counters = json.loads(path.read_bytes())
        adam_step = counters["adam_step"]
        if type(adam_step) is not int or not 0 <= adam_step <= 2**24:  # a float32 counts no further
            raise ValueError(f"adam_step is {str(adam_step)[:100]!r}")
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return counters


# The command


def verify(run: Path) -> bool:
    """Print the state of every checkpoint of a run; True when all are whole."""
    if not run.is_dir():
        raise UserError(f"{run} is not a directory")
    candidates = [run]
    if not (run / "manifest.json").exists():
        candidates = sorted(run.glob("step*"), key=lambda path: (len(path.name), path.name))
    if not candidates:
        raise UserError(f"{run} holds no checkpoints")
    bad = 0
    for directory in tqdm(candidates, unit="checkpoint", disable=None):
        found = problems(directory)
        bad += bool(found)
        tqdm.write("\n".join(f"BAD  {line}" for line in found) or f"ok   {directory}")
    print(f"{len(candidates) - bad} of {len(candidates)} checkpoints are whole")
    return not bad


def main() -> None:
    parser = Parser(description="Check the checkpoints of a run against their manifests.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="re-hash every checkpoint, name each bad file; status 1 if any is bad")
    command.add_argument("run", type=Path, help="a run directory, such as runs/pythia-14m, or one stepN in it")
    if not verify(parser.parse_args().run):
        raise SystemExit(1)


if __name__ == "__main__":
    run_command(main)
