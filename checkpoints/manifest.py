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

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError, safe_open

from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.ranks import Dist

FORMAT = 2
CHUNK_BYTES = 2**22  # read and write in pieces of this size
MAX_HEADER_BYTES = 10**8  # the safetensors library refuses longer headers
COUNTERS = "state/counters.json"

# Exceptions that reading a damaged or malicious file can raise.
READ_ERRORS = (OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError)


# The manifest


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write manifest.json with its own checksum; an existing one is replaced."""
    with atomic_write(directory / "manifest.json") as file:
        file.write(_serialize(manifest))


def _serialize(manifest: dict) -> bytes:
    """The bytes of manifest.json. The last entry is the sha256 of the others, so that a flipped bit is noticed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def read_manifest(directory: Path) -> dict:
    """The verified content of manifest.json. Raises UserError if the file is missing or damaged."""
    path = directory / "manifest.json"
    try:
        text = path.read_bytes()
        manifest = json.loads(text)
        if manifest["format"] == 1:
            raise UserError(f"{path} has format 1, which is no longer read: start again with another --out")
        if text != _serialize(manifest):
            raise ValueError("its content does not match its checksum")
        if manifest["format"] != FORMAT or f"step{manifest['step']}" != directory.resolve().name:
            raise ValueError(f"format {manifest['format']!r}, step {manifest['step']!r}")
        for name, entry in manifest["files"].items():
            tensors = entry.get("tensors", {})
            valid_types = isinstance(entry["bytes"], int) and isinstance(tensors, dict)
            inside = ".." not in Path(name).parts and not Path(name).is_absolute()
            if not valid_types or not inside or not "".join([name, *tensors]).isprintable():
                raise ValueError(f"bad entry {name[:100]!r}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except READ_ERRORS as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return manifest


# The checkpoints of a run


def saved_steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints of a run, ascending."""
    names = (path.parent.name.removeprefix("step") for path in run.glob("step*/manifest.json"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def steps_with_state(run: Path, count_damaged: bool = True) -> list[int]:
    """The steps a run can resume from, ascending.

    If a manifest is damaged, its state/ directory decides; with count_damaged=False that checkpoint is left out.
    """

    def has_state(directory: Path) -> bool:
        try:
            return COUNTERS in read_manifest(directory)["files"]
        except UserError:
            return count_damaged and (directory / "state").is_dir()

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
    manifest = read_manifest(directory)
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("state/")}
    write_manifest(directory, manifest)
    if (directory / "state").is_dir():
        shutil.rmtree(directory / "state")


def clean_up(run: Path) -> None:
    """Remove what a killed process left unfinished in a run directory. Raises UserError if one cannot be removed."""
    try:
        for old in run.glob(".step*.old.tmp"):  # killed between the two renames of a step that was saved again
            if not (final := run / old.name[1:].removesuffix(".old.tmp")).exists():
                old.rename(final)
        for leftover in run.glob(".step*.tmp"):
            shutil.rmtree(leftover)
        for leftover in (*run.glob(".*.tmp"), *run.glob("step*/.*.tmp")):  # of atomic_write
            leftover.unlink()
        for step in sorted(set(saved_steps(run)) - set(steps_with_state(run))):  # killed while its state was dropped
            if (state := run / f"step{step}" / "state").is_dir():
                shutil.rmtree(state)
    except OSError as error:
        raise UserError(
            f"{run}: cannot remove the leftovers of a killed process ({error}); remove them by hand"
        ) from None


# Checksums


def read_header(path: Path) -> tuple[bytes, dict, dict]:
    """The raw header of a safetensors file, its tensor entries in file order, and its metadata.

    The library checks that the tensors fill the file without gap or overlap. Raises one of READ_ERRORS.
    """
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    try:
        with safe_open(path, framework="pt"):
            layout = json.loads(header[8:])
    except SafetensorError as error:  # its text can contain a tensor name of any length, with line breaks
        raise ValueError(repr(str(error)[:200])) from None
    metadata = layout.pop("__metadata__", None) or {}
    return header, dict(sorted(layout.items(), key=lambda item: item[1]["data_offsets"])), metadata


def checksums(path: Path) -> dict:
    """The size and sha256 of a file. A safetensors file has one sha256 for its header and one for each tensor instead.

    Header and tensors cover every byte. The bytes are read, not memory-mapped: a disk error is then an OSError, not a
    SIGBUS that kills the process. Raises one of READ_ERRORS.
    """
    size = path.stat().st_size
    if path.suffix != ".safetensors":
        with path.open("rb") as file:
            return {"bytes": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    header, entries, _ = read_header(path)

    def tensor_sha256(entry: dict) -> str:
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(len(header) + begin)
            for offset in range(begin, end, CHUNK_BYTES):
                digest.update(file.read(min(CHUNK_BYTES, end - offset)))
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        tensors = dict(zip(entries, threads.map(tensor_sha256, entries.values())))
    return {"bytes": size, "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def verify_checkpoint(directory: Path, dist: Dist = Dist()) -> list[str]:  # noqa: B008 (immutable)
    """One line for each damaged, missing or unlisted file of a checkpoint, naming file and tensor; [] if it is valid.

    The ranks share the work: all must call this, and all get the same answer.
    """
    try:
        files = read_manifest(directory)["files"]
        errors = []
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
        return [f"{path} is damaged: {error}"]
    if actual == expected:
        return []
    bad = [t for t, digest in expected.get("tensors", {}).items() if actual.get("tensors", {}).get(t) != digest]
    return [f"{path} is damaged" + (f" in tensor {bad[0]}" if bad else "")]
