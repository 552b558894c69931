"""How long the parts of a step take, and a profile of several steps."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm


class StepTimer:
    """Seconds of the parts of a step, by the device's clock: a GPU runs behind the host, and timing must not wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        """Begin the first interval."""
        self.times = []
        self.lap()

    def lap(self) -> None:
        """End an interval and begin the next one."""
        if self.cuda:
            self.times.append(torch.cuda.Event(enable_timing=True))
            self.times[-1].record()
        else:
            self.times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Seconds of each interval. Call after synchronizing."""
        pairs = zip(self.times, self.times[1:])
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]


def check_trace(path: Path) -> None:
    """Raise OSError if a trace is not complete: torch does not say so when it cannot write one."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - 10, 0))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError("the disk may be full")


@contextmanager
def profiler(run: Path, start: int, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step. It writes a trace of `steps` steps, after two that are left out, to
    RUN/profile, for chrome://tracing or https://ui.perfetto.dev. steps = 0: no trace.

    A run that ends earlier writes a trace of the steps that it made. The message says how many these are. If the trace
    cannot be written, a warning says so, and the run goes on.
    """
    if not steps:
        yield lambda: None
        return
    finished = 0  # steps of the run

    def step() -> None:
        nonlocal finished
        finished += 1
        profile.step()

    def write(profile: torch.profiler.profile) -> None:
        path, traced = run / "profile" / f"step{start + 2}-rank{rank}.json", min(finished - 2, steps)
        if not traced:
            return
        try:
            path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))
            check_trace(path)
        except (OSError, RuntimeError) as error:
            tqdm.write(f"warning: {path} cannot be written ({error}); the run goes on", file=sys.stderr)
            return
        if rank == 0:
            asked = f" ({steps} were asked for, but the run ended)" if traced < steps else ""
            tqdm.write(f"profile of {traced} step{'s' * (traced > 1)}{asked}: {path}")

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield step
    if rank == 0 and finished <= 2:
        tqdm.write(f"--profile {steps}: no trace, because it leaves out two steps and the run made only {finished}")
