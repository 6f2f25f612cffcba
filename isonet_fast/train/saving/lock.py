"""One run at a time in a directory: a lock that dies with its process.

The system locks the file `.isonet_fast.lock` in the directory with a record lock, which NFS passes on to its server and
which no child process inherits. A process that is killed loses it at once, and the next run takes it over. On a file
system without locks the file itself is the lock, until the process that it names is dead.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

fcntl: Any = None
msvcrt: Any = None
try:
    import fcntl
except ImportError:
    import msvcrt  # Windows

NAME = ".isonet_fast.lock"
_BEYOND = 1 << 30  # the locked byte, behind the content: Windows keeps others from reading what is locked
_held: set[tuple[int, int]] = set()  # device and inode: record locks do not keep a process from its own


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold `directory`, which is made if it is missing. A BlockingIOError says who holds it already.

    Directories that were made and are empty at the end are removed.
    """
    missing = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    path = directory / NAME
    file = _acquire(path)
    key = _key(os.fstat(file))
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        if fcntl is None:  # Windows removes no open file
            os.close(file)
        with contextlib.suppress(OSError):
            path.unlink()
        if fcntl is not None:
            os.close(file)
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def _acquire(path: Path) -> int:
    """The descriptor that holds the lock."""
    while True:
        if not path.parent.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
        if _held_here(path):
            raise BlockingIOError(_busy(path))
        try:
            file, made = _open(path)
        except FileNotFoundError:  # its holder has just removed it
            continue
        locked = _lock(file)
        if (made if locked is None else locked) and _still_named(file, path):
            _sign(file)
            return file
        os.close(file)
        if locked is False or (locked is None and not made and not _bury(path)):
            raise BlockingIOError(_busy(path))


def _held_here(path: Path) -> bool:
    """Whether this process holds the lock. Opening and closing the file once more would give the lock up."""
    try:
        return _key(path.stat()) in _held
    except FileNotFoundError:
        return False


def _open(path: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made by this call."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, os.O_RDWR), False


def _lock(file: int) -> bool | None:
    """Whether the lock is ours now; None where the file system has none."""
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file, _BEYOND, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    except OSError as error:
        return False if fcntl is None or error.errno in (errno.EACCES, errno.EAGAIN) else None
    return True


def _still_named(file: int, path: Path) -> bool:
    """Whether the file that was locked still bears the name: its former holder removes it."""
    with contextlib.suppress(FileNotFoundError):
        return _key(os.fstat(file)) == _key(path.stat())
    return False


def _key(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _sign(file: int) -> None:
    about = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
    with contextlib.suppress(OSError):  # a full disk: the lock holds without a name
        os.lseek(file, 0, os.SEEK_SET)
        os.ftruncate(file, 0)
        os.write(file, json.dumps({**about, "since": time.strftime("%Y-%m-%d %H:%M:%S")}).encode())


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote into the file; empty if it has not yet, or if somebody else wrote the file."""
    try:
        about = json.loads(path.read_text())
        return about if {"host", "pid", "started", "since"} <= about.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def _busy(path: Path) -> str:
    about = _holder(path)
    who = f"process {about['pid']} on {about['host']}, since {about['since']}" if about else "another process"
    return (
        f"{path.parent} is in use by a run of {who}: wait for it, or choose another --output "
        f"(if that process is dead, remove {path})"
    )


def _bury(path: Path) -> bool:
    """Where the file system has no locks: move the file of a dead process out of the way; False if it may be alive."""
    about = _holder(path)
    if not about or not _dead(about):
        return False
    grave = path.with_name(f"{NAME}-{secrets.token_hex(4)}")
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        os.replace(path, grave)
        if _holder(grave) != about:  # a new holder's, made since: it gets its name back
            with contextlib.suppress(FileExistsError):
                os.link(grave, path)
        grave.unlink()
    return True


def _dead(about: dict[str, Any]) -> bool:
    """Whether a holder on this host has ended; a process number that another process has now counts as ended."""
    if fcntl is None or about["host"] != socket.gethostname():
        return False
    try:
        os.kill(about["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, TypeError):
        return False
    return about["started"] is not None and about["started"] != _started(about["pid"])


def _started(pid: int) -> str | None:
    """When a process started, in ticks since the boot; None for a zombie, or where the system does not tell (Linux)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
