"""How the gradients of a list of weights lie side by side in memory.

While they are computed, they lie in one buffer of one precision; afterwards there is one buffer per dtype. The results
of an op must not share memory. So the ops return these buffers, and the gradients are views of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class GradientSlot(NamedTuple):
    """Where one gradient lies: `at` in the buffer of all, `at_in_region` in the buffer of its dtype."""

    region: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    at: int
    at_in_region: int


class GradientLayout(NamedTuple):
    """The layout. `regions`: (dtype, start, end) of the gradients of each dtype in the buffer of all."""

    size: int
    slots: list[GradientSlot]
    regions: list[tuple[torch.dtype, int, int]]

    def wide_views(self, flat: Tensor) -> list[Tensor]:
        """One view per weight of the buffer of all, before the gradients are rounded to their dtypes."""
        return [flat.as_strided(shape, strides, at) for _, shape, strides, at, _ in self.slots]

    def buffers(self, flat: Tensor) -> list[Tensor]:
        """A buffer per dtype."""
        return [flat[start:end].to(dtype) for dtype, start, end in self.regions]

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Every gradient in its own dtype and strides, from `buffers`."""
        return [buffers[region].as_strided(shape, strides, at) for region, shape, strides, _, at in self.slots]


def _strides(weight: Tensor) -> tuple[int, ...]:
    """The strides that torch.empty_like(weight) has: the weight's own strides, if it has no gaps."""
    if weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)):
        return weight.stride()
    return torch.empty_like(weight, device="meta").stride()


def layout_of(weights: Sequence[Tensor]) -> GradientLayout:
    """The layout of these weights' gradients. Layouts are cached, because every backward pass asks for one."""
    described = tuple([(weight.shape, _strides(weight), weight.dtype) for weight in weights])
    if torch.compiler.is_compiling():
        return _arrange(described)
    try:
        return _known(described)
    except TypeError:  # symbolic sizes have no hash
        return _arrange(described)


def _arrange(described: tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]) -> GradientLayout:
    slots: dict[int, GradientSlot] = {}
    regions: list[tuple[torch.dtype, int, int]] = []
    at = 0
    for dtype in DTYPES:
        start = at
        members = [(n, shape, strides) for n, (shape, strides, own) in enumerate(described) if own == dtype]
        for n, shape, strides in members:
            slots[n] = GradientSlot(len(regions), tuple(shape), strides, at, at - start)
            at += -(-math.prod(shape) // 64) * 64  # whole cache lines: 16-byte stores
        if members:  # empty gradients are views of a buffer too
            regions.append((dtype, start, at))
    return GradientLayout(at, [slots[n] for n in range(len(described))], regions)


_known = functools.lru_cache(maxsize=64)(_arrange)
