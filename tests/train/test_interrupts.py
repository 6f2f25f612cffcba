"""Signals: what ends a run between two steps, what does not, and a terminal that is closed under it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from isonet_fast.train import interrupts
from isonet_fast.train.interrupts import Signals
from isonet_fast.train.saving import checkpoint

from .test_commands import words


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    return now


def test_a_second_signal_ends_at_once(clock: list[float]) -> None:
    """Not if it comes within a second: `timeout` signals the process, then its group."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
    try:
        with pytest.raises(KeyboardInterrupt), Signals(twice_ends=True) as signals:
            for later in (0, 0.1, 0.5):
                clock[0] = 100 + later
                signal.raise_signal(signal.SIGTERM)
            assert signals.received == signal.SIGTERM
            clock[0] = 102
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_under_torchrun_it_does_not(clock: list[float]) -> None:
    with Signals(twice_ends=False) as signals:
        for later in (0, 2, 4):
            clock[0] = 100 + later
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_what_is_ignored_stays_ignored() -> None:
    """nohup has SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(twice_ends=True) as signals:
            signal.raise_signal(signal.SIGHUP)
            assert signals.received == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


AS_ITS_TERMINAL = (
    "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "from isonet_fast.train.commands.cli import main; sys.exit(main())"
)


def test_a_terminal_that_is_closed(tmp_path: Path) -> None:
    """SIGHUP, and nothing can be printed any more: everything is saved all the same."""
    ours, theirs = pty.openpty()
    size = words("data.image_size=8", "data.batch_size=4", "schedule.epochs=1000000")
    run = [sys.executable, "-c", AS_ITS_TERMINAL, "train", "--config", "isonet_digits", "--data", "synthetic:64", *size]
    process = subprocess.Popen(
        [*run, "--output", str(tmp_path / "run")], stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: it has ended
        while b"epoch 3" not in shown:
            shown += os.read(ours, 1024)
    os.close(ours)
    assert process.wait(60) == 128 + signal.SIGHUP, shown.decode()
    assert checkpoint.load(tmp_path / "run" / "latest.pt")["position"]["step"] > 32
