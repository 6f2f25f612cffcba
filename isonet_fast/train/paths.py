"""Paths between a user and the program: as they are typed, and as a command that can be pasted."""

from __future__ import annotations

import os
import shlex
from pathlib import Path


def user_path(text: str) -> Path:
    """A path as it was typed, except that `~` and `~name` become home directories, as in a shell. If no user has this
    name, it stays as it is, also as in a shell."""
    return Path(os.path.expanduser(text))


def to_resume(directory: Path, command: str = "train") -> str:
    """The command that resumes the run in `directory`; it can be pasted into a shell."""
    return f"isonet-fast {command} --resume {shlex.quote(str(directory))}"
