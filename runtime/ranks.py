"""The ranks of a run: how they start, find each other, and communicate."""

import atexit
import ctypes
import hashlib
import os
import re
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
TIMEOUT = timedelta(minutes=30)  # how long a rank waits for the others in a collective
LOST_CONTACT = re.compile(  # what gloo, NCCL and torch's store say when another process or the network failed
    r"Connection (closed|reset|refused|timed out|was likely closed)|Broken pipe|Socket (closed|Timeout)"
    r"|No route to host|Network is unreachable|Timed out waiting|wait timeout|Application timeout"
    r"|ncclRemoteError|ncclSystemError|remote process exited|communicator was aborted"
)


@dataclass(frozen=True)
class Dist:
    """This process and its connection to the other ranks. All ranks must make the same calls of its methods, except of
    `print` and `claim_error_report`."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    local_world_size: int = 1  # ranks on this machine
    group: torch_dist.ProcessGroup | None = None  # None: torch's default group
    store: torch_dist.Store | None = None

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes shared files."""
        return self.rank == 0

    def print(self, line: str) -> None:
        """Print a line on rank 0, above the progress bar."""
        if self.is_main:
            tqdm.write(line)

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum x over all ranks, in place."""
        if self.world_size > 1:
            torch_dist.all_reduce(x, group=self.group)
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Maximum of x over all ranks, in place."""
        if self.world_size > 1:
            torch_dist.all_reduce(x, torch_dist.ReduceOp.MAX, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """The x of all ranks: [world_size, ..], on every rank."""
        if self.world_size == 1:
            return x[None]
        parts = [torch.empty_like(x) for _ in range(self.world_size)]
        torch_dist.all_gather(parts, x, self.group)
        return torch.stack(parts)

    def all_gather_str(self, text: str) -> list[str]:
        """All-gather one string per rank. (all_gather_object would use pickle.)"""
        length = int(self.all_reduce_max(torch.tensor(len(text.encode()) + 1)))
        padded = torch.frombuffer(bytearray(text.encode().ljust(length, b"\0")), dtype=torch.uint8)
        return [row.numpy().tobytes().rstrip(b"\0").decode() for row in self.all_gather(padded)]

    def claim_error_report(self, topic: str) -> bool:
        """True on the first rank that asks; the others stay silent, so that an error is printed once."""
        key, rank = hashlib.sha256(topic.encode()).hexdigest(), str(self.rank)
        try:
            return self.store is None or self.store.compare_set(key, "", rank).decode() == rank
        except torch_dist.DistError:  # the store ended with torchrun: an error printed twice is better than none
            return True

    def run_on_main(self, work: Callable[[], T]) -> T | None:
        """Run `work` on rank 0 while the others wait. Returns its result on rank 0, None on the others. A UserError of
        `work` is raised on all ranks."""
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
        """Wait for all ranks."""
        if self.world_size > 1:
            torch_dist.barrier(self.group)

    def with_own_group(self) -> "Dist":
        """The same ranks with a new gloo process group, for CPU tensors of another thread. Two threads must not share a
        process group: their messages would mix."""
        return replace(self, group=torch_dist.new_group(backend="gloo")) if self.world_size > 1 else self


def init_dist(bitwise: bool = False) -> Dist:
    """Join the process group described by torchrun's environment variables. Without them this process is alone.

    Raises UserError if a rank finds no GPU of its own, or if --bitwise does not work with this number of ranks.
    """
    _save_when_torchrun_dies()
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if bitwise and world_size.bit_count() != 1:
        raise UserError(f"--bitwise adds up gradients in pairs: it needs 1, 2, 4, 8 ... ranks, not {world_size}")
    if torch.cuda.is_available():
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(f"rank {rank} finds no GPU of its own: this machine has {gpus}; lower --nproc-per-node")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif bitwise:
        torch.set_num_threads(1)  # the order of a sum depends on the number of threads
    if world_size == 1 and not bitwise:
        return Dist(device=device)
    if world_size == 1:
        store = torch_dist.HashStore()  # --bitwise uses FSDP2 on one rank too, which needs a process group
    else:
        store = _unused_part(next(torch_dist.rendezvous("env://", timeout=TIMEOUT))[0], rank, world_size)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return Dist(rank, world_size, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), store=store)


def _save_when_torchrun_dies() -> None:
    """Make Linux send SIGTERM to this rank when torchrun dies, even by kill -9: the rank saves and stops. Otherwise it
    trains on, and occupies its GPU and the run directory."""
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _unused_part(store: torch_dist.Store, rank: int, world_size: int) -> torch_dist.Store:
    """A part of torchrun's store that no earlier start has used, the same on all ranks.

    After a restart the store still holds the addresses of processes that are gone. torchrun's count of restarts does
    not tell old from new, because on a node that joins later it starts at 0. So rank 0 offers a random name for the
    part. Every rank answers with the name and a random word of its own. Rank 0 confirms the name with the words of all
    ranks. A rank accepts a confirmation only if it contains the rank's word: otherwise it is from an earlier start.
    """
    word = uuid4().hex
    if rank == 0:
        store.set("offer", word)
    while True:
        name = store.get("offer").decode()
        store.set(f"word/{rank}", f"{name} {word}")
        if rank == 0:
            words = [store.get(f"word/{r}").decode().split() for r in range(world_size)]
            if all(offered == name for offered, _ in words):
                store.set(f"answer/{name}", " ".join(own for _, own in words))
        if store.check([f"answer/{name}"]) and word in store.get(f"answer/{name}").decode():
            return torch_dist.PrefixStore(name, store)
        time.sleep(0.02)


def lost_contact(error: BaseException | None) -> str:
    """The first sentence of an error of torch if it says that another process or the network failed, else ""."""
    lost = isinstance(error, RuntimeError) and LOST_CONTACT.search(str(error))
    return re.split(r"\n|\. ", str(error))[0] if lost else ""


def end_dist(dist: Dist, together: bool) -> None:
    """Leave the process group. together: wait until all ranks come here. Use False after an error: then, on GPUs, the
    process exits without leaving, because NCCL would wait for kernels that wait for other ranks, perhaps for ever."""
    if together and dist.world_size > 1:  # a rank that leaves early would cut off ranks that still receive from it
        with suppress(torch_dist.DistError):  # the store ended with torchrun
            dist.store.set(f"end/{dist.rank}", "")
            dist.store.wait([f"end/{rank}" for rank in range(dist.world_size)], TIMEOUT)
    if not torch_dist.is_initialized():
        return
    if together or dist.device.type != "cuda":
        torch_dist.destroy_process_group()
    else:
        atexit.register(_exit_at_once)


def _exit_at_once() -> None:
    """End the process after its error is printed, without the destructors of NCCL."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
