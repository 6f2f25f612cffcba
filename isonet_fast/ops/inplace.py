"""Activations written over their input: how, and what autograd or memory forbids, found before the data change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def check_writable(name: str, x: Tensor) -> None:
    """Refuse, before the data changes, what autograd or memory would refuse after."""
    root = x if x._base is None else x._base
    if torch.is_grad_enabled() and root.requires_grad and root.is_leaf:
        raise ValueError(f"inplace=True on {name}, a leaf that requires grad (or a view of one); pass inplace=False")
    strides = x.stride()
    if 0 in strides and x.numel() and any(s == 0 and n > 1 for s, n in zip(strides, x.shape, strict=True)):
        raise ValueError(f"inplace=True on {name}, whose elements share memory (an expanded tensor); clone it first")


def check_apart(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse an `other` in the memory of x that is not x element for element, as torch.Tensor.add_ does.

    Where one of them has gaps, every implementation reads a copy of it.
    """
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(x, other):
        return
    if not x.numel() or torch._debug_has_internal_overlap(x) or torch._debug_has_internal_overlap(other):
        return
    apart = abs(x.data_ptr() - other.data_ptr())
    if apart < x.numel() * x.element_size() and (apart or x.stride() != other.stride()):
        raise ValueError(f"inplace=True on {name}, which overlaps {other_name} partly; clone one of them first")


def written(function: type[torch.autograd.Function], x: Tensor, *arguments: Any) -> Tensor:
    """function(x, *arguments), written over x.

    torch.compile takes a Function's inputs in an order of its own, and autograd the first one as the tensor that was
    written over, which matters where that is a view. Compiled code therefore copies, and the compiler, which allocates
    the buffers itself, deletes the copy.
    """
    if torch.compiler.is_compiling():
        return x.copy_(function.apply(x, *arguments, False))
    return function.apply(x, *arguments, True)
