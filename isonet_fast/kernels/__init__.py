"""Triton kernels for the orthogonality penalty. Importable without Triton; `unavailable` says why it can't serve."""

from __future__ import annotations

import torch


def unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels can't serve this device, or None."""
    return "not built yet"
