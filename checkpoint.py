"""The 154 checkpoints of a run: saved whole or not at all, verified before they are trusted, never pickled.

    RUN/stepN/   config.json, model.safetensors, tokenizer.json    opens in transformers as it is
                 state/           what resuming needs: float32 weights and Adam's moments as safetensors, counters as
                                  JSON; kept for the newest steps
                 manifest.json    a checksum for every file and tensor, written last

A checkpoint is written under a temporary name, flushed to disk, and renamed: a directory called stepN is complete.

    python checkpoint.py verify RUN        re-hash every checkpoint, name each bad file
"""

import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from errors import Parser, UserError, run_command
from model import Pythia
from model.huggingface import save as save_huggingface
from model.huggingface import shard, write_tensors
from parallel import local, local_rows, whole

FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's first and second moment


def is_published_step(step: int, last: int) -> bool:
    """Whether Pythia publishes this step: 0, the powers of two to 512, every thousand, the last. 154 of 143,000."""
    return step in (0, last) or step % 1000 == 0 or (step <= 512 and step.bit_count() == 1)


# What a damaged or hostile file can make of reading it: json nests too deep, offsets overflow, entries are no dicts.
DAMAGE = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


# Saving


def save(
    run: Path,
    step: int,
    model: Pythia,
    optimizer: torch.optim.Optimizer,
    counters: dict,
    dtype: torch.dtype,
    hidden_act: str = "gelu",
    tokenizer: Path | None = None,
    keep_state: int = 2,
    first: bool = True,
) -> Path:
    """Write RUN/stepN, then drop the resumable state of all but the `keep_state` newest checkpoints.

    dtype and hidden_act are those of the Hugging Face files; counters (JSON) is handed back by restore. When weights
    are sharded all ranks call this, and the first of them writes, one file in memory at a time. Raises UserError,
    leaving what was there untouched, when the disk is full or can not be written.
    """
    final, temporary, aside = run / f"step{step}", run / f".step{step}.tmp", run / f".step{step}.old.tmp"
    parameters = dict(model.named_parameters())
    if not first:  # lend the first rank what it fetches below, in its order
        for tensor in (*parameters.values(), *_state(parameters, optimizer).values()):
            whole(tensor.detach())
        return final
    elements = sum(p.numel() for p in parameters.values())
    needed = elements * (dtype.itemsize + 3 * 4) + 2**24  # weights twice, two moments, and the small files
    try:
        run.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(run).free) < needed:
            raise UserError(
                f"no room for {final}: it needs {needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
                f"nothing was written, make room and run the same line again"
            )
        shutil.rmtree(temporary, ignore_errors=True)
        save_huggingface(model, temporary, dtype, hidden_act, tokenizer, whole)
        _save_state(temporary / "state", parameters, optimizer, counters)
        _write_manifest(temporary, step)
        if final.exists():  # the same step saved again
            final.rename(aside)
        temporary.rename(final)
        _flush(run)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if aside.exists() and not final.exists():
            aside.rename(final)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(
            f"{final} could not be saved ({error.strerror or error}); earlier checkpoints are whole"
        ) from None
    try:
        for old in steps_with_state(run)[:-keep_state]:
            drop_state(run / f"step{old}")
    except OSError as error:
        raise UserError(f"{final} is saved, the state of an older step can not be removed ({error.strerror})") from None
    return final


def _state(parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and moments by the names that they have in the files, in the order in which they are written."""
    tensors = {f"weight/{name}": p.detach() for name, p in parameters.items()}
    for name, p in parameters.items():
        for moment in MOMENTS:
            value = optimizer.state[p].get(moment) if p in optimizer.state else None
            tensors[f"{moment}/{name}"] = torch.zeros_like(p.detach()) if value is None else value
    return tensors


def _save_state(
    directory: Path, parameters: dict[str, Tensor], optimizer: torch.optim.Optimizer, counters: dict
) -> None:
    directory.mkdir()
    tensors = _state(parameters, optimizer)
    shards = shard({name: t.numel() * t.element_size() for name, t in tensors.items()})
    for i, names in enumerate(shards):
        file = directory / f"state-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_tensors({name: whole(tensors[name]).cpu().contiguous() for name in names}, file)
    adam_steps = {int(optimizer.state[p]["step"]) for p in parameters.values() if p in optimizer.state} or {0}
    if len(adam_steps) > 1:
        raise RuntimeError(f"parameters disagree on Adam's step: {adam_steps}")
    (directory / "counters.json").write_text(json.dumps({**counters, "adam_step": adam_steps.pop()}) + "\n")


def _write_manifest(directory: Path, step: int) -> None:
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p != directory / "manifest.json")
    for path in paths:
        _flush(path)
    manifest = {
        "format": FORMAT,
        "step": step,
        "files": {path.relative_to(directory).as_posix(): checksums(path) for path in paths},
    }
    _replace_manifest(directory, manifest)
    for folder in {path.parent for path in paths} | {directory}:
        _flush(folder)


def _replace_manifest(directory: Path, manifest: dict) -> None:
    temporary = directory / ".manifest.json.tmp"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    _flush(temporary)
    temporary.rename(directory / "manifest.json")


def _flush(path: Path) -> None:
    """Have the operating system put a file or directory on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def drop_state(directory: Path) -> None:
    """Remove the resumable state of a checkpoint, not its model. The manifest changes first: it is always whole."""
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("state/")}
    _replace_manifest(directory, manifest)
    shutil.rmtree(directory / "state", ignore_errors=True)


