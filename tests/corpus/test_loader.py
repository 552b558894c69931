"""The Loader reads batches ahead on a thread."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from corpus.loader import Loader, verify_in_background
from runtime.errors import UserError


def test_reads_one_step_ahead_and_no_further(device):
    asked, done = [], {step: threading.Event() for step in (7, 8, 9)}

    def read(step: int) -> np.ndarray:
        asked.append(step)
        done[step].set()
        return np.full((2, 3, 5), step, dtype=np.uint16)

    def read_weights(step: int) -> np.ndarray | None:
        return np.full((2, 3, 4), step, np.float32) if step == 8 else None

    with Loader(read, 7, 10, device, read_weights) as loader:
        for step in (7, 8, 9):
            batch = loader.next()
            assert (batch.weights is None) == (step != 8)
            assert step != 8 or (batch.weights == 8).all()
            assert batch.tokens.dtype == torch.int64
            assert batch.tokens.device.type == device.type
            assert torch.equal(batch.tokens.cpu(), torch.full((2, 3, 5), step))
            assert batch.digests.shape == (2, 3, 32)
            assert done[min(step + 1, 9)].wait(60)
            assert asked == list(range(7, min(step + 2, 10)))


def test_an_error_in_read_is_raised_by_next_of_that_step(device):
    def read(step: int) -> np.ndarray:
        if step == 2:
            raise ValueError("step 2 cannot be read")
        return np.zeros((1, 1, 5), dtype=np.int32)

    with Loader(read, 1, 9, device) as loader:
        loader.next()
        with pytest.raises(ValueError, match="step 2 cannot"):
            loader.next()


def test_damage_that_is_found_in_the_background_is_raised_by_the_next_check():
    def verify() -> None:
        assert again.wait(60)
        raise UserError("damaged")

    again, before = threading.Event(), set(threading.enumerate())
    check = verify_in_background(SimpleNamespace(verify=verify))
    check(3)  # nothing found yet
    again.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
    with pytest.raises(UserError, match="damaged"):
        check(4)


def test_the_order_of_copies_and_waits_on_a_gpu(streams, monkeypatch):
    """Copies run on a stream of their own. The stream that computes waits for them, and holds on to their memory."""

    class Tokens:
        """A tensor that logs on which stream it is copied and used."""

        def pin_memory(self) -> "Tokens":  # a copy from memory that is not page-locked would stop the host
            streams.append(("pin",))
            return self

        def to(self, device, non_blocking: bool) -> "Tokens":
            assert non_blocking
            streams.append(("copy", torch.cuda.current_stream().name))
            return self

        def record_stream(self, stream) -> None:
            streams.append(("hold", stream.name))

    from_numpy = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda x: Tokens() if x.dtype == np.int64 else from_numpy(x))
    rows = np.zeros((1, 1, 5), np.uint16)
    with Loader(lambda step: rows, 0, 1, SimpleNamespace(type="cuda")) as loader:
        loader.next()
    copied = [("pin",), ("copy", "copies"), ("record", "copies")]
    assert streams == [*copied, ("wait", "main", "event"), ("hold", "main")]
