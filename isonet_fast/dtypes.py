"""The dtype in which sums of a dtype are formed."""

from __future__ import annotations

import torch


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32. (torch.promote_types would be an operator of an exported graph.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32
