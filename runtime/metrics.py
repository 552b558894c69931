"""What a run reports: metrics.jsonl, the progress bar, TensorBoard, Weights & Biases."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from uuid import uuid4

from tqdm import tqdm

from runtime.errors import UserError
from runtime.files import atomic_write, open_regular, reason
from runtime.run_directory import one_line_errors

LOGGERS = ("tensorboard", "wandb")
MAX_LINE = 2**24  # bytes of a record, which has numbers of every rank


@dataclass
class OldRecords:
    """What metrics.jsonl holds when a run resumes."""

    path: Path
    end: int = 0  # bytes of the records to keep; what follows is written again
    batches: dict[int, str] = field(default_factory=dict)  # batch_sha256 of the last kept step and of all later ones
    losses: dict[int, float] = field(default_factory=dict)  # of the kept steps, where it is finite
    probe_losses: dict[int, float] = field(default_factory=dict)  # the same, of the kept steps that have it
    note: str = ""  # what the user should know

    def check_batch(self, step: int, sha256: str) -> None:
        """Raise UserError if the batch of a step is not the one that was recorded when the run made this step."""
        before = self.batches.get(step, sha256)
        if before != sha256:
            raise UserError(
                f"step {step}: the data is not that of the run: {self.path} has batch_sha256 {before[:12]}…, "
                f"the batch is now {sha256[:12]}…; put the data back as it was, or choose another --out"
            )


def read_records(path: Path, start: int, starts: Collection[int], first: int = 0) -> OldRecords:
    """Read metrics.jsonl for a run that resumes at step `start`. Nothing is changed.

    The records must be those of steps `first` .. start - 1 in this order; `first` is not 0 in a branch. Records of
    later steps, which the run will make again, and a last line that was cut off, may follow. If the user has moved the
    file away before, the records begin with a step of `starts`. Raises UserError that names the first wrong line.
    """
    old, needed = OldRecords(path), f"the checkpoint needs the records of steps {first} to {start - 1}"
    advice = f"{needed}: move the file away to go on without the old records"
    number, following = 0, None  # following: the step that the next line must have
    try:
        with open_regular(path) as file:
            lines = iter(partial(file.readline, MAX_LINE), b"")
            for line in lines:
                if not line.endswith(b"\n") and len(line) < MAX_LINE:
                    break  # cut off when the run was killed
                number += 1
                record = parse_record(line)
                step, batch, loss = (record.get(key) for key in ("step", "batch_sha256", "loss"))
                if step is None:
                    problem = "it is not a JSON object with a step"
                elif following is None:
                    problem = "" if step in (first, *starts) else f"the first record is of step {step}"
                else:
                    problem = "" if step == following else f"step {step} follows step {following - 1}"
                if problem:
                    if following is None or following < start or (step is not None and step < start):
                        raise UserError(f"{path}, line {number}: {problem}; {advice}")
                    old.note = f"{path}, line {number}: {problem}; the records from step {start} on are written again"
                    break
                following = step + 1
                if following <= start:
                    old.end += len(line)
                    if type(loss) is float:
                        old.losses[step] = loss
                    if type(record.get("probe_loss")) is float:
                        old.probe_losses[step] = record["probe_loss"]
                if following >= start and isinstance(batch, str):
                    old.batches[step] = batch
    except FileNotFoundError:
        old.note = f"{path} is missing: the records of steps {first} to {start - 1} are not there" * (start > first)
        return old
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; move it away to go on without the old records") from None
    if (first if following is None else following) < start:
        raise UserError(f"{path} ends after line {number}; {advice}")
    return old


def recorded_batch(path: Path, step: int) -> str | None:
    """The batch_sha256 of a step in metrics.jsonl, or None if it has no record of it. Raises UserError."""
    try:
        with open_regular(path) as file:
            for line in iter(partial(file.readline, MAX_LINE), b""):
                record = parse_record(line)
                if record.get("step") == step and isinstance(record.get("batch_sha256"), str):
                    return record["batch_sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    return None


def parse_record(line: bytes) -> dict:
    """The record of a line, which has a step; {} if the line is no record."""
    try:
        record = json.loads(line.decode())
        return record if type(record["step"]) is int and record["step"] >= 0 else {}
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}


class Metrics(AbstractContextManager):
    """Records the steps `start`, start + 1, ... of a run of `steps` steps after the `old` records.

    `loggers` are names of LOGGERS. Raises UserError if one is not installed, or if a file cannot be written.
    """

    def __init__(self, old: OldRecords, start: int, steps: int, loggers: list[str], settings: dict):
        self.path = old.path
        self.loggers = [open_logger(name, self.path.parent, settings) for name in loggers]
        with one_line_errors(self.path):
            self.file = self.path.open("ab")
            self.file.truncate(old.end)
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None, dynamic_ncols=True)
        self.printed, self.recorded, self.summary = -math.inf, time.monotonic(), ""

    def __exit__(self, *exception) -> None:
        with suppress(OSError):  # of a record that could not be written, which record() has raised
            self.file.close()
        self.bar.close()

    def record(self, **values) -> None:
        """Append one step: `step`, `loss`, `tokens_per_s`, and more. NaN and infinity become null: JSON lacks them."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with one_line_errors(self.path):
            self.file.write((json.dumps(finite) + "\n").encode())
            self.file.flush()
        for log in self.loggers:
            log(finite)
        self.summary = f"loss {values['loss']:.3f}, {values['tokens_per_s']:,.0f} tokens/s"
        self.bar.set_postfix_str(self.summary, refresh=False)
        self.bar.update()
        now, done = time.monotonic(), values["step"] + 1
        self.recorded = now
        if self.bar.disable and (now - self.printed > 10 or done == self.bar.total):  # no terminal: a line in 10 s
            print(f"step {done}/{self.bar.total}: {self.summary}", flush=True)
            self.printed = now

    def show_progress(self, step: int, done: int, micro_steps: int) -> None:
        """Show how many micro-steps of a long step are done: every second, or without a terminal a line in 10 s."""
        now, progress = time.monotonic(), f"micro-step {done} of {micro_steps}"
        if now - max(self.printed, self.recorded) < (10 if self.bar.disable else 1):
            return
        self.printed = now
        if self.bar.disable:
            print(f"step {step + 1}/{self.bar.total}: {progress}", flush=True)
        else:
            self.bar.set_postfix_str(", ".join(filter(None, (self.summary, progress))))

    def sync(self) -> None:
        """Flush the records to the disk. Raises UserError."""
        with one_line_errors(self.path):
            os.fsync(self.file.fileno())


