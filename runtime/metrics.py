"""What a run tells while it goes: metrics.jsonl, the progress bar, TensorBoard, Weights & Biases, a profile."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from runtime.errors import UserError

LOGGERS = ("tensorboard", "wandb")


class Metrics:
    """Records steps `start`, start + 1, … of a run of `steps`; records of later steps in an old file are dropped.

    `loggers` are names of LOGGERS. Raises UserError when one is not installed or the old file is damaged.
    """

    def __init__(self, run: Path, start: int, steps: int, loggers: list[str], settings: dict):
        path = run / "metrics.jsonl"
        keep_records(path, start)
        self.loggers = [open_logger(name, run, settings) for name in loggers]
        self.file = path.open("a")
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.printed = -math.inf

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.bar.close()

    def record(self, **values) -> None:
        """Append one step; numbers that are not finite become null, as JSON has no word for them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        for log in self.loggers:
            log(finite)
        summary = f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tokens/s"
        self.bar.set_postfix_str(summary, refresh=False)
        self.bar.update()
        now, done = time.monotonic(), values["step"] + 1
        if self.bar.disable and (
            now - self.printed > 10 or done == self.bar.total
        ):  # not a terminal: a line now and then
            print(f"step {done}/{self.bar.total}: {summary}", flush=True)
            self.printed = now


def keep_records(path: Path, start: int) -> None:
    """Drop the records of steps from `start` on, which a run that resumes there is going to write again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    try:
        steps = [
            json.loads(line)["step"] if line.endswith("\n") else start for line in lines
        ]  # the last may be cut off
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: move it away to go on without the old records") from None
    if any(step >= start for step in steps):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line for line, step in zip(lines, steps) if step < start))
        temporary.rename(path)


def open_logger(name: str, run: Path, settings: dict) -> Callable[[dict], None]:
    """A function that sends one record to TensorBoard (RUN/tensorboard) or Weights & Biases."""

    def scalars(record: dict) -> dict:
        return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}

    if name == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--log tensorboard needs `pip install tensorboard`") from None
        writer = SummaryWriter(run / "tensorboard")

        def log(record: dict) -> None:
            for key, value in scalars(record).items():
                writer.add_scalar(key, value, record["step"])

        return log
    try:
        import wandb
    except ImportError:
        raise UserError("--log wandb needs `pip install wandb`") from None
    wandb.init(project="tripod", name=run.name, id=run.name, dir=run, config=settings, resume="allow")
    return lambda record: wandb.log(scalars(record), step=record["step"])


class StepTimer:
    """Where the seconds of a step go, on the device's own clock: a GPU works behind the host, which need not wait."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def start(self) -> None:
        self.marks = []
        self.mark()

    def mark(self) -> None:
        """A lap ends here, and the next one starts."""
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every lap. To be asked after the device was waited for."""
        pairs = zip(self.marks, self.marks[1:])
        return [a.elapsed_time(b) / 1000 if self.cuda else b - a for a, b in pairs]


@contextmanager
def profiler(run: Path, start: int, steps: int, rank: int) -> Iterator[Callable[[], None]]:
    """A function to call after every step, from `start` on: RUN/profile gets a trace of `steps` steps, the first two
    left out, for chrome://tracing or https://ui.perfetto.dev. No steps: no trace."""
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
