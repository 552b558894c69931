"""What a run tells while it goes: metrics.jsonl, the progress bar, TensorBoard and Weights & Biases."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from errors import UserError

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
