"""What a run reports: metrics.jsonl, the progress bar, TensorBoard, Weights & Biases, a profile."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_write

LOGGERS = ("tensorboard", "wandb")


class Metrics(AbstractContextManager):
    """Records the steps `start`, start + 1, ... of a run of `steps` steps; older records of these steps are removed.

    `loggers` are names of LOGGERS. Raises UserError if one is not installed, or if the old records are damaged.
    """

    def __init__(self, run: Path, start: int, steps: int, loggers: list[str], settings: dict):
        path = run / "metrics.jsonl"
        keep_records(path, start)
        self.loggers = [open_logger(name, run, settings) for name in loggers]
        self.file = path.open("a")
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.printed = -math.inf

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.bar.close()

    def record(self, **values) -> None:
        """Append one step: `step`, `loss`, `tokens_per_s`, and more. NaN and infinity become null: JSON lacks them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        for log in self.loggers:
            log(finite)
        summary = f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tokens/s"
        self.bar.set_postfix_str(summary, refresh=False)
        self.bar.update()
        now, done = time.monotonic(), values["step"] + 1
        if self.bar.disable and (now - self.printed > 10 or done == self.bar.total):  # no terminal: a line in 10 s
            print(f"step {done}/{self.bar.total}: {summary}", flush=True)
            self.printed = now


def keep_records(path: Path, start: int) -> None:
    """Remove the records of step `start` and later, because a run that resumes at `start` writes them again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    try:  # a line without its end was cut off when the run was killed
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: move it away to go on without the old records") from None
    if kept != lines:
        with atomic_write(path, "w") as file:
            file.writelines(kept)


def open_logger(name: str, run: Path, settings: dict) -> Callable[[dict], None]:
    """A function that sends one record to TensorBoard (RUN/tensorboard) or Weights & Biases."""

    def scalars(record: dict) -> dict:
        return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}

    def log(record: dict) -> None:
        for key, value in scalars(record).items():
            writer.add_scalar(key, value, record["step"])

    try:
        if name == "wandb":
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(f"--log {name} needs `pip install {name}`") from None
    if name == "wandb":
        wandb.init(project="tripod", name=run.name, id=run.name, dir=run, config=settings, resume="allow")
        return lambda record: wandb.log(scalars(record), step=record["step"])
    writer = SummaryWriter(run / "tensorboard")
    return log


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


@contextmanager
def profiler(run: Path, start: int, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """Yields a function to call after every step. It writes a trace of `steps` steps, after two that are left out, to
    RUN/profile, for chrome://tracing or https://ui.perfetto.dev. steps = 0: no trace."""
    if not steps:
        yield lambda: None
        return

    def write(profile: torch.profiler.profile) -> None:
        path = run / "profile" / f"step{start + 2}-rank{rank}.json"
        path.parent.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(path))
        if rank == 0:
            tqdm.write(f"profile of {steps} steps: {path}")

    schedule = torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1)
    with torch.profiler.profile(schedule=schedule, on_trace_ready=write) as profile:
        yield profile.step
