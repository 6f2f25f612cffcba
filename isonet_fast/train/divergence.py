"""The error for a loss or a weight that is no longer a number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Diverged(RuntimeError):
    """The loss, or a weight, became infinite or NaN; the message names the step, the layer and the remedy."""

    step: int
    layer: str | None

    def __init__(
        self, step: int, layer: str | None, more: str = "", rank: int | None = None, weight: str | None = None
    ) -> None:
        where = (
            f"layer {layer!r} produced the first one" if layer else "every layer's output is finite, the loss is not"
        )
        who = "" if rank is None else f" on rank {rank}"
        what = f"non-finite loss at step {step}{who}: {where}"
        if weight is not None:
            what = f"non-finite weight after step {step}: the first one is in {weight!r}"
        super().__init__(f"{what}. Halve the learning rate.{more}")
        self.step, self.layer = step, layer


def first_nonfinite_weight(weights: Mapping[str, Tensor]) -> str | None:
    """Name of the first tensor of which this process holds an infinity or a NaN; one synchronisation for them all."""
    own = [value.to_local() if hasattr(value, "to_local") else value for value in weights.values()]
    finite = torch.stack([value.isfinite().all() for value in own]).tolist()
    return next((name for name, good in zip(weights, finite, strict=True) if not good), None)


@torch.no_grad()
def first_nonfinite(model: nn.Module, x: Tensor) -> str | None:
    """Name of the first layer, in order of execution, whose output holds an infinity or a NaN for input x.

    The hooks that look for it keep shared scales from being folded into convolutions, so that each layer is called.
    """
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    layers = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
