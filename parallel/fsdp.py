"""Who holds what: the ranks of a run, the shards of its weights, and which activations a step keeps.

The model file knows nothing of it. Under torchrun every rank is a process with this very program. Each reads its own
rows of a batch; torch's FSDP2 adds up their gradients, and gives every rank those of the weights that it holds.

    --shard    a rank holds its part of            and fetches a layer's weights
    full       weights, gradients, Adam's state    before its forward and again before its backward pass  (ZeRO-3)
    hybrid     the same, divided within a node     the same, from its own node; gradients cross nodes     (HSDP)
    grad       gradients, Adam's state             once a step                                            (ZeRO-2)
    none       nothing: everybody holds all        never: only gradients travel

Gradients travel once a step, whatever the number of micro-steps; in between every rank adds up its own. How sums are
rounded depends on who adds first, so the last bits of a run depend on the number of ranks, unless it is --bitwise.
"""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from model import Pythia
from model.pythia import initial_rows
from runtime.errors import UserError
from runtime.ranks import Dist

SHARD = ("auto", "full", "hybrid", "grad", "none")
RECOMPUTE = ("none", "cheap", "full")


def shard_weights(model: Pythia, shard: str, ranks: Dist, dtype: torch.dtype) -> None:
    """Divide the float32 weights of a model among the ranks, so that products see them in `dtype`.

    Gradients are added up over ranks in float32. Raises UserError when nodes are too unequal to be hybrid.
    """
    if not torch_dist.is_initialized():
        return
    shape = {"parts": ranks.world_size}
    if shard == "none":
        shape = {"copies": ranks.world_size, "parts": 1}
    elif shard == "hybrid":
        nodes = ranks.all_gather(torch.tensor(ranks.local_world_size)).tolist()
        if len(set(nodes)) > 1:
            raise UserError(f"--shard hybrid needs as many ranks on every node, not {min(nodes)} to {max(nodes)}")
        shape = {"copies": ranks.world_size // ranks.local_world_size, "parts": ranks.local_world_size}
    mesh = init_device_mesh(ranks.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # or the angles of the rotary embedding were rounded
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=shard in ("full", "hybrid"))
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which nobody changes in place
    for module in sharded_modules(
        model
    ):  # sums, not means: the loss of a micro-step is divided by their number beforehand
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: Pythia) -> list[FSDPModule]:
    return [module for module in (*model.blocks, model) if isinstance(module, FSDPModule)]


def local(x: Tensor) -> Tensor:
    """What this rank holds of x: its rows, or all."""
    return x.to_local() if isinstance(x, DTensor) else x


def local_rows(x: Tensor) -> slice:
    """Which rows of x (along its first dimension) this rank holds: FSDP2 deals them out in equal blocks, the last of
    which may be short or empty."""
    if not isinstance(x, DTensor):
        return slice(0, len(x))
    parts = x.device_mesh["parts"]
    block = -(-len(x) // parts.size())
    start = min(parts.get_local_rank() * block, len(x))
    return slice(start, min(start + block, len(x)))


def saved_rows(x: Tensor) -> slice:
    """Which rows of x this rank writes into a checkpoint: of those that it holds, its share among the ranks that hold
    the same."""
    rows, n_copies = local_rows(x), copies(x)
    if n_copies == 1:
        return rows
    copy, n = x.device_mesh["copies"].get_local_rank(), rows.stop - rows.start
    return slice(rows.start + n * copy // n_copies, rows.start + n * (copy + 1) // n_copies)


@torch.no_grad()
def init_weights(model: Pythia, seed: int) -> None:
    """Draw the initial weights, every rank its own rows of them: together they are those of Pythia.init_weights."""
    for name, p in model.named_parameters():
        local(p).copy_(torch.from_numpy(initial_rows(model.config, name, tuple(p.shape), seed, local_rows(p))))


def copies(x: Tensor) -> int:
    """How many ranks hold the same rows of x."""
    return x.device_mesh.size() // x.device_mesh["parts"].size() if isinstance(x, DTensor) else 1


# Activations

_aten = torch.ops.aten
_EXPENSIVE = {
    _aten.mm.default,
    _aten.addmm.default,
    torch.ops.tripod.linear.default,
    torch.ops.tripod.short_attention.default,
    torch.ops.tripod.rotary_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep_expensive(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _EXPENSIVE else CheckpointPolicy.PREFER_RECOMPUTE


def set_recompute(model: Pythia, recompute: str) -> None:
    """Have every block keep less for its backward pass and compute the rest again. The numbers stay the same.

    none     keep everything
    cheap    keep the results of matrix products and attention; recompute norms, GELU, rotary and additions
    full     keep only the input of the block
    """
    contexts = {}
    if recompute == "cheap":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_expensive)
    for block in model.blocks:
        vars(block).pop("forward", None)  # what an earlier call has put there
        if recompute != "none":
            block.forward = _recomputing(block.forward, contexts)


def _recomputing(forward: Callable, contexts: dict) -> Callable:
    def run(*args):  # a function of ours, because torch.compile does not look into torch's own
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **contexts)

    return run
