"""Safetensors files: written piece by piece, and read without a memory map.

Under a memory map a disk error, or a file that became shorter, is a SIGBUS that kills the process. Here it is an
OSError that names the file.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from runtime.files import naming, open_regular

CHUNK_BYTES = 2**22  # read and write in pieces of this size
MAX_HEADER_BYTES = 10**8  # the safetensors library refuses longer headers
DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


def write_tensors(
    path: Path,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, ...]],
    pieces: Callable[[str], Iterable[Tensor]],
    notes: dict[str, str] | None = None,
) -> dict:
    """Write a safetensors file piece by piece and flush it to disk. Returns its checksums, as checksums(path) would.

    The library's writer needs all tensors in memory at once; this one writes the same bytes from the pieces.
    pieces(name) yields the values of a tensor in order, as CPU tensors of `dtype`. The notes join the header's
    metadata. Raises OSError.
    """
    layout, end = {"__metadata__": {"format": "pt", **(notes or {})}}, 0
    for name in sorted(shapes):
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        layout[name] = {"dtype": DTYPES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    header = len(text).to_bytes(8, "little") + text
    tensors = {}
    with naming(path), path.open("wb") as file:
        file.write(header)
        for name in sorted(shapes):
            digest = hashlib.sha256()
            for piece in pieces(name):
                data = piece.contiguous().view(torch.uint8).numpy()
                digest.update(data)
                file.write(data)
            tensors[name] = digest.hexdigest()
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(header) + end, "header_sha256": hashlib.sha256(header).hexdigest(), "tensors": tensors}


def read_header(path: Path) -> tuple[bytes, dict, dict]:
    """The raw header of a safetensors file, its tensor entries in file order, and its metadata.

    The library checks that the tensors fill the file without gap or overlap. Raises one of READ_ERRORS.
    """
    with open_regular(path) as file:
        length = file.read(8)
        header = length + file.read(min(int.from_bytes(length, "little"), MAX_HEADER_BYTES))
    try:
        with safe_open(path, framework="pt"):
            layout = json.loads(header[8:])
    except SafetensorError as error:  # its text can contain a tensor name of any length, with line breaks
        raise ValueError(repr(str(error)[:200])) from None
    metadata = layout.pop("__metadata__", None) or {}
    return header, dict(sorted(layout.items(), key=lambda item: item[1]["data_offsets"])), metadata


def read_pieces(path: Path, offset: int, size: int, piece: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """Bytes offset .. offset + size - 1 of a file, as new uint8 tensors of `piece` bytes, the last one shorter.

    Raises OSError, also if the file is shorter, or ValueError if it is not a regular file.
    """
    with open_regular(path) as file:
        file.seek(offset)
        for begin in range(0, size, piece):
            data = np.empty(min(piece, size - begin), np.uint8)  # torch.empty would fragment the heap
            if file.readinto(data) < len(data):
                raise OSError(f"{path} is shorter than it was")
            yield torch.from_numpy(data)
