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
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.errors import UserError
from runtime.files import flush
from runtime.ranks import Dist

FORMAT = 2
CHUNK_BYTES = 2**22  # bytes that are read, or written, at a time
MOST_HEADER = 10**8  # bytes of the header of a safetensors file, as the library has it
COUNTERS = "state/counters.json"

# What a damaged or hostile file can make of reading it: json nests too deep, offsets overflow, entries are no dicts.
READ_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


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


def read_manifest(directory: Path) -> dict:
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
    except READ_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return manifest


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
        return COUNTERS in read_manifest(directory)["files"]
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
    manifest = read_manifest(directory)
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

    Raises OSError, or another of READ_ERRORS when tensors do not fill the file without gap or overlap.
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

    Header and tensors together are the whole file, so every byte is covered. Raises one of READ_ERRORS when the file
    can not be read or has no sound header.
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
            while left > 0 and (piece := file.read(min(left, CHUNK_BYTES))):
                digest.update(piece)
                left -= len(piece)
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        digests = threads.map(tensor_sha256, (entry["data_offsets"] for entry in entries.values()))
        tensors = dict(zip(entries, digests))
    return {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def verify_checkpoint(directory: Path, ranks: Dist = Dist()) -> list[str]:  # noqa: B008 (immutable)
    """What is wrong with a checkpoint, a line each naming the file and tensor; empty when it is as it was saved.

    Several ranks, which must all call this, share the work and get the same answer.
    """
    try:
        files = read_manifest(directory)["files"]
        found = [
            line
            for name in list(files)[ranks.rank :: ranks.world_size]
            for line in _verify_file(directory / name, files[name])
        ]
        there = [*directory.glob("*.safetensors*"), *(directory / "state").rglob("*")] if ranks.is_main else []
        unlisted = (path for path in there if path.relative_to(directory).as_posix() not in files and not path.is_dir())
        found += [
            f"{path} does not belong to the checkpoint: its manifest does not list it" for path in sorted(unlisted)
        ]
    except UserError as error:
        found = [str(error)]
    every = [line for text in ranks.all_gather_str(json.dumps(found)) for line in json.loads(text)]
    return list(dict.fromkeys(every))


def _verify_file(path: Path, expected: dict) -> list[str]:
    try:
        if (size := path.stat().st_size) != expected["bytes"]:
            return [f"{path} has {size} bytes, not {expected['bytes']}"]
        actual = checksums(path)
    except FileNotFoundError:
        return [f"{path} is missing"]
    except READ_ERRORS as error:
        return [f"{path} is damaged: {error}"]
    if actual == expected:
        return []
    bad = [t for t, digest in expected.get("tensors", {}).items() if actual.get("tensors", {}).get(t) != digest]
    return [f"{path} is damaged" + (f" in tensor {bad[0]}" if bad else "")]
