"""The clock of all benchmarks, and what to do when other processes disturb a measurement.

A GPU is timed by CUDA events, which the device stamps when it reaches them. So neither the launch nor the wait is
counted. Before each round a buffer far larger than the L2 cache is zeroed and read. This removes the inputs of the
round from the cache, and it leaves no dirty lines of other work to write back. While the device is busy with the
buffer, the host already launches the kernels of the round.

A CPU is timed by the wall clock, and its caches are not flushed. If other processes disturb a measurement, it is
repeated.
"""

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

WARM_UP = 2  # rounds that are not timed
ROUNDS = {"cuda": 10, "cpu": 5}  # timed rounds, at least
SHORTEST = {"cuda": 0.0, "cpu": 0.2}  # seconds of all rounds, at least: /proc/stat counts CPU time in ticks of 10 ms
AHEAD = {"cuda": 6, "cpu": 1}  # flushes before a round: on a GPU 4 ms, in which the host can launch many kernels
FOREIGN = 0.06  # a measurement is disturbed if other processes took more than this fraction of the CPU time
ATTEMPTS = 3  # of a disturbed measurement


class Moment:
    """A point in the work queued on a CUDA device. The difference of two waits for both and is in seconds."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Moment") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: torch.device) -> Callable:
    """Returns the clock of a device: clock() before and after a round, and their difference is in seconds."""
    return Moment if device.type == "cuda" else time.perf_counter


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def flush_of(device: torch.device) -> Callable[[], object]:
    """Returns a function that flushes the L2 cache of a GPU."""
    buffer = torch.empty(2**28 if device.type == "cuda" else 0, device=device)  # 1 GiB
    return lambda: buffer.zero_().sum()


class ForeignCPU:
    """Measures the fraction of the machine's CPU time that other processes take from now on."""

    def __init__(self):
        self.began, self.before = time.perf_counter(), self.foreign_seconds()

    def fraction(self) -> float | None:
        """None on a system without /proc/stat."""
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


def disturbed(measurement: dict) -> bool:
    return (measurement["foreign_cpu"] or 0.0) > FOREIGN


def repeat_while_disturbed(work: Callable[[], dict], attempts: int, pause: float) -> list[dict]:
    """Call work() until it was not disturbed. Before attempt i it waits i * pause seconds for the disturbance to end.

    work returns a measurement with its "foreign_cpu" (a fraction or None). Returns all measurements; the least
    disturbed one has "kept": True.
    """
    measurements = []
    for attempt in range(attempts):
        time.sleep(pause * attempt)
        measurements.append({"kept": False} | work())
        if not disturbed(measurements[-1]):
            break
    min(measurements, key=lambda m: m["foreign_cpu"] or 0.0)["kept"] = True
    return measurements


def undisturbed(work: Callable[[], list[float]], device: torch.device) -> list[float]:
    """What work() returns. On a CPU work() is repeated while other processes disturb it."""

    def watched() -> dict:
        watch = ForeignCPU()
        return {"result": work(), "foreign_cpu": watch.fraction()}

    measurements = repeat_while_disturbed(watched, 1 if device.type == "cuda" else ATTEMPTS, pause=0.2)
    return next(m["result"] for m in measurements if m["kept"])


def measure(
    call: Callable, device: torch.device, flush: Callable, setup: Callable[[], tuple[Tensor, ...]] = tuple
) -> list[float]:
    """Seconds of call(*setup()) in each round. The time of setup is not counted."""
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
