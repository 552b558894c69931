"""Which rank hangs: when one of many stops, all others wait. This finds out who it is, says so, and ends the run.

A collective waits for half an hour and then names nobody. Here every rank posts a beat, about once a second, in the
store in which torchrun's processes find each other: where its training loop is, and for how long it has been there. A
rank whose loop has not moved for the timeout looks at the beats of all.

    somebody's loop still moves          it is slow, and others wait for it: so do we
    no new beats from a rank             its process is stopped or dead, or its machine is cut off
    a rank is behind all others          it hangs in what it does: reading rows, say, from a dead file system
    all are at the same place            the exchange itself hangs: the network, or a GPU
    the store does not answer            its machine, that of rank 0, is down or cut off from this one

Time is counted in beats, not by the clock, so that a run that was suspended as a whole is not taken for hung.
"""

import json
import math
import os
import platform
import re
import threading
import time
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NoReturn

import torch.distributed as torch_dist

from runtime.errors import UserError
from runtime.ranks import Dist

RESUME = "the same line resumes from the newest checkpoint"
FAREWELL = 3  # beats that a rank which has lost another stays to hear who does not beat any more
NOT_STARTED = (-1, 0, "")  # the place of a loop that has not begun

# What gloo, NCCL and torch's store say when it is another process, or the network, that failed.
LOST = re.compile(
    r"Connection (closed|reset|refused|timed out|was likely closed)|Broken pipe|Socket (closed|Timeout)"
    r"|No route to host|Network is unreachable|Timed out waiting|wait timeout|Application timeout"
    r"|ncclRemoteError|ncclSystemError|remote process exited|communicator was aborted"
)


@dataclass
class StallCounter:
    """Counts for how many looks a value has not changed."""

    value: object = None
    looks: int = 0

    def look(self, value: object) -> int:
        self.looks = self.looks + 1 if value == self.value else 0
        self.value = value
        return self.looks


@dataclass
class Beat:
    """What a rank posts."""

    number: int = 0
    state: str = "runs"  # then it leaves the watchdog: is done, failed, or lost the others
    idle: int = 0  # for how many beats it has not moved
    # of its loop, and of its thread that saves: (step, n-th place in the step, what it does there)
    progress: list = field(default_factory=lambda: [NOT_STARTED, NOT_STARTED])


