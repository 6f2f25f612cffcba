"""Where every layer lies in the device's matrices, from shapes alone.

    planes    (plane_rows, PANEL): A_u of every layer, group and tap u, as panels of PANEL columns
        row = layer base + ((block * taps + u) * panels + n // PANEL) * padded + m
    residual  (residual_rows, RESIDUAL_PANEL): R_t = G_t - [t = 0] I of every layer, group and offset t, in panels too
        row = layer base + ((block * offsets + t) * panels + m' // RESIDUAL_PANEL) * padded + m

Panels of a fixed width make each of them one 2-D tensor, so that one host-made TMA descriptor per box shape serves
every layer. Rows are padded with zeros to the tile. Small groups (a depthwise convolution has one row per group) are
merged into *blocks*: their matrices lie on the diagonal of one bigger matrix, whose grams are block diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..geometry import Layer, Offset
from ..problem import Problem
from . import layout

PANEL, RESIDUAL_PANEL = layout.PANEL.value, layout.RESIDUAL_PANEL.value
ROW_BLOCK = 64  # the smallest tile; also the contraction step that padding must fill


def ceil(value: int, step: int) -> int:
    return -(-value // step)


def pad(value: int, step: int) -> int:
    return ceil(value, step) * step


@dataclass(frozen=True)
class Packed:
    """Where one layer lies in the device's matrices. Independent of the variant, so that shapes can be foretold."""

    layer: Layer
    offsets: tuple[Offset, ...]
    wide: bool  # tiles of 128 rows exist
    plane_base: int
    residual_base: int

    @cached_property
    def merged(self) -> int:
        """Groups per block."""
        layer = self.layer
        return max(1, min(layer.groups, ROW_BLOCK // max(layer.rows, layer.columns, 1)))

    @cached_property
    def blocks(self) -> int:
        return ceil(self.layer.groups, self.merged)

    def filled(self, block: int) -> int:
        """Rows of a block that hold a matrix: the last block may have fewer groups."""
        return min(self.merged, self.layer.groups - block * self.merged) * self.layer.rows

    @cached_property
    def rows(self) -> int:
        return self.merged * self.layer.rows

    @cached_property
    def columns(self) -> int:
        return self.merged * self.layer.columns

    @cached_property
    def kernel(self) -> tuple[int, int, int]:
        """Taps per dimension, three dimensions always."""
        k = self.layer.kernel
        return (1,) * (3 - len(k)) + k  # type: ignore[return-value]

    @cached_property
    def padded(self) -> int:
        return pad(self.rows, 128 if self.wide else ROW_BLOCK)

    @cached_property
    def tap_rows(self) -> int:
        return ceil(self.columns, PANEL) * self.padded

    @cached_property
    def offset_rows(self) -> int:
        return ceil(self.rows, RESIDUAL_PANEL) * self.padded

    @cached_property
    def plane_rows(self) -> int:
        return self.blocks * self.layer.taps * self.tap_rows if self.offsets else 0

    @cached_property
    def residual_rows(self) -> int:
        return self.blocks * len(self.offsets) * self.offset_rows


def lay_out(problem: Problem) -> list[Packed]:
    """Every layer after the one before it, with what this rank computes."""
    packed: list[Packed] = []
    plane = residual = 0
    fast = problem.precision is None
    narrow = fast and _narrow_pays(problem.layers, problem.offsets)
    for layer, ts in zip(problem.layers, problem.offsets, strict=True):
        if math.prod(layer.shape) >= 2**31:
            raise ValueError(f"a weight of shape {layer.shape} has more elements than 32-bit offsets can name")
        one = Packed(layer, tuple(ts), False, plane, residual)
        if fast and (not narrow or _suits_wide(one)):
            one = Packed(layer, tuple(ts), True, plane, residual)
        packed.append(one)
        plane += one.plane_rows
        residual += one.residual_rows
    if max(plane, residual) >= 2**31:
        raise ValueError(f"the packed weights have {plane:,} rows of {PANEL}, more than 32-bit coordinates can name")
    return packed


def _suits_wide(p: Packed) -> bool:
    """Whether tiles of 128 rows serve this layer better than 64: those read twice as many bytes per multiply-add, 1.5
    times their price where the L2 cache is the limit."""
    return pad(p.rows, 128) ** 2 <= 1.5 * pad(p.rows, 64) ** 2


def _narrow_pays(layers: Sequence[Layer], offsets: Sequence[tuple[Offset, ...]]) -> bool:
    """Whether tiles of 64 rows are worth a launch of their own, at whose end most of the GPU has nothing to do."""
    work = {True: 0, False: 0}  # as wide tiles would do it
    for layer, ts in zip(layers, offsets, strict=True):
        p = Packed(layer, tuple(ts), False, 0, 0)
        tiles = p.blocks * ceil(p.rows, 128) ** 2
        work[_suits_wide(p)] += tiles * pad(p.columns, 64) * sum(layer.overlap(t) for t in ts)
    return work[False] > 0.05 * work[True]


def shapes(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `planes` and `residual`; at least one tile of each, as a descriptor of nothing is illegal."""
    packed = lay_out(problem)
    planes = max(sum(p.plane_rows for p in packed), 128)
    residual = max(sum(p.residual_rows for p in packed), 128)
    return (planes, PANEL), (residual, RESIDUAL_PANEL)
