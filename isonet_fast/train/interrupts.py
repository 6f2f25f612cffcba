"""SIGINT, SIGTERM and SIGHUP end a run between two steps, with everything saved, even if they are sent to a whole
process group, as a terminal, a scheduler and `timeout` do."""

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

    how: the command that resumes the run.
    """

    code: int

    def __init__(self, number: int, step: int, how: str) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, everything saved; go on with: {how}"
        )


class Signals:
    """A context that keeps the first signal in `received` (0: none), where the loop looks at it. Signals that the
    process ignores stay ignored: nohup does not want SIGHUP to end a run.

    twice_ends: another signal, at least a second later, ends the process at once. Not under torchrun, which repeats the
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
    """Block these signals in processes that start within, and in their children, until they call `leave_group`."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_group() -> None:
    """Leave the process group; for a child process. Signals to the group are the parent's to answer, which saves and
    then ends the child. Signals to the child itself work as always."""
    if not hasattr(os, "setpgid"):
        return
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a warning of it may still be printed on the terminal
    while pending := signal.sigpending().intersection(_STOPS):
        signal.sigwait(pending)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
