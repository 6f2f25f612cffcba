"""Checks whether an activation may write over a tensor, which autograd or memory may forbid, before any data change."""

from __future__ import annotations

import torch
from torch import Tensor

from .penalty_arguments import shares_memory

_REFUSED_VIEWS = {
    "MULTI_OUTPUT_NODE": "one of several views that one call returned (chunk, split, unbind)",
    "NO_GRAD_MODE": "a view made under no_grad",
    "INFERENCE_MODE": "a view made in inference mode",
}


def may_write(name: str, x: Tensor, bias: Tensor, shortcut: Tensor | None, compiling: bool) -> bool:
    """Whether y can be written over x. If the caller asked for something impossible, it raises ValueError before any
    data change.

    It returns False for a view that a custom Function returned. register_full_backward_hook makes such views of a
    module's inputs and outputs, and nobody who registers a hook should have to change the network for it.
    """
    needed = x.requires_grad or bias.requires_grad or (shortcut is not None and shortcut.requires_grad)
    recorded = needed and torch.is_grad_enabled()
    base = None if compiling else x._base  # a graph's inputs are views of nothing
    root = x if base is None else base
    if recorded and root.requires_grad and root.is_leaf:
        raise ValueError(f"inplace=True on {name}, a leaf that requires grad (or a view of one); pass inplace=False")
    if not x.is_contiguous() and _shares_memory(x):
        raise ValueError(f"inplace=True on {name}, whose elements share memory (strides {x.stride()}); clone it first")
    if compiling:
        return True
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"inplace=True on {name}, an inference tensor, outside inference mode; pass inplace=False")
    if recorded and bias.is_inference():
        raise ValueError("bias is an inference tensor, which autograd cannot save for the backward; clone it first")
    return base is None or not recorded or _may_rebase(name, x)


def _shares_memory(x: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return any(s == 0 and n > 1 for s, n in zip(x.stride(), x.shape, strict=True))
    return torch._debug_has_internal_overlap(x) != 0 and shares_memory(x)  # PyTorch knows that dense tensors do not


def _may_rebase(name: str, x: Tensor) -> bool:
    """Whether autograd can record that the view x is written over."""
    if type(x.grad_fn).__name__ == "BackwardHookFunctionBackward":
        return False
    made = torch._C._autograd._get_creation_meta(x).name
    if made in _REFUSED_VIEWS:
        raise ValueError(f"inplace=True on {name}, {_REFUSED_VIEWS[made]}; pass inplace=False")
    return made == "DEFAULT"


def check_apart(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse an `other` that overlaps x in memory, unless both are the same elements in the same places.

    torch.Tensor.add_ has the same rule. If one of the two has gaps, every implementation reads a copy of it.
    """
    if not torch._C._is_alias_of(x, other) or not x.numel():  # type: ignore[attr-defined]
        return
    if torch._debug_has_internal_overlap(x) or torch._debug_has_internal_overlap(other):
        return
    apart = abs(x.data_ptr() - other.data_ptr())
    if apart < x.numel() * x.element_size() and (apart or x.stride() != other.stride()):
        raise ValueError(f"inplace=True on {name}, which overlaps {other_name} partly; clone one of them first")
