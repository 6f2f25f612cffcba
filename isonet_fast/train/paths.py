"""Paths between a user and the program: as they are typed, and as a command that can be pasted."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def user_path(text: str) -> Path:
    """A path as it was typed, except that `~` and `~name` are directories of users, as in a shell: also as there, the
    name of no user stays what it is."""
    return Path(os.path.expanduser(text))


def to_resume(directory: Path, command: str = "train") -> str:
    """The command that goes on with the run in `directory`, as it can be pasted into a shell."""
    return f"isonet-fast {command} --resume {shlex.quote(str(directory))}"
