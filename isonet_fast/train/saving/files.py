"""Files and directories that are whole or absent: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Damaged(ValueError):
    """The file, or the directory, is not what was written."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same directory; renamed to `path` when the block ends well, removed when it fails.

    Every writer has a temporary path of its own. A killed process leaves it behind: see `sweep`.
    """
    _make_parent(path)
    temporary = temporary_beside(path)
    try:
        yield temporary
        with disk_errors_naming(path):
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error


@contextmanager
def disk_errors_naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path`, not a temporary file, also if torch.save hides it behind another error.

    For a full disk torch.save says "unexpected pos 3392 vs 3350"; the reason is the exception behind that.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error


def temporary_beside(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{secrets.token_hex(4)}.tmp{path.suffix}")


_TEMPORARY = re.compile(r"\.(latest|previous|best|epoch-\d+|metrics|evaluation)-[0-9a-f]{8}\.tmp\.(pt|dcp|csv|json)")


def is_temporary(name: str) -> bool:
    """Whether `temporary_beside` gives such a name to one of a run's own files."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(directory: Path) -> None:
    """Remove what killed writers of a run have left in its directory, and nothing else."""
    for path in list(directory.iterdir()) if directory.exists() else []:
        if is_temporary(path.name):
            discard(path)


def discard(path: Path) -> None:
    """Remove a file or a directory, if it is there; a directory loses its name before its content."""
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    if ".tmp" not in path.suffixes:
        doomed = temporary_beside(path)
        os.replace(path, doomed)
        path = doomed
    shutil.rmtree(path, ignore_errors=True)


def sync(directory: Path) -> None:
    """Make the renaming itself survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
