"""What a machine is and what it does at best, the bandwidth of a copy and the rate of a product; and the clock.

A GPU is timed by events that the device itself stamps when it reaches them, so that neither the launch nor the wait is
counted. Before each round a buffer far larger than the L2 cache is written and read: the round finds nothing of its
inputs there and has nothing of others to write back, and while the device is busy with that buffer the host runs ahead
and has launched what follows. A CPU is timed by the clock, with its caches as they are, and again when other processes
have disturbed it.
"""

import os
import platform
import re
import resource
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from bench.peers import PACKAGES
from kernels.linear import matmul

WARM_UP = 2  # rounds that do not count
ROUNDS = {"cuda": 10, "cpu": 5}  # that count, at least
SHORTEST = {"cuda": 0.0, "cpu": 0.2}  # seconds of all rounds: the kernel counts foreign CPU time in ticks of 10 ms
AHEAD = {"cuda": 6, "cpu": 1}  # flushes before a round, 4 ms of a GPU, in which the host launches even many kernels
FOREIGN = 0.06  # share of all CPU time that other processes may take in a measurement before it is made again
ATTEMPTS = 3  # of a measurement


def machine(device: torch.device) -> dict:
    """What was measured on."""
    cpu = platform.processor()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        cpu = found[1] if found else cpu
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in dict.fromkeys(("torch", *PACKAGES.values())):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": cpu, "cores": os.cpu_count(), "gpu": gpu, "system": platform.platform(), "versions": versions}


# The clock


class Moment:
    """A point in the work queued on a CUDA device; the difference of two is in seconds, and waits for both."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable:
    """What is called before and after a round, to subtract the one from the other: the seconds of the round."""
    return Moment if device.type == "cuda" else time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flush_of(device: torch.device) -> Callable[[], object]:
    """A function that empties the L2 cache of a GPU."""
    buffer = torch.empty(2**28 if device.type == "cuda" else 0, device=device)  # 1 GiB
    return lambda: buffer.zero_().sum()


class ForeignCPU:
    """What share of the machine's CPU time other processes take from now on; None where there is no /proc."""

    def __init__(self):
        self.began, self.before = time.perf_counter(), self.foreign_seconds()

    def share(self) -> float | None:
        if self.before is None:
            return None
        seconds = time.perf_counter() - self.began
        return max(0.0, self.foreign_seconds() - self.before) / (seconds * os.cpu_count())

    @staticmethod
    def foreign_seconds() -> float | None:
        if not Path("/proc/stat").exists():
            return None
        own = resource.getrusage(resource.RUSAGE_SELF)
        with open("/proc/stat") as file:  # cpu user nice system idle iowait irq softirq steal ..., in ticks
            user, nice, system, _, _, irq, softirq, steal = map(int, file.readline().split()[1:9])
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return busy - own.ru_utime - own.ru_stime


def undisturbed(work: Callable[[], list[float]], device: torch.device) -> list[float]:
    """What work() returns; on a CPU it works again while other processes disturb it, and the least disturbed counts."""
    attempts = []
    for attempt in range(1 if device.type == "cuda" else ATTEMPTS):
        time.sleep(0.2 * attempt)  # what disturbs may pass
        watch = ForeignCPU()
        result = work()
        attempts.append((watch.share() or 0.0, result))
        if attempts[-1][0] <= FOREIGN:
            break
    return min(attempts)[1]


def measure(
    call: Callable, device: torch.device, flush: Callable, setup: Callable[[], tuple[Tensor, ...]] = tuple
) -> list[float]:
    """Seconds of call(*setup()), setup not counted, in each of some rounds."""
    now = clock(device)

    def rounds() -> list[float]:
        seconds, began = [], time.perf_counter()
        while len(seconds) < ROUNDS[device.type] or time.perf_counter() - began < SHORTEST[device.type]:
            arguments = setup()
            for _ in range(AHEAD[device.type]):
                flush()
            start = now()
            call(*arguments)
            seconds.append(now() - start)
        return seconds

    for _ in range(WARM_UP):
        call(*setup())
    return undisturbed(rounds, device)


# The ceilings


def copy_bandwidth(device: torch.device, flush: Callable) -> float:
    """Bytes/s, read and written, of a copy far larger than the caches, in its best round."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(measure(lambda: target.copy_(source), device, flush))


def product_rate(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device, flush: Callable) -> float:
    """FLOP/s of the product of an m x k and a k x n matrix, by the library that the model's products take (see
    kernels/linear.py), in its best round."""
    x, weight = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
    return 2 * m * n * k / min(measure(lambda: matmul(x, weight), device, flush))


def product_ceiling(dtype: torch.dtype, device: torch.device, flush: Callable) -> float:
    """FLOP/s of a large square product: what no product of a step is expected to exceed."""
    n = 8192 if device.type == "cuda" else 2048
    return product_rate(n, n, n, dtype, device, flush)
