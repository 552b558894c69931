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

import ctypes
import hashlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from tqdm import tqdm

from errors import UserError
from model import Pythia
from model.pythia import initial_rows

T = TypeVar("T")
SHARD = ("auto", "full", "hybrid", "grad", "none")
RECOMPUTE = ("none", "cheap", "full")
TIMEOUT = timedelta(minutes=30)  # until a rank that waits for another gives up


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    node: int = 1  # ranks on this machine
    group: dist.ProcessGroup | None = None  # None: torch's default
    store: dist.Store | None = None

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

    def max(self, x: Tensor) -> Tensor:
        """The largest x of all ranks, on every rank."""
        if self.world > 1:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

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
        return [row[: n - 1].numpy().tobytes().decode() for row, n in zip(self.gather(padded), lengths)]

    def says(self, text: str) -> bool:
        """Whether it is this rank that says what others may want to say too: the first to ask."""
        key, rank = hashlib.sha256(text.encode()).hexdigest(), str(self.rank)
        try:
            return self.store is None or self.store.compare_set(key, "", rank).decode() == rank
        except dist.DistError:  # the store is gone with torchrun: better twice than not at all
            return True

    def first_does(self, work: Callable[[], T]) -> T | None:
        """Have the first rank do something while the others wait: it gets the result. A UserError is raised on all."""
        result, error = None, ""
        if self.first:
            try:
                result = work()
            except UserError as failure:
                error = str(failure)
        if error := self.texts(error)[0]:
            raise UserError(error)
        return result

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        if self.world > 1:
            dist.barrier(self.group)

    def apart(self) -> "Ranks":
        """The same ranks with a process group of their own, for the CPU tensors of another thread: what two threads
        send in one group would mix. All ranks must call this."""
        return replace(self, group=dist.new_group(backend="gloo")) if self.world > 1 else self


