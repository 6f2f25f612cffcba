"""A data set: examples by their index, some of which may be unreadable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..terminal import printable


class Corrupt(Exception):
    """An example that cannot be read; picklable, because it crosses from a worker."""

    path: str
    reason: str

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return printable(f"{self.path} ({self.reason})")


class Examples(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        """float32 (C, H, W) and its label, for detectors a dict of what is in it; raises Corrupt."""


@dataclass
class Source:
    train: Examples
    val: Examples
    num_classes: int
    channels: int
    notes: Sequence[str] = ()  # what the user should know of it
