"""One run at a time in a directory: refused while its holder lives, taken over when it is dead."""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from isonet_fast.train.saving import lock

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="fork and SIGKILL are POSIX")


@pytest.fixture(params=["record locks", "no locks"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tests run with the locks of this system, and as on a file system without locks."""
    if request.param == "no locks":
        monkeypatch.setattr(lock, "_lock", lambda file: None)
    return request.param


@contextmanager
def holder(directory: Path) -> Iterator[int]:
    """Another process that holds the directory and never lets go; killed at the end."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with lock.locked(directory):
            os.write(writing, b"x")
            signal.pause()
    assert os.read(reading, 1) == b"x"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def taken(directory: Path) -> bool:
    try:
        with lock.locked(directory):
            return True
    except BlockingIOError:
        return False


@posix
def test_held_while_its_holder_lives_and_free_once_it_is_killed(system: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with holder(run) as child, pytest.raises(BlockingIOError, match=f"{run} is in use by a run of process {child} on"):
        with lock.locked(run):
            pass
    assert (run / lock.NAME).exists()  # left by the dead
    with lock.locked(run):
        assert json.loads((run / lock.NAME).read_text())["pid"] == os.getpid()
    assert list(run.iterdir()) == []


def test_held_against_the_process_itself(system: str, tmp_path: Path) -> None:
    with lock.locked(tmp_path):
        assert not taken(tmp_path) and not taken(tmp_path)
    assert taken(tmp_path)


def test_directories_that_stay_empty_go(system: str, tmp_path: Path) -> None:
    with lock.locked(tmp_path / "a" / "b"):
        pass
    assert list(tmp_path.iterdir()) == []
    with lock.locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "kept").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]


@posix
def test_of_many_at_once_one_has_it(system: str, tmp_path: Path) -> None:
    """The directory was left by a dead process, whose file all of them find."""
    with holder(tmp_path):
        pass
    together, done = os.pipe(), os.pipe()
    for _ in range(COUNT):
        if not os.fork():
            os.close(together[1])
            os.close(done[1])
            os.read(together[0], 1)  # until the parent closes its end
            os._exit(holds_until(done[0], tmp_path))
    os.close(together[1])
    refused = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(COUNT - 1)]
    os.close(done[1])
    assert (refused, os.waitstatus_to_exitcode(os.wait()[1])) == ([0] * (COUNT - 1), 1)


COUNT = 12


def holds_until(end: int, directory: Path) -> int:
    try:
        with lock.locked(directory):
            os.read(end, 1)
            return 1
    except BlockingIOError:
        return 0


@pytest.mark.parametrize(
    ("change", "free"),
    [
        ({}, False),
        ({"host": "elsewhere"}, False),
        ({"started": "1"}, True),  # the number of a dead process, given to another one since
        ({"pid": 2**22 + 1}, True),
        ({"pid": 2**70}, False),
        ({"pid": "x"}, False),
    ],
)
def test_without_locks_only_the_dead_are_taken_over(
    change: dict, free: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_lock", lambda file: None)
    with lock.locked(tmp_path):
        about = json.loads((tmp_path / lock.NAME).read_text())
    if about["started"] is None:
        pytest.skip("this system does not tell when a process started")
    (tmp_path / lock.NAME).write_text(json.dumps({**about, **change}))
    assert taken(tmp_path) == free


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"pid": 3}'])
def test_a_file_that_says_nothing(content: str, system: str, tmp_path: Path) -> None:
    """Without locks, its holder may not have signed it yet."""
    (tmp_path / lock.NAME).write_text(content)
    assert taken(tmp_path) == (system == "record locks")


def test_windows_locks_through_msvcrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No fcntl: the module loads, and locks through msvcrt."""
    locked: list[bool] = []

    def locking(file: int, mode: int, count: int) -> None:
        assert (os.lseek(file, 0, os.SEEK_CUR), mode, count) == (1 << 30, 2, 1)
        if locked:
            raise PermissionError(13, "Permission denied")
        locked.append(True)

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    try:
        windows = importlib.reload(lock)
        with windows.locked(tmp_path / "run"):
            windows._held.clear()  # as in another process
            with pytest.raises(BlockingIOError, match=f"in use by a run of process {os.getpid()}"):
                with windows.locked(tmp_path / "run"):
                    pass
        assert list(tmp_path.iterdir()) == []
    finally:
        monkeypatch.undo()
        importlib.reload(lock)