def import_logger(name: str) -> ModuleType:
    """The library of a logger. Raises UserError if it is not installed."""
    try:
        return import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError:
        raise UserError(f"--log {name} needs `pip install {name}`") from None


def wandb_id(run: Path) -> str:
    """The id of a run at Weights & Biases. RUN/wandb-id keeps it, so that a resumed run continues its curves.

    The name of the directory cannot be the id: it is the same in every checkout. Raises UserError if the file is bad.
    """
    path = run / "wandb-id"
    try:
        if not path.exists():
            with atomic_write(path, "w") as file:
                file.write(uuid4().hex + "\n")
        text = path.read_text().strip()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path} cannot be used ({error}): --log wandb keeps the id of the run there") from None
    if not re.fullmatch("[0-9a-f]{32}", text):
        raise UserError(f"{path} is damaged: delete it to start new curves at Weights & Biases")
    return text


def open_logger(name: str, run: Path, settings: dict) -> Callable[[dict], None]:
    """A function that sends one record to TensorBoard (RUN/tensorboard) or Weights & Biases. Raises UserError."""
    library = import_logger(name)

    def scalars(record: dict) -> dict:
        return {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}

    def log(record: dict) -> None:
        with one_line_errors(run / "tensorboard"):
            for key, value in scalars(record).items():
                writer.add_scalar(key, value, record["step"])

    if name == "wandb":
        options = {"name": run.name, "id": wandb_id(run), "dir": run, "config": settings, "resume": "allow"}
        try:
            library.init(project="tripod", **options)
        except Exception as error:  # no key, no network: errors of wandb and of its libraries
            raise UserError(f"--log wandb: {error}; WANDB_MODE=offline keeps the curves in {run}/wandb") from None
        return lambda record: library.log(scalars(record), step=record["step"])
    with one_line_errors(run / "tensorboard"):
        writer = library.SummaryWriter(run / "tensorboard")
    return log
