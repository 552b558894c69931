"""metrics.jsonl at a resume: its records are those of the steps before, or one line says which line is wrong."""

import io
import json
import os
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from runtime.errors import UserError
from runtime.metrics import Metrics, read_records


def line(step: object) -> bytes:
    return json.dumps({"step": step, "loss": 2.5, "batch_sha256": f"{step}" * 4}).encode() + b"\n"


FIVE = [line(step) for step in range(5)]


def written(path: Path, lines: list[bytes]) -> Path:
    path.write_bytes(b"".join(lines))
    return path


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize("start", range(6))
@pytest.mark.parametrize("end", [b"", b'{"step": 5, "lo', b'{"step"', b"\0\0\0"])
def test_whole_records(path, start, end):
    """The records before `start` are kept, and the batches of the last of these and of all later ones are known."""
    old = read_records(written(path, [*FIVE, end]), start, [])
    assert path.read_bytes()[: old.end] == b"".join(FIVE[:start])
    assert old.batches == {step: f"{step}" * 4 for step in range(max(start - 1, 0), 5)}
    assert old.note == ""


@pytest.mark.parametrize(
    ("lines", "number", "reason"),
    [
        ([*FIVE[:2], FIVE[3]], 3, "step 3 follows step 1"),
        ([*FIVE[:3], FIVE[2], *FIVE[3:]], 4, "step 2 follows step 2"),
        ([*FIVE[:3], *FIVE], 4, "step 0 follows step 2"),
        ([*FIVE, FIVE[1]], 6, "step 1 follows step 4"),
        (FIVE[1:], 1, "the first record is of step 1"),
        ([FIVE[1], FIVE[0], *FIVE[2:]], 1, "the first record is of step 1"),
        ([FIVE[0], line(1.0), *FIVE[2:]], 2, "it is not a JSON object with a step"),
        ([FIVE[0], line(True), *FIVE[2:]], 2, "it is not a JSON object with a step"),
        ([line("0"), *FIVE[1:]], 1, "it is not a JSON object with a step"),
        ([line(-1), *FIVE], 1, "it is not a JSON object with a step"),
        ([FIVE[0], b'{"loss": 1}\n'], 2, "it is not a JSON object with a step"),
        ([FIVE[0], b"\xff" + FIVE[1], *FIVE[2:]], 2, "it is not a JSON object with a step"),
        ([FIVE[0], bytes(len(FIVE[1])), *FIVE[2:]], 2, "it is not a JSON object with a step"),
        ([FIVE[0], b"\n", *FIVE[1:]], 2, "it is not a JSON object with a step"),
        ([b"[" * 100_000 + b"\n"], 1, "it is not a JSON object with a step"),
        ([bytes(2**24), *FIVE], 1, "it is not a JSON object with a step"),
    ],
)
def test_the_first_wrong_line_is_named(path, lines, number, reason):
    before = written(path, lines).read_bytes()
    with pytest.raises(UserError) as error:
        read_records(path, 3, [])
    assert str(error.value) == (
        f"{path}, line {number}: {reason}; the checkpoint needs the records of steps 0 to 2: move the file away to go "
        f"on without the old records"
    )
    assert path.read_bytes() == before


@pytest.mark.parametrize(("lines", "number"), [([], 0), (FIVE[:2], 2), ([*FIVE[:2], b'{"step": 2'], 2)])
def test_too_few_records(path, lines, number):
    with pytest.raises(UserError, match=f"ends after line {number}; the checkpoint needs the records of steps 0 to 2"):
        read_records(written(path, lines), 3, [])


@pytest.mark.parametrize("tail", [b"\0" * 50 + b"\n", b"{}\n", FIVE[4]])
def test_damage_behind_the_checkpoint_is_told_and_dropped(path, tail):
    """A power cut may damage records that no checkpoint covers. The run makes these steps again."""
    old = read_records(written(path, [*FIVE[:3], tail, FIVE[3]]), 3, [])
    assert old.end == len(b"".join(FIVE[:3]))
    assert f"{path}, line 4: " in old.note


def test_records_after_the_old_file_was_moved_away(path):
    """The user did so at step 3. Later starts accept the new file, and the first one says what is missing."""
    assert read_records(path, 3, [0]).note == f"{path} is missing: the records of steps 0 to 2 are not there"
    assert read_records(path, 0, []).note == ""
    old = read_records(written(path, FIVE[3:]), 5, [0, 3])
    assert (old.end, old.note) == (path.stat().st_size, "")
    assert read_records(path, 2, [0, 3]).end == 0  # back at an older checkpoint


@pytest.mark.parametrize("what", ["fifo", "directory", "device"])
def test_something_else_than_a_file(path, what):
    if what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"^{path}.*(not a regular file|Is a directory)"):
        read_records(path, 3, [])


def test_a_long_file_is_read_in_a_second(path):
    values = dict.fromkeys(("loss", "lr", "grad_norm", "tokens", "tokens_per_s", "mfu", "seconds"), 0.12345678)
    lines = [json.dumps({"step": s, **values, "batch_sha256": "0" * 64}).encode() + b"\n" for s in range(143_000)]
    written(path, lines)
    began = time.process_time()
    assert read_records(path, 143_000, []).end == path.stat().st_size
    assert time.process_time() - began < 5  # about 0.6 on an idle machine


def test_a_disk_that_is_full(path):
    """One line names the file, when a record is written and when the records are flushed to the disk."""
    with Metrics(read_records(path, 0, []), 0, 9, [], {}) as metrics:
        metrics.record(step=0, loss=1.0, tokens_per_s=1.0)
        metrics.sync()
        metrics.file.close()
        metrics.file = Path("/dev/full").open("ab")  # noqa: SIM115 (closed by Metrics)
        with pytest.raises(UserError, match=rf"^{path} cannot be written \(No space left on device\): make"):
            metrics.record(step=1, loss=1.0, tokens_per_s=1.0)
        with pytest.raises(UserError, match=rf"^{path} cannot be written \(Invalid argument\): make"):
            metrics.sync()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0]


def test_a_place_that_cannot_be_written(path):
    old = read_records(written(path, FIVE), 5, [])
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"^{path} cannot be written \(Is a directory\): make"):
        Metrics(old, 5, 9, [], {})


@pytest.mark.parametrize(("terminal", "period"), [(True, 1), (False, 10)])
def test_progress_inside_a_long_step(terminal, period, path, monkeypatch, capsys):
    """The bar shows it once a second; without a terminal there is a line in ten seconds. Short steps show nothing."""
    now, screen = 100.0, io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Metrics(read_records(path, 0, []), 0, 9, [], {}) as metrics:
        if terminal:
            metrics.bar = tqdm(total=9, file=screen, mininterval=0)
        for step in range(3):
            for done in range(1, 8):
                now += period / 4 if step == 1 else period / 10
                metrics.show_progress(step, done, 8)
            now += 0.01
            metrics.record(step=step, loss=2.0, tokens_per_s=30.0)
    shown = screen.getvalue() if terminal else capsys.readouterr().out
    assert [f"micro-step {done} of 8" in shown for done in range(1, 9)] == [done == 4 for done in range(1, 9)]
    if terminal:
        assert "loss 2.000, 30 tokens/s, micro-step 4 of 8" in shown
    else:
        assert "step 2/9: micro-step 4 of 8\n" in shown
