"""The ranks of a run: who they are, and what they tell each other."""

import ctypes
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as torch_dist
from torch import Tensor
from tqdm import tqdm

from runtime.errors import UserError

T = TypeVar("T")
TIMEOUT = timedelta(minutes=30)  # until a rank that waits for another gives up


@dataclass(frozen=True)
class Dist:
    """This process among those that train together."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    local_world_size: int = 1  # ranks on this machine
    group: torch_dist.ProcessGroup | None = None  # None: torch's default
    store: torch_dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """Whether it is this process that prints and writes files."""
        return self.rank == 0

    def print(self, line: str) -> None:
        if self.is_main:
            tqdm.write(line)

    def all_reduce(self, x: Tensor) -> Tensor:
        """x, added up over all ranks, on every rank."""
        if self.world_size > 1:
            torch_dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """The largest x of all ranks, on every rank."""
        if self.world_size > 1:
            torch_dist.all_reduce(x, torch_dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The x of all ranks, [world, ..], on every rank."""
        if self.world_size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        torch_dist.all_gather(parts, x, self.group)
        return torch.stack(parts)

    def all_gather_str(self, text: str) -> list[str]:
        """The texts of all ranks, on every rank. (torch's gathering of objects would pickle them.)"""
        mine = torch.frombuffer(bytearray(text.encode() + b"\0"), dtype=torch.uint8)
        lengths = self.all_gather(torch.tensor(len(mine))).tolist()
        padded = torch.zeros(max(lengths), dtype=torch.uint8)
        padded[: len(mine)] = mine
        return [row[: n - 1].numpy().tobytes().decode() for row, n in zip(self.all_gather(padded), lengths)]

    def claim_error_report(self, text: str) -> bool:
        """Whether it is this rank that says what others may want to say too: the first to ask."""
        key, rank = hashlib.sha256(text.encode()).hexdigest(), str(self.rank)
        try:
            return self.store is None or self.store.compare_set(key, "", rank).decode() == rank
        except torch_dist.DistError:  # the store is gone with torchrun: better twice than not at all
            return True

    def run_on_main(self, work: Callable[[], T]) -> T | None:
        """Have the first rank do something while the others wait: it gets the result. A UserError is raised on all."""
        result, error = None, ""
        if self.is_main:
            try:
                result = work()
            except UserError as failure:
                error = str(failure)
        if error := self.all_gather_str(error)[0]:
            raise UserError(error)
        return result

    def barrier(self) -> None:
        """Go on when all ranks have come here."""
        if self.world_size > 1:
            torch_dist.barrier(self.group)

    def with_own_group(self) -> "Dist":
        """The same ranks with a process group of their own, for the CPU tensors of another thread: what two threads
        send in one group would mix. All ranks must call this."""
        return replace(self, group=torch_dist.new_group(backend="gloo")) if self.world_size > 1 else self


def init_dist(bitwise: bool = False) -> Dist:
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
        return Dist(device=device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if world == 1:
        store = torch_dist.HashStore()
    else:
        store = _new_part(next(torch_dist.rendezvous("env://", timeout=TIMEOUT))[0], rank, world)
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    return Dist(rank, world, device, node, store=store)


def _end_with_torchrun() -> None:
    """Have the kernel send SIGTERM, upon which training saves and stops, when torchrun dies without a word to us (kill
    -9). Orphans would train on, and hold GPUs and the run directory. Other systems than Linux have no such call."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _new_part(store: torch_dist.Store, rank: int, world: int) -> torch_dist.Store:
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
            return torch_dist.PrefixStore(name, store)
        time.sleep(0.02)


def end_dist(ranks: Dist, together: bool) -> None:
    """Leave the process group: together, when all ranks come here, or else alone, after an error."""
    if together and ranks.world_size > 1:  # a rank that left would cut off those that still read its last message
        with suppress(torch_dist.DistError):  # the store is gone with torchrun
            ranks.store.set(f"end/{ranks.rank}", "")
            ranks.store.wait([f"end/{rank}" for rank in range(ranks.world_size)], TIMEOUT)
    if torch_dist.is_initialized():
        torch_dist.destroy_process_group()
