"""Who holds what: the ranks of a run, the shards of its weights, and which activations a step keeps.

The model file knows nothing of it. Under torchrun every rank is a process with this very program. Each reads its own
rows of a batch; torch's FSDP2 averages their gradients, and gives every rank those of the weights that it holds.

    --shard    a rank holds its part of            and fetches a layer's weights
    full       weights, gradients, Adam's state    before its forward and again before its backward pass  (ZeRO-3)
    grad       gradients, Adam's state             once a step                                            (ZeRO-2)
    none       nothing: everybody holds all        never: only gradients travel
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from errors import UserError
from model import Config, Pythia
from model.pythia import initial_rows

SHARD = ("auto", "full", "grad", "none")
RECOMPUTE = ("none", "cheap", "full")
TIMEOUT = timedelta(minutes=30)  # until a rank that waits for another gives up


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    group: dist.ProcessGroup | None = None  # None: torch's default

    @property
    def first(self) -> bool:
        """Whether it is this process that prints and writes files."""
        return self.rank == 0

    def print(self, line: str) -> None:
        if self.first:
            tqdm.write(line)

    def sum(self, x: Tensor) -> Tensor:
        """x, added up over all ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def any(self, condition: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.sum(torch.tensor(int(condition))))

    def gather(self, x: Tensor) -> Tensor:
        """The x of all ranks, [world, ..], on every rank."""
        if self.world == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(parts, x, self.group)
        return torch.stack(parts)

    def texts(self, text: str) -> list[str]:
        """The texts of all ranks, on every rank. (torch's gathering of objects would pickle them.)"""
        mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        lengths = self.gather(torch.tensor(len(mine))).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        return [bytes(row[: n - 1].tolist()).decode() for row, n in zip(self.gather(padded), lengths)]

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.world > 1:
            dist.barrier(self.group)

    def apart(self) -> "Ranks":
        """The same ranks with a process group of their own, for the CPU tensors of another thread: what two threads
        send in one group would mix. All ranks must call this."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.world > 1 else self


def start_ranks() -> Ranks:
    """Find the other ranks, which torchrun tells of in the environment. Without it this process is alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= here:
            raise UserError(f"rank {rank} finds no GPU of its own: this machine has {here}; lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Ranks(rank, world, device)


def end_ranks() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


# Weights


def resolve_shard(shard: str, config: Config, device: torch.device) -> str:
    """What `auto` means: none while weights, gradients and moments (16 bytes a parameter) fill at most a quarter of a
    GPU, then grad while they fill half of it, then full. On CPUs, which are for trying things out, none."""
    if shard != "auto":
        return shard
    if device.type == "cpu":
        return "none"
    filled = 16 * config.parameters / torch.cuda.get_device_properties(device).total_memory
    return "none" if filled <= 1 / 4 else "grad" if filled <= 1 / 2 else "full"


def shard_weights(model: Pythia, shard: str, ranks: Ranks, dtype: torch.dtype) -> None:
    """Divide the float32 weights of a model among the ranks, so that products see them in `dtype`.

    Gradients are added up over ranks in float32.
    """
    if ranks.world == 1:
        return
    shape = {"copies": ranks.world, "parts": 1} if shard == "none" else {"parts": ranks.world}
    mesh = init_device_mesh(ranks.device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # or the angles of the rotary embedding were rounded
    )
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=shard == "full")
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


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
    rows, copies = local_rows(x), _copies(x)
    if copies == 1:
        return rows
    copy, n = x.device_mesh["copies"].get_local_rank(), rows.stop - rows.start
    return slice(rows.start + n * copy // copies, rows.start + n * (copy + 1) // copies)


def whole(x: Tensor) -> Tensor:
    """All of x, fetched from the ranks that hold it. All ranks must call this."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@torch.no_grad()
def init_weights(model: Pythia, seed: int) -> None:
    """Draw the initial weights, every rank its own rows of them: together they are those of Pythia.init_weights."""
    for name, p in model.named_parameters():
        local(p).copy_(torch.from_numpy(initial_rows(model.config, name, tuple(p.shape), seed, local_rows(p))))


# Gradients


def sync_gradients(model: Pythia, now: bool, ranks: Ranks) -> None:
    """Whether the next backward pass sends gradients to the other ranks: once a step is enough."""
    if ranks.world > 1:
        model.set_requires_gradient_sync(now)


def squared_norm(parameters: list[Tensor]) -> Tensor:
    """This rank's share, float64, of the squared L2 norm of all gradients: shares of all ranks add up to it.

    Exact to float32's last digits: of the norms of rows. In float32 torch's norm of millions of elements is off by 2e-4
    on a CPU, where it adds them up one by one.
    """
    rows = [torch.linalg.vector_norm(local(p.grad), dim=-1).flatten() for p in parameters]
    total = torch.cat(rows).double().square().sum()
    return total / _copies(parameters[0])


def _copies(x: Tensor) -> int:
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
