"""Output of commands: every name can be printed, on one line, and a terminal that is closed ends no run."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


def printable(text: str) -> str:
    r"""`text` on one line. A file's name may hold newlines, control characters and bytes that are no UTF-8; they become
    `\n`, `\x1b` and `\udcff`."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within, sys.stdout and sys.stderr take every character and outlive their terminal."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:
        try:
            sys.stdout, sys.stderr = (
                _lasting(stream or nowhere) for stream in before
            )  # without one: closed, as by >&-
            yield
        finally:
            sys.stdout, sys.stderr = before


def _lasting(stream: TextIO) -> Any:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Lasting(stream) if stream.isatty() else stream


class _Lasting:
    """A terminal. When it hangs up, writing to it fails, and what is written is lost from then on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._hanging_up():
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._hanging_up():
            self._stream.flush()

    @contextlib.contextmanager
    def _hanging_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())  # it also takes what the stream still holds
            os.close(null)