class Watchdog:
    """Watches the training loops of all ranks in a `with` block, which all of them enter together.

    When one hangs for `timeout` seconds, one line on stderr says so and all processes end. When one dies, the error of
    torch's that leaves the block on others becomes a UserError on one of them, and a silent exit on the rest. A process
    that is alone is not watched.
    """

    def __init__(self, ranks: Dist, timeout: float):
        self.ranks = ranks
        self.interval = min(timeout / 10, 1.0)  # seconds between beats
        self.patience = math.ceil(timeout / self.interval)  # beats
        self.mine, self.moves = Beat(), StallCounter()
        self.beats: dict[int, Beat] = {}  # as last read, by rank
        self.numbers = [StallCounter() for _ in range(ranks.world_size)]  # of the beats of a rank
        self.answers = 0  # of the store
        self.spoken = False  # whether another rank says what is wrong
        self.posted, self.ended = threading.Event(), threading.Event()
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._watch, self._watch_store)]

    def heartbeat(self, step: int, doing: str) -> None:
        """Note where the loop is until the next call, which takes half a microsecond. Watching begins with the first.

        All ranks make the same calls in a step. A thread that saves may call it too: it has a place of its own.
        """
        thread = threading.current_thread() is not threading.main_thread()
        last_step, n, _ = self.mine.progress[thread]
        self.mine.progress[thread] = (step, n + 1 if step == last_step else 0, doing)

    def __enter__(self) -> "Watchdog":
        if self.ranks.world_size > 1:
            self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self.names = self.ranks.all_gather_str(f"{platform.node()}:{os.getpid()}")
            for thread in self.threads:
                thread.start()
            if not self.posted.wait(60):
                raise UserError(f"{self._name([self.ranks.rank])} can not reach {self._store()}")
            self.ranks.barrier()  # from here on every rank has a beat to read
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if self.ranks.world_size == 1:
            return
        lost = isinstance(error, RuntimeError) and LOST.search(str(error))
        self.mine.state = "is done" if error is None else "lost the others" if lost else "failed"
        self.ended.set()
        for thread in self.threads:
            thread.join(5)  # not for ever: the store may not answer
        if lost and self.spoken:
            raise SystemExit(1) from None
        if lost:
            silent = [r for r in self._running() if self.numbers[r].looks >= FAREWELL]
            reason = re.split(r"\n|\. ", str(error))[0]
            raise UserError(
                f"{self._name([self.ranks.rank])} lost contact with {self._name(silent) or 'other ranks'} in "
                f"{_place(self.mine)}: killed, or cut off ({reason}); {RESUME}"
            ) from None

    # Threads. torch's store waits for an answer without end, so it takes a second one to watch the first.

    def _watch(self) -> None:
        """Exchange beats and judge them, then say farewell."""
        try:
            # a client of our own, since an answer may take long; keys that no earlier start of these ranks has used
            client = torch_dist.TCPStore(
                *self.address, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=1)
            )
            store = torch_dist.PrefixStore("watchdog/" + " ".join(self.names), client)
            self._exchange(store)
            self.posted.set()
            while not self.ended.wait(self.interval):
                self._exchange(store, everybody=self.mine.idle > self.patience // 3)
                if self.mine.idle >= self.patience and (line := self._judge()):
                    if self._speaks(store):
                        _end(line)
                    time.sleep(1)  # when one process ends torchrun ends the others: let the speaker speak
                    os._exit(1)
            lost = self.mine.state == "lost the others"
            self._exchange(store, everybody=lost)
            for _ in range(FAREWELL if lost else 0):
                time.sleep(self.interval)
                self._exchange(store, everybody=True)
            if self.mine.state != "is done":
                self.spoken = not self._speaks(store)
        except torch_dist.DistError:
            return  # the store is gone, which matters only if the loop hangs

    def _watch_store(self) -> None:
        """End when neither the loop moves nor the store answers."""
        moves, answers = StallCounter(), StallCounter()
        while not self.ended.wait(self.interval):
            idle, mute = self._idle(moves), answers.look(self.answers)
            if idle > self.patience and mute > self.patience // 2:
                _end(
                    f"{self._name([self.ranks.rank])} has waited for {idle * self.interval:.0f} s in "
                    f"{_place(self.mine)}, and {self._store()} does not answer"
                )

    def _exchange(self, store: torch_dist.Store, everybody: bool = False) -> None:
        """Post a beat; read it again, to know that the store answers, or those of all ranks."""
        self.mine.number += 1
        self.mine.idle = self._idle(self.moves)
        store.set(str(self.ranks.rank), json.dumps(vars(self.mine)))
        ranks = range(self.ranks.world_size) if everybody else [self.ranks.rank]
        for r, text in zip(ranks, store.multi_get([str(r) for r in ranks])):
            self.beats[r] = Beat(**json.loads(text))
            self.numbers[r].look(self.beats[r].number)
        self.answers += 1

    def _idle(self, moves: StallCounter) -> int:
        """For how many looks the loop, if it has begun, has not moved."""
        progress = list(self.mine.progress)
        return moves.look(progress) if progress != [NOT_STARTED, NOT_STARTED] else 0

    def _speaks(self, store: torch_dist.Store) -> bool:
        """Whether it is for this rank to say what is wrong: for the first to ask."""
        return store.compare_set("speaker", "", str(self.ranks.rank)).decode() == str(self.ranks.rank)

    # Verdicts

    def _running(self) -> list[int]:
        return [r for r, beat in sorted(self.beats.items()) if beat.state == "runs"]

    def _judge(self) -> str | None:
        """What hangs; None as long as a rank moves, or has not begun."""
        running = self._running()
        silent = [r for r in running if self.numbers[r].looks >= self.patience // 2]
        if any(self.beats[r].idle < self.patience - 2 for r in running if r not in silent):
            return None
        waited = f"have waited for {self.mine.idle * self.interval:.0f} s"
        if silent:
            where = f"no sign of life since {_place(self.beats[silent[0]])}"
            return f"{self._hang(silent)}: {where}; the others {waited}"
        for thread in (0, 1):
            progress = {r: self.beats[r].progress[thread][:2] for r in running}
            behind = [r for r in running if progress[r] == min(progress.values())]
            if len(behind) < self.ranks.world_size and list(NOT_STARTED[:2]) not in progress.values():
                return f"{self._hang(behind)} in {_place(self.beats[behind[0]], thread)}; the others {waited}"
        return f"all ranks {waited} in {_place(self.mine)}: the network between them hangs, or a GPU"

    def _hang(self, ranks: list[int]) -> str:
        return f"{self._name(ranks)} {'hangs' if len(ranks) == 1 else 'hang'}"

    def _name(self, ranks: list[int]) -> str:
        names = [f"rank {r} ({self.names[r]})" for r in ranks[:8]]
        return ", ".join(names) + f" and {len(ranks) - 8} more" * (len(ranks) > 8)

    def _store(self) -> str:
        return f"the store at {':'.join(map(str, self.address))}, on the machine of rank 0,"


def _place(beat: Beat, thread: int = 0) -> str:
    step, _, doing = beat.progress[thread]
    return f"step {step}, {doing}" if step >= 0 else "its start"


def _end(line: str) -> NoReturn:
    """Say why and end this process now: its main thread waits in a collective, from which nothing returns."""
    os.write(2, f"error: {line}; {RESUME}\n".encode())
    os._exit(1)
