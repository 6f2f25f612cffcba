"""The package needs PyTorch 2.11 or newer: one sentence says so where it is missing or older."""

from __future__ import annotations

import sys
from pathlib import Path

FLOOR = (2, 11)


def require_torch() -> None:
    """Raise ModuleNotFoundError without PyTorch and ImportError with an older one; end the command with one line."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":  # a broken installation of PyTorch says itself what it lacks
            raise
        _refuse(ModuleNotFoundError(_sentence("it is not installed"), name="torch"))
    else:
        if tuple(int(part) for part in torch.__version__.split(".")[:2]) < FLOOR:
            _refuse(ImportError(_sentence(f"this is {torch.__version__}")))


def _sentence(found: str) -> str:
    floor = ".".join(map(str, FLOOR))
    return (
        f"isonet_fast needs PyTorch {floor} or newer, {found}; install the build for your machine: https://pytorch.org"
    )


def _refuse(error: ImportError) -> None:
    if Path(sys.argv[0]).name == "isonet-fast" or sys.orig_argv[1:3] == ["-m", "isonet_fast"]:
        sys.exit(f"isonet-fast: {error}")
    raise error