def start_ranks(bitwise: bool = False) -> Ranks:
    """Find the other ranks, which torchrun tells of in the environment. Without it this process is alone.

    bitwise: have what --bitwise needs, also when alone. Raises UserError when a rank finds no GPU of its own, or when
    the number of ranks is none that --bitwise can do with.
    """
    _end_with_torchrun()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    node = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    device = torch.device("cpu")
    if bitwise and world.bit_count() != 1:
        raise UserError(f"--bitwise adds up gradients in pairs: it needs 1, 2, 4, 8 ... ranks, not {world}")
    if torch.cuda.is_available():
        local, here = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= here:
            raise UserError(f"rank {rank} finds no GPU of its own: this machine has {here}; lower --nproc-per-node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    elif bitwise:
        torch.set_num_threads(1)  # threads divide sums among them, and torchrun gives each of many ranks one
    if world == 1 and not bitwise:
        return Ranks(device=device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world == 1:
        store = dist.HashStore()
    else:
        store = _new_part(next(dist.rendezvous("env://", timeout=TIMEOUT))[0], rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return Ranks(rank, world, device, node, store=store)


def _end_with_torchrun() -> None:
    """Have the kernel send SIGTERM, upon which training saves and stops, when torchrun dies without a word to us (kill
    -9). Orphans would train on, and hold GPUs and the run directory. Other systems than Linux have no such call."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _new_part(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of torchrun's store that no earlier start has used: after a restart the store still holds the addresses of
    processes that are gone. (Its count of restarts will not do: a node that joins later begins at 0.)

    The first rank offers a name; all acknowledge it, each with a word of its own; and a rank believes the first rank's
    answer only when its word is in it, because the offer and the answer that it finds may be old ones.
    """
    word = uuid4().hex
    if rank == 0:
        store.set("offer", word)
    while True:
        name = store.get("offer").decode()
        store.set(f"word/{rank}", f"{name} {word}")
        if rank == 0:
            words = [store.get(f"word/{r}").decode().split() for r in range(world)]
            if all(offered == name for offered, _ in words):
                store.set(f"answer/{name}", " ".join(own for _, own in words))
        if store.check([f"answer/{name}"]) and word in store.get(f"answer/{name}").decode():
            return dist.PrefixStore(name, store)
        time.sleep(0.02)


def end_ranks(ranks: Ranks, together: bool) -> None:
    """Leave the process group: together, when all ranks come here, or else alone, after an error."""
    if together and ranks.world > 1:  # a rank that left would cut off those that still read its last message
        with suppress(dist.DistError):  # the store is gone with torchrun
            ranks.store.set(f"end/{ranks.rank}", "")
            ranks.store.wait([f"end/{rank}" for rank in range(ranks.world)], TIMEOUT)
    if dist.is_initialized():
        dist.destroy_process_group()


# Weights


def shard_weights(model: Pythia, shard: str, ranks: Ranks, dtype: torch.dtype) -> None:
    """Divide the float32 weights of a model among the ranks, so that products see them in `dtype`.

    Gradients are added up over ranks in float32. Raises UserError when nodes are too unequal to be hybrid.
    """
    if not dist.is_initialized():
        return
    shape = {"parts": ranks.world}
    if shard == "none":
        shape = {"copies": ranks.world, "parts": 1}
    elif shard == "hybrid":
        nodes = ranks.gather(torch.tensor(ranks.node)).tolist()
        if len(set(nodes)) > 1:
            raise UserError(f"--shard hybrid needs as many ranks on every node, not {min(nodes)} to {max(nodes)}")
        shape = {"copies": ranks.world // ranks.node, "parts": ranks.node}
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
    for module in _sharded(model):  # sums, not means: the loss of a micro-step is divided by their number beforehand
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _sharded(model: Pythia) -> list[FSDPModule]:
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
    rows, copies = local_rows(x), _copies(x)
    if copies == 1:
        return rows
    copy, n = x.device_mesh["copies"].get_local_rank(), rows.stop - rows.start
    return slice(rows.start + n * copy // copies, rows.start + n * (copy + 1) // copies)


@torch.no_grad()
def init_weights(model: Pythia, seed: int) -> None:
    """Draw the initial weights, every rank its own rows of them: together they are those of Pythia.init_weights."""
    for name, p in model.named_parameters():
        local(p).copy_(torch.from_numpy(initial_rows(model.config, name, tuple(p.shape), seed, local_rows(p))))


# Gradients


class Gradients:
    """Adds up the gradients of a step over its micro-steps and over ranks.

    Call `travel` before, and `add` after, the backward pass of every micro-step; then .grad of every parameter is the
    sum for the rows of weights that this rank holds.

    Usually every rank adds up its own, which takes 4 bytes a parameter on each, and they travel after the last
    micro-step. With whole=False they travel after every micro-step, and a rank holds its part of the sum only.

    With bitwise=True the sum is the same to the last bit on any number of ranks that is a power of two. Its summands
    are the gradients of micro-batches 0, 1, 2 .. of the step, of which micro-step i has world * i and the world - 1
    that follow. They are added up along a binary tree: neighbours first, then neighbouring pairs, and so on. The lower
    levels lie within a micro-step, among ranks (TreeReduceScatter); the upper ones join micro-steps as a binary counter
    carries, so that at most log2(micro-steps) + 1 sums are alive, each of the rows that a rank holds.
    """

    def __init__(self, model: Pythia, ranks: Ranks, shard: str, whole: bool = True, bitwise: bool = False):
        self.model, self.ranks, self.whole, self.bitwise = model, ranks, whole, bitwise
        self.keep_weights = shard in ("grad", "none")
        self.parameters = list(model.parameters())
        self.sums: list[tuple[int, list[Tensor]]] = []  # (level in the tree, gradients), levels descending
        if bitwise:
            for module in _sharded(model):
                module.set_custom_reduce_scatter(TreeReduceScatter())

    def travel(self, last: bool) -> None:
        """Before a backward pass: whether it is the step's last."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.bitwise or not self.whole)
            self.model.set_reshard_after_backward(last or not self.keep_weights)

    def add(self, last: bool) -> None:
        """After a backward pass."""
        if not self.bitwise:
            return
        level, total = 0, [local(p.grad) for p in self.parameters]
        while self.sums and (last or self.sums[-1][0] == level):
            left = self.sums.pop()[1]
            torch._foreach_add_(left, total)
            level, total = level + 1, left
        if last:
            for p, gradient in zip(self.parameters, total):
                local(p.grad).copy_(gradient)
        else:
            self.sums.append((level, total))
            for p in self.parameters:
                p.grad = None

    def squared_norm(self) -> Tensor:
        """This rank's share, float64, of the squared L2 norm of all gradients: shares of all ranks add up to it."""
        if self.bitwise:
            return squared_norm_in_any_order(self.parameters, self.ranks) * self.ranks.first
        return squared_norm(self.parameters) / _copies(self.parameters[0])


class TreeReduceScatter:
    """Adds up tensors of ranks along a binary tree: a communication of FSDP2's, instead of the library's, whose order
    of summation depends on the number of ranks."""

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        parts = parts.view(group.size(), -1)  # [ranks, elements of a part]
        while len(parts) > 1:
            parts = parts[0::2] + parts[1::2]
        output_tensor.copy_(parts.view_as(output_tensor))


def squared_norm(parameters: list[Tensor]) -> Tensor:
    """The squared L2 norm, float64, of what this rank holds of all gradients.

    On a CPU of the norms of rows, which are exact to float32's last digits: torch adds up millions of squares one by
    one there, and is off by 2e-4. A GPU adds them up in a tree, and those of many tensors at once.
    """
    gradients = [local(p.grad) for p in parameters]
    if gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients).double().square()
    rows = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    return torch.cat(rows).double().square().sum()


def squared_norm_in_any_order(parameters: list[Tensor], ranks: Ranks) -> Tensor:
    """The squared L2 norm of all gradients, float64, the same to the last bit however rows are divided among ranks.

    The squares of a row are added up in pairs, so that no sum depends on how many rows are here. Those of rows are
    rounded to multiples of 2^-40 of the largest: integers, whose sum does not depend on the order. The rounding changes
    the norm by less than 1e-9; a gradient that is not finite makes it NaN.
    """
    rows = torch.cat([_sum_in_pairs(local(p.grad)) for p in parameters])
    rows = rows.where(rows.isfinite(), torch.inf)  # a maximum may pass over NaN
    largest = ranks.max(rows.amax())
    unit = largest.where(largest.isfinite(), torch.nan) / 2.0**40
    counts = (rows / unit).round().where(rows > 0, 0).long().sum()
    return ranks.sum(counts) * unit


def _sum_in_pairs(x: Tensor) -> Tensor:
    """The sum of squares of every row of x [rows, columns], or of every element of x [rows]: float64 [rows]."""
    x = x.double().square().view(len(x), -1 if len(x) else 1)
    while (columns := x.shape[1]) > 1:
        pairs = x[:, 0 : columns - 1 : 2] + x[:, 1:columns:2]
        x = torch.cat((pairs, x[:, -1:]), dim=1) if columns % 2 else pairs
    return x[:, 0]


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
