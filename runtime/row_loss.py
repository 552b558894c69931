"""RUN/row_loss.bin: the mean loss of every row, in nats, at the moment when the model first met it.

float32 [steps, batch], little-endian: value j of step t belongs to row j of batch t, before update t, wherever the run
began. NaN stands for what is not known: the steps before a branch, and those before the user moved the file away.

    np.fromfile("RUN/row_loss.bin", "<f4").reshape(-1, batch_size)

RUN/probe_loss.bin: the same for the tokens of the probes, of every Nth step: float32 [steps / N, tokens].
"""

import math
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np

from runtime.errors import UserError
from runtime.files import atomic_write, open_regular, reason
from runtime.run_directory import one_line_errors

TOLERANCE = 1e-5  # relative to the loss of a step: the mean of its rows is the same sum in another order
STEPS_AT_ONCE = 256


def check_row_losses(
    path: Path,
    start: int,
    batch: int,
    losses: Mapping[int, float],
    first: int = 0,
    every: int = 1,
    what: str = "rows",
) -> str:
    """Check the row losses of a run that resumes at step `start`. Nothing is changed. `first` is not 0 in a branch.

    losses: those of the steps, from metrics.jsonl. Their rows must have the same mean, or all be NaN. Returns what the
    user should know, or "". Raises UserError that names the first wrong step. Of probes, the file has every Nth step.
    """
    records = -(-start // every)
    needed, advice = records * batch * 4, f"move the file away to go on without the old losses of {what}"
    if not os.path.lexists(path):
        missing = f"{path} is missing: the losses of the {what} of steps {first} to {start - 1} are not there"
        return missing * (start > first)
    try:
        with open_regular(path) as file:
            if (size := os.fstat(file.fileno()).st_size) < needed:
                raise ValueError(f"it has {size} bytes, the checkpoint of step {start} needs {needed}")
            for record in range(0, records, STEPS_AT_ONCE):
                steps = [t * every for t in range(record, min(record + STEPS_AT_ONCE, records))]
                rows = np.fromfile(file, "<f4", len(steps) * batch).reshape(len(steps), batch).astype(np.float64)
                expected = np.array([losses.get(t, math.nan) for t in steps])
                wrong = ~(abs(rows.mean(1) - expected) <= TOLERANCE * abs(expected))
                wrong &= ~np.isnan(expected) & ~np.isnan(rows).all(1)
                if wrong.any():
                    i = wrong.argmax()
                    values = f"{rows[i].mean():.6f}, metrics.jsonl has {expected[i]:.6f}"
                    raise ValueError(f"the {what} of step {steps[i]} have a mean of {values}")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; {advice}") from None
    return ""


class RowLosses(AbstractContextManager):
    """Writes the row losses of the steps `start`, start + 1, ... of a run with `batch` rows a step.

    Older losses in the file, which check_row_losses has checked, are kept. Raises UserError if it cannot be written.
    """

    def __init__(self, path: Path, start: int, batch: int):
        self.path = path
        with one_line_errors(path):
            if not path.exists():
                with atomic_write(path) as file:
                    for _ in range(start):
                        file.write(np.full(batch, np.nan, "<f4").tobytes())
            self.file = path.open("ab", buffering=0)
            self.file.truncate(start * batch * 4)

    def __exit__(self, *exception) -> None:
        with suppress(OSError):
            self.file.close()

    def record(self, losses: np.ndarray) -> None:
        """Append the losses [batch] of the next step. Raises UserError."""
        with one_line_errors(self.path):
            data = memoryview(losses.astype("<f4").tobytes())
            while data:  # an unbuffered file may write a part
                data = data[self.file.write(data) :]

    def sync(self) -> None:
        """Flush the losses to the disk. Raises UserError."""
        with one_line_errors(self.path):
            os.fsync(self.file.fileno())
