"""Small float32 layers on the CPU: one call of a compiled kernel computes them all (csrc/orthogonality_cpu.cpp).

Without the compiled library the closed form computes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Layer
from . import _library


def members(weights: Sequence[Tensor], layers: Sequence[Layer], grads: Sequence[Tensor] = ()) -> list[int]:
    """Indices of the layers that the kernel serves; `grads`, if any, are what it would write to."""
    if not _library.compiled_for("cpu"):
        return []
    return [
        n
        for n, (weight, layer) in enumerate(zip(weights, layers, strict=True))
        if _is_plain(weight) and layer.small and (not grads or _is_plain(grads[n]))
    ]


def _is_plain(tensor: Tensor) -> bool:
    """Values that the kernel can read and write where they lie."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and not tensor.is_neg()


def plan(layers: Sequence[Layer], offsets: Sequence[tuple[tuple[int, ...], ...]]) -> tuple[Tensor, Tensor]:
    """What the kernel computes, as it reads it, and what to subtract from each layer's sum, (L,)."""
    numbers: list[int] = []
    constants = []
    for layer, ts in zip(layers, offsets, strict=True):
        missing = 3 - len(layer.kernel)
        numbers += [layer.groups, layer.transposed, *[1] * missing, *layer.kernel, len(ts)]
        for t in ts:
            numbers += [*[0] * missing, *t]
        constants.append(layer.constant if any(not any(t) for t in ts) else 0.0)
    return torch.tensor(numbers, dtype=torch.int64), torch.tensor(constants, dtype=torch.float64)


_library.define(
    "orthogonality_small_(Tensor[] weights, Tensor(a!)[] grads, Tensor plan, float[] scale, bool add) -> Tensor"
)


@torch.library.register_fake("isonet_fast::orthogonality_small_")
def _orthogonality_small_fake(
    weights: list[Tensor], grads: list[Tensor], plan: Tensor, scale: list[float], add: bool
) -> Tensor:
    return plan.new_empty(len(weights), dtype=torch.float64)
