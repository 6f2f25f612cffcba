"""Random trials of every public function and layer against the float64 reference: `make fuzz`."""

from __future__ import annotations

import os
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # before it is imported: the trials of isometry_report would show their progress

from .case import Case
from .trials import TRIALS

__all__ = ["TRIALS", "Case", "replay"]


def replay(kind: str, choices: dict[str, Any]) -> None:
    """One trial once more, as a reproducer gives it; a choice that is not named takes its simplest value."""
    TRIALS[kind](Case(choices))
