"""SIGINT, SIGTERM and SIGHUP: a run ends between two steps, with everything saved, also where a whole process group is
sent them, as a terminal, a scheduler and `timeout` do."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_ONE_STOP = 1.0  # seconds: `timeout` signals the process and then its group


class Interrupted(Exception):
    """Stopped by a signal, with everything saved; `code` is the exit code that a shell expects.

    how: the command that goes on.
    """

    code: int

    def __init__(self, number: int, step: int, how: str) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, everything saved; go on with: {how}"
        )


class Signals:
    """While it is entered, the first signal is kept in `received` (0: none) for the loop to look at. What the process
    ignores it goes on ignoring: nohup does not want SIGHUP to end a run.

    twice_ends: a second one, a second later or more, ends the process at once. Not under torchrun, which repeats the
    signal that it was sent itself, waits half a minute and kills.
    """

    def __init__(self, twice_ends: bool) -> None:
        self.received: int = 0
        self._twice_ends, self._since = twice_ends, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(ValueError):  # not in the main thread: the owner of the process listens
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.received, self._since = number, time.monotonic()
        elif self._twice_ends and time.monotonic() - self._since > _ONE_STOP:
            self.__exit__()
            signal.raise_signal(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Processes that start within, and theirs, have these signals blocked until they call `leave_group`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group() -> None:
    """Called by a process that this one started: what its group was sent, and will be, is the starting process's to
    answer, which saves and ends this one then. Signals to this process itself work as always."""
    if not hasattr(os, "setpgid"):
        return
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a warning of it may still be printed on the terminal
    while pending := signal.sigpending().intersection(_STOPS):
        signal.sigwait(pending)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
