"""Checkpoints: written whole or not at all, with a checksum; the one before is kept.

A checkpoint is what torch.save writes (a ZIP archive, so any torch.load reads it) with the SHA-256 of everything before
it as the archive's comment. A directory holds latest.pt, previous.pt (the latest one before), best.pt and, if asked
for, epoch-N.pt. Where the weights are sharded each is a directory NAME.dcp instead, see `sharded_checkpoint`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...safe_load import read_checkpoint
from ..distributed import Processes
from . import sharded_checkpoint
from .files import Damaged, discard, disk_errors_naming, replacing

FORMAT = 2
_LABEL = b"sha256:"
_COMMENT = len(_LABEL) + 64
_KINDS = (".pt", ".dcp")


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` (tensors and plain values) so that `path` is always the old file or the new one, whole.

    latest.pt becomes previous.pt before, unless it is damaged: then it is written over.
    """
    with replacing(path) as temporary:
        with disk_errors_naming(path):
            with open(temporary, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
            _seal(temporary)
        _make_room(path)  # only now: a full disk or a kill while writing has cost nothing


def save_sharded(state: dict[str, Any], path: Path, processes: Processes) -> None:
    """`save` for sharded weights: a directory NAME.dcp, written by all processes together."""
    sharded_checkpoint.save({"format": FORMAT, **state}, path, processes, lambda: _make_room(path))


def find(directory: Path, *names: str) -> list[Path]:
    """The checkpoints of these names that are there, files or directories, in this order."""
    return [path for name in names for kind in _KINDS if (path := directory / f"{name}{kind}").exists()]


def _make_room(path: Path) -> None:
    """Each name has one checkpoint, of whatever kind. The latest one, if it is whole, becomes the previous."""
    for old in find(path.parent, path.stem):
        if path.stem == "latest" and _whole(old):
            previous = old.with_stem("previous")
            for older in find(path.parent, "previous"):
                if older != previous or older.is_dir():  # a file is replaced in one go
                    discard(older)
            os.replace(old, previous)
        elif old.suffix != path.suffix:
            discard(old)


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours. Damaged if its checksum is wrong; ValueError if it is no checkpoint of ours.

    Read with weights_only=True: a file that would run code is refused and runs nothing.
    """
    if path.is_dir():
        state = sharded_checkpoint.load(path)
    else:
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


def expect_any(directory: Path) -> list[Path]:
    """The checkpoints that a run in the directory could go on from; FileNotFoundError if there is none."""
    paths = find(directory, "latest", "previous")
    if not paths:
        raise FileNotFoundError(f"no checkpoint in {directory}: neither latest.pt nor previous.pt (or .dcp)")
    return paths


def load_latest(directory: Path, say: Callable[[str], None] = print) -> tuple[dict[str, Any], Path]:
    """The newer readable one of latest and previous, and its path; `say` is told of what was passed over."""
    paths = expect_any(directory)
    for path in paths:
        try:
            return load(path), path
        except Damaged as error:
            if path == paths[-1]:
                kind = path.suffix
                raise Damaged(
                    f"{error}; neither latest{kind} nor previous{kind} in {directory} can be resumed from "
                    f"(best{kind} or an epoch-N{kind} can, copied to latest{kind})"
                ) from error
            say(f"{error}; falling back to {paths[-1]}")
    raise AssertionError("unreachable")


def _whole(path: Path) -> bool:
    try:
        (sharded_checkpoint.check if path.is_dir() else check)(path)
    except Damaged:
        return False
    return True


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
        file.flush()
        os.fsync(file.fileno())
