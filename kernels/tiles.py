"""How the attention kernels are launched: a static table by GPU and head_dim, in which nothing depends on timing.

The shape of a tile sets the order of summation. Were it chosen by measuring, as an autotuner does, then two ranks, or
two runs, could differ in the last bits.

The entries are the largest tiles of which the compiler keeps all in registers (tests/kernels/test_cubins.py) and, on
Hopper, of which products are wide: one that is only 64 columns wide needs its operands faster than shared memory can
deliver them.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_q: int  # queries of a tile
    block_k: int  # keys
    num_warps: int
    num_stages: int  # tiles on their way from memory, counting the one in use


class Attention(NamedTuple):
    forward: Tile
    dq: Tile
    dk: Tile
    dv: Tile | None = None  # None: the kernel of dk forms dv as well


# By compute capability times ten, then head_dim. A program of forward and dq owns block_q queries and walks over the
# keys, so block_k divides block_q; one of dk and dv owns keys and walks over queries, and the other way round.
ATTENTION = {
    80: {
        16: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        32: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        64: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 3)),
        80: Attention(Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(32, 128, 8, 2)),
        128: Attention(Tile(128, 32, 8, 3), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
        256: Attention(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)),
    },
    90: {
        16: Attention(Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 128, 8, 3)),
        32: Attention(Tile(128, 128, 8, 3), Tile(128, 128, 8, 3), Tile(128, 128, 8, 3)),
        64: Attention(Tile(128, 128, 8, 3), Tile(128, 128, 8, 2), Tile(128, 128, 8, 2)),
        80: Attention(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        128: Attention(Tile(128, 128, 8, 2), Tile(128, 128, 8, 2), Tile(64, 128, 8, 2)),
        256: Attention(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
    },
    100: {
        16: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        32: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        64: Attention(Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        80: Attention(Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        128: Attention(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
        256: Attention(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2)),
    },
}

# 8.6 and 8.9 have three fifths of the shared memory of 8.0, which is too little for its tiles of 256 columns.
ATTENTION[86] = {
    **ATTENTION[80],
    256: Attention(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
}

# float32 is for tests and comparisons: exact products do not run on the tensor cores, and fill registers even so.
FLOAT32 = Attention(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2))


def architecture(device: torch.device) -> int:
    """The row of the table: 80 for A100, 86 for the RTX 30 and 40 series and their kin, 90 for Hopper, 100 for B200."""
    if device.type != "cuda":
        return 90  # the interpreter, which can do all that Hopper can
    major, minor = torch.cuda.get_device_capability(device)
    return {8: 80 if minor == 0 else 86, 9: 90, 10: 100}[major]


def attention(arch: int, head_dim: int, dtype: torch.dtype) -> Attention:
    return FLOAT32 if dtype == torch.float32 else ATTENTION[arch][head_dim]
