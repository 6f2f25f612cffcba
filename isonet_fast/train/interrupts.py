"""SIGINT and SIGTERM: a run ends between two steps, with everything saved."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from .files import to_resume


class Interrupted(Exception):
    """Stopped by a signal, with everything saved; `code` is the exit code that a shell expects."""

    def __init__(self, number: int, step: int, directory: Path) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, everything saved; "
            f"go on with: {to_resume(directory)}"
        )


class Signals:
    """While it is entered, the first signal is kept in `received` (0: none) for the loop to look at.

    twice_ends: a second one ends the process at once. Not under torchrun, which repeats the signal that it was sent
    itself, waits half a minute and kills.
    """

    def __init__(self, twice_ends: bool) -> None:
        self.received = 0
        self._twice_ends = twice_ends
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the owner of the process listens
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        if self._twice_ends:
            self.__exit__()
