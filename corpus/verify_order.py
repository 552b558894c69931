"""Our index maps against those that EleutherAI published: no token and no map travels, only headers and hashes.

The hub records the size and the hash of every file. A published map is a header of NumPy, whose text depends on the
version of NumPy, and the numbers. So the header is fetched, and hashed together with our numbers.
"""

import hashlib
import io
import re

import numpy as np

from corpus.indexed import block_slices
from corpus.order import MAPS, Order, as_array
from runtime.errors import UserError
from runtime.hub import Remote, Revision, hub_errors, request, resolve

REPO = "EleutherAI/pile-preshuffled-seeds"
MOST = 1 << 12  # bytes of a header


def published_maps(revision: Revision, samples: int, seq_len: int, seed: int) -> dict[str, str]:
    """The files of the three maps for this number of samples, by map. Raises UserError if there are none."""
    ending, found = f"_{samples}ns_{seq_len}sl_{seed}s_", {}
    for file in revision.files:
        if match := re.fullmatch(rf".*{ending}({'|'.join(MAPS)})\.npy", file):
            found[match[1]] = file
    if missing := [name for name in MAPS if name not in found]:
        raise UserError(
            f"{revision.repo} has no {missing[0]} of {samples:,} samples of {seq_len} tokens with seed {seed}: it has"
            " the maps of 143,000 steps of 1024 rows of 2048 tokens"
        )
    return found


def compare(order: Order, samples: int, seed: int) -> list[str]:
    """What differs between an order and the published one, one line for each map; [] if all are equal.

    Raises UserError if the hub has no such maps or cannot be reached.
    """
    revision = resolve(REPO, "main", "dataset")
    files, problems = published_maps(revision, samples, order.seq_len, seed), []
    for name in MAPS:
        array, remote = as_array(getattr(order, name)), revision.files[files[name]]
        rest = remote.bytes - array.nbytes
        head = header(revision, files[name], rest) if 0 < rest <= MOST else b""
        if not (theirs := parse(head)):
            problems.append(f"{name}: ours has {array.nbytes:,} bytes of numbers, {files[name]} has {remote.bytes:,}")
        elif theirs != (array.dtype, array.shape):
            problems.append(f"{name}: ours is {array.dtype} {array.shape}, {files[name]} is {theirs[0]} {theirs[1]}")
        elif content_hash(remote, head, array) != remote.digest:
            problems.append(f"{name}: the numbers of {files[name]} are others")
    return problems


def header(revision: Revision, file: str, count: int) -> bytes:
    """The first bytes of a file on the hub. Raises UserError."""
    fetched = io.BytesIO()
    with hub_errors(revision.repo, revision.name):
        request(revision, file, fetched, count)
    return fetched.getvalue()


def parse(head: bytes) -> tuple[np.dtype, tuple[int, ...]] | None:
    """The dtype and shape in a header of NumPy. None if it is not one, not in C order, or longer or shorter."""
    stream = io.BytesIO(head)
    try:
        if np.lib.format.read_magic(stream) != (1, 0):
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        return None if fortran_order or stream.tell() != len(head) else (dtype, shape)
    except ValueError:
        return None


def content_hash(remote: Remote, head: bytes, array: np.ndarray) -> str:
    """The hash of a file with this header and these numbers, of the kind that the hub records."""
    digest = hashlib.sha256() if remote.sha256 else hashlib.sha1(b"blob %d\0" % remote.bytes)  # git's name
    digest.update(head)
    for block in block_slices(len(array), "hashing the order"):
        digest.update(np.ascontiguousarray(array[block]))
    return digest.hexdigest()
