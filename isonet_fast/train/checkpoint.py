"""Checkpoint files: written whole or not at all, with a checksum, and with the one before kept.

A checkpoint is what torch.save writes (a ZIP archive, so any torch.load reads it) with the SHA-256 of everything before
it as the archive's comment. A directory holds latest.pt, previous.pt (the latest one before), best.pt and, if asked
for, epoch-N.pt.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..models.load_official import read_checkpoint
from .files import replacing

FORMAT = 2
_LABEL = b"sha256:"
_COMMENT = len(_LABEL) + 64


class Damaged(ValueError):
    """The file is not what was written."""


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain values) so that `path` is always the old file or the new one, whole."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        _seal(temporary)


def save_latest(state: dict[str, Any], directory: Path) -> None:
    """latest.pt, after the present one has become previous.pt."""
    latest = directory / "latest.pt"
    with replacing(latest) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)
        _seal(temporary)
        if latest.exists():  # only now: a full disk or a kill while writing has cost nothing
            os.replace(latest, directory / "previous.pt")


def exists(directory: Path) -> bool:
    """Whether a run has left a checkpoint to go on from."""
    return any((directory / name).exists() for name in ("latest.pt", "previous.pt"))


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours. Damaged if its checksum is wrong; ValueError if it is no checkpoint of ours.

    Read with weights_only=True: a file that would run code is refused and runs nothing.
    """
    check(path)
    state = read_checkpoint(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format", "none") if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} is no checkpoint that this version reads: format {found}, expected {FORMAT}")
    return state


def check(path: Path) -> None:
    """Raise Damaged unless the file bears the checksum of its content."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        left = max(0, size - _COMMENT)
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
        comment = file.read()
    if not comment.startswith(_LABEL):
        raise Damaged(f"{path} is damaged: it ends without its checksum ({size} bytes)")
    if comment != _comment(digest):
        raise Damaged(f"{path} is damaged: its checksum does not fit its content ({size} bytes)")


def load_latest(directory: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """The newest readable one of latest.pt and previous.pt, and its path; `say` is told of what was passed over."""
    paths = [path for path in (directory / "latest.pt", directory / "previous.pt") if path.exists()]
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {directory}: neither latest.pt nor previous.pt")
    for path in paths:
        try:
            return load(path), path
        except Damaged as error:
            if path == paths[-1]:
                raise
            say(f"{error}; falling back to {paths[-1]}")
    raise AssertionError("unreachable")


def _comment(digest: Any) -> bytes:
    return _LABEL + digest.hexdigest().encode()


def _seal(path: Path) -> None:
    """Make the checksum the archive's comment: set the comment's length, in the last two bytes, and append it."""
    with open(path, "rb+") as file:
        file.seek(-2, os.SEEK_END)
        if file.read(2) != b"\0\0":
            raise RuntimeError("torch.save wrote an archive that ends in a comment already")
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT.to_bytes(2, "little"))
        file.flush()
        file.seek(0)
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(0, os.SEEK_END)
        file.write(_comment(digest))