# Checksums


def checksums(path: Path) -> dict:
    """The size and sha256 of a file; of a safetensors file, the sha256 of its header and of every tensor instead.

    Header and tensors together are the whole file, so every byte is covered. Raises OSError or ValueError when the file
    can not be read or has no sound header.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        return {"bytes": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ValueError(f"header of {length} bytes in a file of {size}")
        file.seek(0)
        header = file.read(8 + length)
    layout = json.loads(header[8:])
    layout.pop("__metadata__", None)

    def tensor_sha256(offsets: list[int]) -> str:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(len(header) + offsets[0])
            left = offsets[1] - offsets[0]
            while left > 0 and (piece := file.read(min(left, 2**24))):
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        digests = threads.map(tensor_sha256, (entry["data_offsets"] for entry in layout.values()))
        tensors = dict(zip(layout, digests))
    return {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def problems(directory: Path) -> list[str]:
    """What is wrong with a checkpoint, a line each naming the file and tensor; empty when it is as it was saved."""
    try:
        manifest = _read_manifest(directory)
    except UserError as error:
        return [str(error)]
    found = []
    for name, expected in manifest["files"].items():
        path = directory / name
        try:
            if path.stat().st_size != expected["bytes"]:
                found.append(f"{path} has {path.stat().st_size} bytes, not {expected['bytes']}")
                continue
            actual = checksums(path)
        except FileNotFoundError:
            found.append(f"{path} is missing")
            continue
        except DAMAGE as error:
            found.append(f"{path} is damaged: {error}")
            continue
        if actual == expected:
            continue
        bad = [t for t, digest in expected.get("tensors", {}).items() if actual.get("tensors", {}).get(t) != digest]
        found.append(f"{path} is damaged" + (f" in tensor {bad[0]}" if bad else ""))
    return found


def _read_manifest(directory: Path) -> dict:
    path = directory / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT or f"step{manifest['step']}" != directory.resolve().name:
            raise ValueError(f"format {manifest['format']}, step {manifest['step']}")
        for name, entry in manifest["files"].items():
            sound = isinstance(entry["bytes"], int) and isinstance(entry.get("tensors", {}), dict)
            if not sound or ".." in Path(name).parts or Path(name).is_absolute():
                raise ValueError(f"bad entry {name}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except DAMAGE as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return manifest


# Resuming


def saved_steps(run: Path) -> list[int]:
    """The steps of all checkpoints of a run that were completed, ascending."""
    names = (path.parent.name.removeprefix("step") for path in run.glob("step*/manifest.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def steps_with_state(run: Path) -> list[int]:
    """The steps a run can be resumed from, ascending. UserError when a manifest is damaged."""
    steps = [step for step in saved_steps(run) if (run / f"step{step}" / "state").is_dir()]
    return [step for step in steps if "state/counters.json" in _read_manifest(run / f"step{step}")["files"]]


def clean_up(run: Path) -> None:
    """Remove what a save that was killed has left behind."""
    for old in run.glob(".step*.old.tmp"):  # killed between the two renames of a step that was saved again
        if not (final := run / old.name[1:].removesuffix(".old.tmp")).exists():
            old.rename(final)
    for leftover in run.glob(".step*.tmp"):
        shutil.rmtree(leftover)


def restore(directory: Path, model: Pythia, optimizer: torch.optim.Optimizer) -> dict:
    """Verify every checksum, then load weights and moments into model and optimizer. Returns the counters.

    Raises UserError, before anything is changed, when a file is missing or damaged or belongs to another model.
    """
    files = _read_manifest(directory)["files"]
    state_files = [directory / name for name in files if name.startswith("state/") and name.endswith(".safetensors")]
    if found := problems(directory):
        raise UserError(
            f"{found[0]}: can not resume from it; remove {directory} to resume from the checkpoint before it"
        )
    parameters = dict(model.named_parameters())
    where: dict[str, Path] = {}
    for path in state_files:
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (not a dict)
                kind, _, name = key.partition("/")
                shape = tensors.get_slice(key).get_shape()
                if kind not in ("weight", *MOMENTS) or name not in parameters or shape != list(parameters[name].shape):
                    raise UserError(f"{path}: {key} {shape} does not belong to this model")
                where[key] = path
    expected = {f"{kind}/{name}" for kind in ("weight", *MOMENTS) for name in parameters}
    if missing := sorted(expected - set(where)):
        raise UserError(f"{directory / 'state'} lacks {missing[0]}")
    if "state/counters.json" not in files:
        raise UserError(f"{directory} lacks state/counters.json")
    counters = json.loads((directory / "state/counters.json").read_text())

    adam_step = float(counters.pop("adam_step"))
    optimizer.state.clear()
    with torch.no_grad():
        for path in state_files:
            with safe_open(path, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    kind, _, name = key.partition("/")
                    p = parameters[name]
                    stored = tensors.get_slice(key)[local_rows(p)]  # of a shard, its rows only
                    if kind == "weight":
                        local(p).copy_(stored)
                    elif adam_step:
                        state = optimizer.state[p]
                        state.setdefault("step", torch.tensor(adam_step, device=p.device))
                        state[kind] = torch.empty_like(p)
                        local(state[kind]).copy_(stored)
    return counters


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
