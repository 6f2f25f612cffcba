"""Small float32 layers on the CPU: one call of a compiled kernel computes them all (csrc/orthogonality_cpu.cpp).

It has both forms of the closed form. Without the compiled library the closed form computes them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..geometry import Frequency, Layer
from . import library
from .closed_form import Work


def members(weights: Sequence[Tensor], layers: Sequence[Layer], grads: Sequence[Tensor] = ()) -> list[int]:
    """Indices of the layers that the kernel serves; `grads`, if any, are what it would write to."""
    if not library.compiled_for("cpu"):
        return []
    return [
        n
        for n, (weight, layer) in enumerate(zip(weights, layers, strict=True))
        if _is_plain(weight) and layer.small and (not grads or _is_plain(grads[n]))
    ]


def _is_plain(tensor: Tensor) -> bool:
    """Whether the kernel can read and write the values where they lie."""
    return tensor.is_cpu and tensor.dtype == torch.float32 and not tensor.is_neg()


def kernel_arguments(layers: Sequence[Layer], work: Sequence[Work]) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel computes, as it reads it: plan and waves; and what to subtract from each layer's sum, (L,)."""
    numbers: list[int] = []
    waves = [torch.empty(0, dtype=torch.float32)]
    constants = []
    for layer, (form, units) in zip(layers, work, strict=True):
        missing, frequency = 3 - len(layer.kernel), form == "frequency"
        phases = layer.phases if frequency else [1] * len(layer.kernel)
        numbers += [layer.groups, layer.transposed, frequency]
        numbers += [*[1] * missing, *layer.kernel, *[1] * missing, *phases, len(units)]
        for unit in units:
            numbers += [*[0] * missing, *unit]
        if frequency and units:
            waves.append(_waves(layer, units))
        constants.append(layer.constant if any(not any(unit) for unit in units) else 0.0)
    return torch.tensor(numbers, dtype=torch.int64), torch.cat(waves), torch.tensor(constants, dtype=torch.float64)


def _waves(layer: Layer, frequencies: tuple[Frequency, ...]) -> Tensor:
    """cos(wq) for the first half of the q and for the middle one, sin(wq) for the others; q counts from the middle."""
    q = torch.tensor(list(itertools.product(*map(range, layer.periods))), dtype=torch.float64)
    middle = (torch.tensor(layer.periods, dtype=torch.float64) - 1) / 2
    turns = torch.tensor(frequencies, dtype=torch.float64) / torch.tensor(layer.grid, dtype=torch.float64)
    angles = 2 * math.pi * (turns @ (q - middle).T)
    half = (len(q) + 1) // 2
    return torch.cat([angles[:, :half].cos(), angles[:, half:].sin()], 1).float().flatten()


library.define(
    "orthogonality_small_(Tensor[] weights, Tensor(a!)[] grads, Tensor plan, Tensor waves, float[] scale, bool add) "
    "-> Tensor"
)


@torch.library.register_fake("isonet_fast::orthogonality_small_")
def _orthogonality_small_fake(
    weights: list[Tensor], grads: list[Tensor], plan: Tensor, waves: Tensor, scale: list[float], add: bool
) -> Tensor:
    return plan.new_empty(len(weights), dtype=torch.float64)
