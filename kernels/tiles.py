"""Launch table of the attention kernels: tile shapes by GPU and head_dim.

The table is static because the shape of a tile sets the order of summation. An autotuner chooses shapes by timing, so
two ranks, or two runs, could differ in the last bits. `python -m bench.tiles` times other tiles, once and offline.

Each entry is the largest tile that the compiler keeps in registers (tests/kernels/test_cubins.py). On Hopper a dot must
also be wide: with only 64 columns it needs its operands faster than shared memory can deliver them.
"""

from typing import NamedTuple

import torch


class Tile(NamedTuple):
    block_q: int  # queries of a tile
    block_k: int  # keys of a tile
    num_warps: int
    num_stages: int  # tiles being loaded, counting the one in use


class Attention(NamedTuple):
    forward: Tile
    dq: Tile
    dk: Tile
    dv: Tile | None = None  # None: the launch of dk computes dv too


# By compute capability times ten, then head_dim. A program of forward and dq owns block_q queries and loops over keys,
# so block_k divides block_q. A program of dk and dv owns block_k keys and loops over queries: block_q divides block_k.
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

# 8.6 and 8.9 have three fifths of the shared memory of 8.0, too little for the tiles of head_dim 256.
ATTENTION[86] = {
    **ATTENTION[80],
    256: Attention(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 64, 8, 2)),
}

# float32 is for tests and comparisons (backend.triton_runs). Exact float32 dots need many registers.
FLOAT32 = Attention(Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2), Tile(16, 16, 8, 2))


def architecture(device: torch.device) -> int:
    """The key of ATTENTION: 80 for A100, 86 for the RTX 30 and 40 series and L40S, 90 for Hopper, 100 for B200."""
    if device.type != "cuda":
        return 90  # the interpreter supports everything that Hopper does
    major, minor = torch.cuda.get_device_capability(device)
    return {8: 80 if minor == 0 else 86, 9: 90, 10: 100}[major]


def attention(arch: int, head_dim: int, dtype: torch.dtype) -> Attention:
    return FLOAT32 if dtype == torch.float32 else ATTENTION[arch][head_dim]
