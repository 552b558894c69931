"""Names the rank that hangs: when one rank stops, all others wait for it in a collective, which names nobody.

Every second every rank posts a beat in torchrun's store: where its loop is, and for how many beats it has been there.
(Beats, because seconds give a false alarm after the whole job was suspended.) A rank that stalls reads all beats:

    the loop of some rank still moves    that rank is slow, and the others wait for it
    a rank posts no new beats            its process is stopped or dead, or its machine is cut off
    a rank is behind all others          it hangs in its own work, for example it reads from a dead file system
    all ranks are at the same place      the collective itself hangs: the network, or a GPU
    the store does not answer            the machine of rank 0 is down, or cut off from this one
"""

import json
import math
import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from threading import Event, Thread, current_thread, main_thread

from torch.distributed import DistError, PrefixStore

from runtime.errors import UserError
from runtime.ranks import Dist, lost_contact

RESUME = "the same command resumes from the newest checkpoint"
FAREWELL = 3  # after losing a peer, wait this many beats to find out which rank is gone
NOT_STARTED = [-1, 0]


@dataclass
class Beat:
    """What a rank posts. `progress` and `places` are those of the loop and of the saving thread."""

    number: int = 0
    stalled: int = 0  # for how many beats neither of them has moved
    running: bool = True
    progress: list[list[int]] = field(default_factory=lambda: [NOT_STARTED] * 2)  # [step, n-th heartbeat in it]
    places: list[str] = field(default_factory=lambda: ["its start"] * 2)


class Watchdog:
    """Watches the training loops of all ranks in a `with` block, which all ranks enter together.

    If a rank hangs for `timeout` seconds, one line on stderr names it and all processes end. If a rank dies, one
    surviving rank raises a UserError that names it, and the others exit silently. A single process is not watched.
    """

    def __init__(self, dist: Dist, timeout: float):
        self.dist, self.rank, self.left, self.reports = dist, dist.rank, Event(), True
        self.interval = min(timeout / 10, 1.0)  # seconds between beats
        self.patience = math.ceil(timeout / self.interval)  # beats
        self.mine, self.moved = Beat(), math.inf  # moved: number of the beat at the last heartbeat
        self.beats = [Beat() for _ in range(dist.world_size)]  # as last read
        self.silence = [0] * dist.world_size  # for how many reads the beat of a rank has not changed

    def heartbeat(self, step: int, phase: str) -> None:
        """Record that a phase of a step begins. All ranks make the same calls, also in the thread that saves."""
        thread = current_thread() is not main_thread()
        last_step, n = self.mine.progress[thread]
        self.mine.progress[thread] = [step, n + 1 if step == last_step else 0]
        self.mine.places[thread], self.moved = f"step {step}, {phase}", self.mine.number

    def __enter__(self) -> "Watchdog":
        if self.dist.world_size > 1:
            self.names = self.dist.all_gather_str(f"rank {self.rank} ({platform.node()}:{os.getpid()})")
            # A connection of its own: the connection of a thread that waits in the store is in use.
            self.dist = replace(self.dist, store=PrefixStore("watchdog", self.dist.store.clone()))
            self._exchange()
            self.dist.barrier()  # now the store has a beat of every rank
            self.exchange = Thread(target=self._watch_ranks, daemon=True)
            self.exchange.start()
            Thread(target=self._watch_store, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.dist.world_size == 1:
            return
        self.mine.running, self.failed, reason = False, error is not None, lost_contact(error)
        time.sleep((FAREWELL + 2) * self.interval if reason else 0)  # meanwhile the beats show which rank is gone
        self.left.set()
        self.exchange.join(5)  # the store may never answer
        if reason:
            gone = [r for r, beat in enumerate(self.beats) if beat.running and self.silence[r] >= FAREWELL]
            peers = f"{self._name(gone) or 'other ranks'} in {self.mine.places[0]}: killed, or cut off ({reason})"
            message = f"{self.names[self.rank]} lost contact with {peers}; {RESUME}"
            raise (UserError(message) if self.reports else SystemExit(1)) from None

    def _watch_ranks(self) -> None:
        """Exchange beats. End the process if a rank hangs. A thread of its own: the store may never answer."""
        with suppress(DistError):  # the store is gone, which _watch_store reports if the loop stalls
            while not self.left.wait(self.interval):
                self._exchange()
                if self.mine.stalled >= self.patience and (message := self._verdict()):
                    _end(message, self.dist.claim_error_report("watchdog"))
            self._exchange()
            if self.failed:  # a rank with an error of its own claims this before the ranks that lose contact with it
                self.reports = self.dist.claim_error_report("watchdog")

    def _watch_store(self) -> None:
        """Count the beats, in another thread. End the process if neither the loop moves nor the store answers."""
        while not self.left.wait(self.interval):
            self.mine.number += 1
            self.mine.stalled = max(self.mine.number - self.moved, 0)
            self.waited = f"waited for {self.mine.stalled * self.interval:.0f} s"
            unanswered = self.mine.number - self.beats[self.rank].number
            if self.mine.stalled > self.patience and unanswered > self.patience // 2:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                here = f"{self.waited} in {self.mine.places[0]}, and the store at {address}"
                _end(f"{self.names[self.rank]} has {here}, on the machine of rank 0, does not answer")

    def _exchange(self) -> None:
        """Post a beat. Read it back, or the beats of all ranks if this loop stalls or has ended."""
        everybody = self.mine.stalled > self.patience // 3 or not self.mine.running
        ranks = range(self.dist.world_size) if everybody else [self.rank]
        self.dist.store.set(str(self.rank), json.dumps(vars(self.mine)))
        for r, text in zip(ranks, self.dist.store.multi_get([str(r) for r in ranks])):
            before, self.beats[r] = self.beats[r], Beat(**json.loads(text))
            self.silence[r] = self.silence[r] + 1 if self.beats[r].number == before.number else 0

    def _verdict(self) -> str | None:
        """Which ranks hang. None while a rank moves or has not started."""
        running = {r: beat for r, beat in enumerate(self.beats) if beat.running}
        silent = [r for r in running if self.silence[r] >= self.patience // 2]
        if any(beat.stalled < self.patience - 2 for r, beat in running.items() if r not in silent):
            return None
        if silent:
            return self._hang(silent, f": no sign of life since {running[silent[0]].places[0]}")
        for thread in (0, 1):
            last = min(beat.progress[thread] for beat in running.values())
            behind = [r for r, beat in running.items() if beat.progress[thread] == last]
            if len(behind) < self.dist.world_size:
                return self._hang(behind, f" in {running[behind[0]].places[thread]}")
        return f"all ranks have {self.waited} in {self.mine.places[0]}: the network between them hangs, or a GPU"

    def _hang(self, ranks: list[int], where: str) -> str:
        return f"{self._name(ranks)} hang{'s' * (len(ranks) == 1)}{where}; the others have {self.waited}"

    def _name(self, ranks: list[int]) -> str:
        return ", ".join(self.names[r] for r in ranks[:8]) + f" and {len(ranks) - 8} more" * (len(ranks) > 8)


def _end(message: str, report: bool = True) -> None:
    """End the process: its main thread waits in a collective, where no exception reaches it."""
    if report:
        os.write(2, f"error: {message}; {RESUME}\n".encode())
    else:
        time.sleep(1)  # torchrun ends all ranks when one ends: the rank that reports must be first
    os._exit(1)
