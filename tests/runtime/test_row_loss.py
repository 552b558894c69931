"""row_loss.bin: what is written comes back, and a file that is not that of the run is refused in one line."""

import os
from pathlib import Path

import numpy as np
import pytest

from runtime import row_loss
from runtime.errors import UserError
from runtime.row_loss import RowLosses, check_row_losses

BATCH = 4
ROWS = np.random.default_rng(0).uniform(2, 11, (9, BATCH)).astype("<f4")
LOSSES = dict(enumerate(ROWS.astype(float).mean(1).tolist()))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "row_loss.bin"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(row_loss, "STEPS_AT_ONCE", 2)


def stored(path: Path) -> np.ndarray:
    return np.fromfile(path, "<f4").reshape(-1, BATCH)


def write(path: Path, start: int, stop: int) -> None:
    with RowLosses(path, start, BATCH) as file:
        for step in range(start, stop):
            file.record(ROWS[step])
        file.sync()


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 15, b"\0" * 99])
def test_a_run_that_was_killed_ends_with_the_same_bytes(start, tail, path):
    """It stopped anywhere after step `start`, also in the middle of a write."""
    write(path, 0, 5)
    with path.open("ab") as file:
        file.write(tail)
    assert check_row_losses(path, start, BATCH, LOSSES) == ""
    write(path, start, 9)
    assert path.read_bytes() == ROWS.tobytes()


def test_steps_that_are_not_known_are_nan(path):
    assert check_row_losses(path, 3, BATCH, LOSSES) == (
        f"{path} is missing: the losses of the rows of steps 0 to 2 are not there"
    )
    assert check_row_losses(path, 3, BATCH, {}, first=3) == ""  # a branch begins
    write(path, 3, 5)
    assert np.isnan(stored(path)[:3]).all()
    assert np.array_equal(stored(path)[3:], ROWS[3:5])
    assert check_row_losses(path, 5, BATCH, LOSSES) == ""


@pytest.mark.parametrize("value", [0, np.nan, np.inf, 1e30, 1.001])
@pytest.mark.parametrize("step", range(5))
def test_one_changed_value_is_found(step, value, path):
    changed = ROWS[:5].copy()
    changed[step, 3] = changed[step, 3] * 1.001 if value == 1.001 else value
    path.write_bytes(changed.tobytes())
    with pytest.raises(UserError, match=rf"^{path}: the rows of step {step} have a mean of .*; move the file away"):
        check_row_losses(path, 5, BATCH, LOSSES)
    assert check_row_losses(path, step, BATCH, LOSSES) == ""  # the run makes this step again
    known = {t: loss for t, loss in LOSSES.items() if t != step}  # of a step that overflowed, or of moved records
    assert check_row_losses(path, 5, BATCH, known) == ""


def test_a_file_that_is_too_short(path):
    path.write_bytes(ROWS.tobytes()[:-1])
    with pytest.raises(UserError, match=rf"^{path}: it has 143 bytes, the checkpoint of step 9 needs 144; move"):
        check_row_losses(path, 9, BATCH, LOSSES)


@pytest.mark.parametrize("what", ["fifo", "directory"])
def test_something_else_than_a_file(path, what):
    if what == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(UserError, match=rf"^{path}.*(not a regular file|Is a directory)"):
        check_row_losses(path, 3, BATCH, LOSSES)


def test_a_disk_that_is_full(path):
    with RowLosses(path, 0, BATCH) as file:
        file.file.close()
        file.file = Path("/dev/full").open("ab", buffering=0)  # noqa: SIM115 (closed by RowLosses)
        with pytest.raises(UserError, match=rf"^{path} cannot be written \(No space left on device\): make"):
            file.record(ROWS[0])
        with pytest.raises(UserError, match=rf"^{path} cannot be written \(Invalid argument\): make"):
            file.sync()
