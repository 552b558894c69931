"""Batches on their way to the device: read, hashed and copied one step ahead."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from corpus.order import Rows, row_digests
from runtime.errors import UserError


def verify_in_background(rows: Rows) -> Callable[[int], None]:
    """Read the index and the maps in a thread, and compare them with their hashes: a start trusts those that were
    checked before. Returns check(step), which raises UserError once one of them is found damaged."""
    found: list[UserError] = []

    def verify() -> None:
        try:
            rows.verify()
        except UserError as error:
            found.append(error)

    def check(step: int) -> None:
        if found:
            raise found[0]

    Thread(target=verify, daemon=True).start()  # daemon: the end of a run does not wait for it
    return check


class Batch(NamedTuple):
    tokens: Tensor  # [micro_steps, micro_batch, seq_len + 1] int64, on the device
    weights: Tensor | None  # [micro_steps, micro_batch, seq_len] float32, on the device; None: all are 1
    digests: Tensor  # [micro_steps, micro_batch, 32] uint8, on the CPU: sha256 of every row
    copied: torch.cuda.Event | None  # recorded after the copy to a GPU


class Loader:
    """Reads the rows of the steps start .. stop - 1 and copies them to the device.

    A thread reads one step ahead while the device computes. `read` returns the rows of a step,
    [micro_steps, micro_batch, seq_len + 1], and `read_weights` the weights of their losses, [.., seq_len] float32 or
    None. An exception in them is raised again by next().
    """

    def __init__(
        self,
        read: Callable[[int], np.ndarray],
        start: int,
        stop: int,
        device: torch.device,
        read_weights: Callable[[int], np.ndarray | None] = lambda step: None,
    ):
        self.read, self.read_weights, self.steps, self.device = read, read_weights, iter(range(start, stop)), device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "loader")
        self._next = self.thread.submit(self._load)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception) -> None:
        self.thread.shutdown()

    def next(self) -> Batch:
        """Return the batch of the next step, and start to read the one after it."""
        batch = self._next.result()
        self._next = self.thread.submit(self._load)
        if batch.copied:
            batch.copied.wait()
            # The allocator must not reuse this memory before the current stream has read it.
            batch.tokens.record_stream(torch.cuda.current_stream())
            if batch.weights is not None:
                batch.weights.record_stream(torch.cuda.current_stream())
        return batch

    def _load(self) -> Batch:
        step = next(self.steps)  # after the last step: StopIteration, which stays in a future nobody reads
        rows, weights = self.read(step), self.read_weights(step)
        tokens, digests = torch.from_numpy(rows.astype(np.int64)), torch.from_numpy(row_digests(rows))
        weights = None if weights is None else torch.from_numpy(weights)
        if not self.stream:
            return Batch(tokens, weights, digests, None)
        with torch.cuda.stream(self.stream):
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
            if weights is not None:
                weights = weights.pin_memory().to(self.device, non_blocking=True)
        return Batch(tokens, weights, digests, self.stream.record_event())
