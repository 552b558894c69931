"""Which rank holds which rows of weights, gradients and Adam's moments: torch's FSDP2 around an unchanged model.

Under torchrun every rank is one process of this program. Each reads its own rows of a batch. FSDP2 sums the gradients
over ranks and gives each rank the gradients of the weights that it holds.

    --shard    a rank holds its part of            and all-gathers the weights of a block
    full       weights, gradients, Adam's moments  before its forward and again before its backward pass   (ZeRO-3)
    hybrid     the same, within its node           the same, from its own node; gradients cross nodes      (HSDP)
    grad       gradients, Adam's moments           once a step                                             (ZeRO-2)
    none       nothing: every rank holds all       never: only gradients are reduced                       (DDP)

Gradients are reduced once a step, whatever the number of micro-steps; between micro-steps each rank adds up its own.
The rounding of a sum depends on its order, so the last bits of a run depend on the number of ranks, unless --bitwise.
"""

import warnings

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Pythia
from model.pythia import initial_rows
from runtime.errors import UserError
from runtime.ranks import Dist

SHARD = ("auto", "full", "hybrid", "grad", "none")


def shard_weights(model: Pythia, shard: str, dist: Dist, dtype: torch.dtype) -> None:
    """Shard the float32 weights of a model over the ranks. Matmuls get them cast to `dtype`.

    Gradients are summed over ranks in float32. Raises UserError if `hybrid` finds nodes with unequal numbers of ranks.
    """
    if not torch_dist.is_initialized():
        return
    shape = {"parts": dist.world_size}  # the ranks as [copies, parts]: copies of the model, divided into parts
    if shard == "none":
        shape = {"copies": dist.world_size, "parts": 1}
    elif shard == "hybrid":
        nodes = dist.all_gather(torch.tensor(dist.local_world_size)).tolist()
        if len(set(nodes)) > 1:
            raise UserError(f"--shard hybrid needs as many ranks on every node, not {min(nodes)} to {max(nodes)}")
        shape = {"copies": dist.world_size // dist.local_world_size, "parts": dist.local_world_size}
    mesh = init_device_mesh(dist.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # keep cos and sin in float32
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=shard in ("full", "hybrid"))
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # nothing changes that view in place
    for module in sharded_modules(model):  # sum, not mean: the loss is already divided by the number of micro-batches
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: Pythia) -> list[FSDPModule]:
    """The blocks and the model itself, if they are sharded."""
    return [module for module in (*model.blocks, model) if isinstance(module, FSDPModule)]


def copies(x: Tensor) -> int:
    """How many ranks hold the same rows of x."""
    return x.device_mesh.size() // x.device_mesh["parts"].size() if isinstance(x, DTensor) else 1


def local(x: Tensor) -> Tensor:
    """The rows of x that this rank holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_rows(x: Tensor) -> slice:
    """Which rows of x, along its first dimension, this rank holds. FSDP2 makes equal parts in the order of the ranks;
    the last parts may be shorter or empty."""
    if not isinstance(x, DTensor):
        return slice(0, len(x))
    parts = x.device_mesh["parts"]
    size = -(-len(x) // parts.size())
    start = min(parts.get_local_rank() * size, len(x))
    return slice(start, min(start + size, len(x)))


def saved_rows(x: Tensor) -> slice:
    """Which rows of x this rank writes into a checkpoint. Ranks that hold the same rows write a share of them each."""
    rows, n_copies = local_rows(x), copies(x)
    if n_copies == 1:
        return rows
    copy, n = x.device_mesh["copies"].get_local_rank(), rows.stop - rows.start
    return slice(rows.start + n * copy // n_copies, rows.start + n * (copy + 1) // n_copies)


@torch.no_grad()
def init_weights(model: Pythia, seed: int) -> None:
    """Draw the initial weights. Each rank draws only its own rows, and gets those of Pythia.init_weights."""
    for name, p in model.named_parameters():
        local(p).copy_(torch.from_numpy(initial_rows(model.config, name, tuple(p.shape), seed, local_rows(p))))


@torch.no_grad()
def nudge_weights(model: Pythia, count: int, seed: int) -> None:
    """Move `count` weights up to the next number of their dtype. They are drawn by seed and count, the same on any
    number of ranks, from the matrices of the blocks, which all tokens use. Raises UserError if there are not so many.
    """
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    ends = np.cumsum([p.numel() for p in matrices])
    if count > ends[-1]:
        raise UserError(f"--nudge {count}: the blocks have {ends[-1]} weights")
    chosen = np.random.default_rng([seed, count]).choice(ends[-1], count, replace=False)
    for p, end in zip(matrices, ends):
        inside = chosen[(end - p.numel() <= chosen) & (chosen < end)] - (end - p.numel())
        row, column = np.unravel_index(inside, p.shape)
        rows = local_rows(p)
        here = (rows.start <= row) & (row < rows.stop)
        places = torch.from_numpy(row[here] - rows.start), torch.from_numpy(column[here])
        weights = local(p)[places]
        local(p)[places] = torch.nextafter(weights, torch.full_like(weights, torch.inf))
