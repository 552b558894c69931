"""A fake torch.cuda that executes nothing and logs who waits for whom: for tests of the order of copies and waits."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


class Stream:
    """Logs ("wait", this stream, the stream that it waits for) and the like to `log`."""

    def __init__(self, name: str, log: list):
        self.name, self.log = name, log

    def wait_stream(self, other: "Stream") -> None:
        self.log.append(("wait", self.name, other.name))

    def synchronize(self) -> None:
        self.log.append(("synchronize", self.name))

    def record_event(self) -> "Event":
        self.log.append(("record", self.name))
        return Event(self.log)


class Event:
    def __init__(self, log: list):
        self.log = log

    def wait(self) -> None:
        """As torch.cuda.Event.wait: the current stream waits, not the host."""
        self.log.append(("wait", "main", "event"))


def install(monkeypatch: pytest.MonkeyPatch) -> list:
    """Returns the log. torch.cuda.Stream() is the stream "copies", the current one outside of a `with` is "main"."""
    log: list = []
    current, main = [Stream("main", log)], Stream("main", log)

    @contextmanager
    def use(stream: Stream | None) -> Iterator[None]:
        current.append(stream or main)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: Stream("copies", log))
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current[-1])
    monkeypatch.setattr(torch.cuda, "set_device", lambda *_: None)
    return log
