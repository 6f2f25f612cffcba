"""The dtypes in which sums are formed."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32. (torch.promote_types would be an operator of an exported graph.)"""
    return torch.float64 if dtype == torch.float64 else torch.float32


def summing(terms: Tensor) -> torch.dtype:
    """The dtype of sums over the elements of `terms`, or of a few such tensors. It is float64 where there are few
    elements, because these may cancel, and then a rounding shows."""
    few = terms.device.type == "cpu" and terms.numel() <= 4096  # as in csrc/elementwise_cpu.h
    return torch.float64 if few else wide(terms.dtype)
