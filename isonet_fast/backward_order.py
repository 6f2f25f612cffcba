"""Checks that `accumulate_grad_()` is called early enough: before a backward pass that uses up `.grad`.

Two kinds of backward pass use it up. A backward pass that synchronises (DistributedDataParallel) averages `.grad` over
the ranks. A share that a rank adds later is not averaged. An optimizer in the backward pass
(`register_post_accumulate_grad_hook`) uses and clears `.grad`. A gradient that is added later takes effect one step
late, or never if `zero_grad()` follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layers import warn


class BackwardOrder:
    """Watches the weights of one regularizer. `shares`: whether the ranks compute shares, which must be averaged."""

    def __init__(self, model: nn.Module, shares: bool) -> None:
        self._model, self._shares = model, shares
        self._synchronised: dict[int, _Synchronised] = {}
        self._hooks = _Hooks()

    def watch(self, weights: Sequence[Tensor]) -> None:
        """Watch these weights and no others."""
        self._hooks.watch(weights, [own.handle.id for own in self._synchronised.values()])
        if not self._shares:
            return
        known, first = self._synchronised, not self._synchronised
        self._synchronised = {}
        for weight in weights:
            if weight.requires_grad:
                unknown = not first and weight.grad is not None
                own = known.pop(id(weight)) if id(weight) in known else _Synchronised(self._model, weight, unknown)
                self._synchronised[id(weight)] = own
        for gone in known.values():
            gone.handle.remove()

    def added(self, weights: Sequence[Tensor]) -> None:
        """Call this after accumulate_grad_(), with the weights that got a gradient: none if the call was not due."""
        self._hooks.added(weights)

    def check(self, weights: Sequence[Tensor]) -> None:
        """Raise RuntimeError where a share comes after the backward pass that should have averaged it.

        A gradient of an earlier step does not count. Usually the optimizer step changes the weight's version, and this
        shows that the step is over. But a fused optimizer does not change it, and a gradient scaler may skip the step.
        Then the check looks whether the gradients were cleared. Only in this case does it read a value from the device.
        """
        if not self._shares:
            return
        stale = [w.grad for w in weights if w.grad is not None and self._ran_over(w)]
        if stale and torch.stack([grad.any() for grad in stale]).any():
            raise RuntimeError(
                "accumulate_grad_() with work_group must come before the backward that synchronises the gradients, "
                "but a backward has already run since the gradients were cleared; call it before loss.backward() "
                "(under gradient accumulation: before the last one, and give the regularizer the "
                "DistributedDataParallel module, so that no_sync() is noticed)"
            )

    def _ran_over(self, weight: Tensor) -> bool:
        own = self._synchronised.get(id(weight))
        return own is not None and own.version == weight._version


class _Synchronised:
    """The version that a weight had when a synchronising backward pass ran over it; None if no such pass has run.

    `unknown`: the weight was exchanged and already has a gradient, and nothing watched the backward pass that made it.
    That pass counts as a synchronising one.
    """

    def __init__(self, model: nn.Module, weight: Tensor, unknown: bool) -> None:
        self.weight = weight  # kept, so that its id stays its own
        self.version = weight._version if unknown else None
        self._model = model
        self.handle: Any = weight.register_post_accumulate_grad_hook(self._note)

    def _note(self, weight: Tensor) -> None:
        synchronises = getattr(self._model, "require_backward_grad_sync", True)  # else that pass is to come
        self.version = weight._version if synchronises else None


class _Hooks:
    """Whether hooks that use up `.grad` in the backward pass see the penalty. One weight with such hooks is watched.

    Such a loop is right in either order as long as nothing clears the gradients between `accumulate_grad_()` and the
    next backward pass.
    """

    def __init__(self) -> None:
        self._weight: Tensor | None = None
        self._handle: Any = None
        self._left: tuple[Tensor, int] | None = None  # the gradient and its version

    def watch(self, weights: Sequence[Tensor], own: Sequence[int]) -> None:
        hooked = next((w for w in weights if w.requires_grad and has_hooks(w, own)), None)
        if hooked is self._weight:
            return
        if self._handle is not None:
            self._handle.remove()
        self._weight, self._left = hooked, None
        self._handle = None if hooked is None else hooked.register_hook(self._before_hooks)

    def added(self, weights: Sequence[Tensor]) -> None:
        if self._weight is not None:
            grad = self._weight.grad if weights else None
            self._left = None if grad is None else (grad, grad._version)

    def _before_hooks(self, _: Tensor) -> None:
        assert self._weight is not None
        left, self._left = self._left, None
        if left is None:
            return
        grad, version = self._weight.grad, left[1]
        if grad is None or (grad._version != version and not grad.any()):
            warn(
                "the gradient that accumulate_grad_() added was cleared before a backward pass, so that hooks of "
                "register_post_accumulate_grad_hook (an optimizer in the backward pass) never saw the penalty; call "
                "accumulate_grad_() after zero_grad() and before loss.backward()"
            )


def has_hooks(weight: Tensor, own: Sequence[int] = ()) -> bool:
    """Whether hooks other than `own` (ids of handles) are to see the whole gradient of this weight."""
    return any(n not in own for n in getattr(weight, "_post_accumulate_grad_hooks", None) or ())
