"""manifest.json: a checksum of every file and tensor of a checkpoint, and of itself.

{"format": 2, "step": 60, "run": {"settings": .., "data": ..},
 "files": {"config.json": {"bytes": .., "sha256": ..},
           "model.safetensors": {"bytes": .., "header_sha256": .., "tensors": {"embed_out.weight": sha256, ..}}, ..},
 "sha256": of the entries above}
"""

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from runtime.errors import UserError
from runtime.files import READ_ERRORS, atomic_write, open_regular, read_small, reason

FORMAT = 2
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 2**28  # that of 12b on 512 ranks has a third of it
MAX_JSON_BYTES = 2**24  # of config.json, the index and the like


def saved_steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints of a run, ascending. Raises UserError if they cannot be listed."""
    try:
        names = [path.parent.name.removeprefix("step") for path in run.glob(f"step*/{MANIFEST}")]
    except OSError as error:
        raise UserError(f"the checkpoints of {run} cannot be listed: {reason(error)}") from None
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def write_manifest(directory: Path, manifest: dict) -> None:
    """Write manifest.json with its own checksum; an existing one is replaced."""
    with atomic_write(directory / MANIFEST) as file:
        file.write(_serialize(manifest))


def _serialize(manifest: dict) -> bytes:
    """The bytes of manifest.json. The last entry is the sha256 of the others, so that a flipped bit is noticed."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def read_manifest(directory: Path) -> dict:
    """The verified content of manifest.json. Raises UserError if the file is missing or damaged."""
    path = directory / MANIFEST
    try:
        text = read_small(path, MAX_MANIFEST_BYTES)
        manifest = json.loads(text)
        if manifest["format"] == 1:
            raise UserError(f"{path} has format 1, which is no longer read: start again with another --out")
        if text != _serialize(manifest):
            raise ValueError("its content does not match its checksum")
        if manifest["format"] != FORMAT or type(manifest["step"]) is not int or manifest["step"] < 0:
            raise ValueError(f"format {manifest['format']!r}, step {manifest['step']!r}"[:100])
        for name, entry in manifest["files"].items():
            tensors = entry.get("tensors", {})
            valid_types = isinstance(entry["bytes"], int) and isinstance(tensors, dict)
            inside = ".." not in Path(name).parts and not Path(name).is_absolute()
            readable = "".join([name, *tensors]).isprintable() and max(map(len, [name, *tensors])) <= 255
            if not valid_types or not inside or not readable:
                raise ValueError(f"bad entry {name[:100]!r}")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except READ_ERRORS as error:
        raise UserError(f"{path} is damaged: {reason(error)}") from None
    return manifest


def listed_files(directory: Path) -> dict[str, dict] | None:
    """The files that manifest.json lists. None if there is no manifest: another program wrote the directory."""
    return read_manifest(directory)["files"] if os.path.lexists(directory / MANIFEST) else None


def listed(path: Path, files: dict[str, dict] | None) -> dict:
    """What the manifest beside a file says about it; {} if there is no manifest (files is None).

    Raises UserError if the manifest does not list the file, or lists another size. Raises OSError.
    """
    if files is None:
        return {}
    if path.name not in files:
        raise UserError(f"{path} is not part of the checkpoint: the manifest does not list it")
    if (size := path.stat().st_size) != files[path.name]["bytes"]:
        raise UserError(f"{path} has {size} bytes, not {files[path.name]['bytes']}")
    return files[path.name]


def read_listed(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """The content of a small file, verified against the manifest beside it, if there is one.

    Raises UserError if it is damaged, OSError or ValueError if it cannot be read.
    """
    entry = listed(path, listed_files(path.parent))
    data = read_small(path, limit)
    if entry and hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise UserError(f"{path} is damaged")
    return data


def checksums(path: Path) -> dict:
    """The size and sha256 of a file. A safetensors file has one sha256 for its header and one for each tensor instead.

    Header and tensors cover every byte. Raises one of READ_ERRORS.
    """
    if path.suffix != ".safetensors":
        with open_regular(path) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    from runtime.tensors import read_header, read_pieces  # they need torch, which data.py does without

    header, entries, _ = read_header(path)

    def tensor_sha256(entry: dict) -> str:
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256()
        for piece in read_pieces(path, len(header) + begin, end - begin):
            digest.update(piece.numpy())
        return digest.hexdigest()

    with ThreadPoolExecutor() as threads:  # hashing releases the interpreter lock
        tensors = dict(zip(entries, threads.map(tensor_sha256, entries.values())))
    return {
        "bytes": path.stat().st_size,
        "header_sha256": hashlib.sha256(header).hexdigest(),
        "tensors": tensors,
    }
