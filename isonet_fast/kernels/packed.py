"""Where every layer lies in the device's matrices. It follows only from shapes.

    planes    (plane_rows, PANEL): every layer's and group's matrices that are multiplied, as panels of PANEL columns
        row = layer base + ((block * planes + u) * panels + n // PANEL) * padded + m
    residual  (residual_rows, RESIDUAL_PANEL): R of every layer, group and unit, in panels too
        row = layer base + ((block * units + t) * panels + m' // RESIDUAL_PANEL) * padded + m

In the form "overlap" a plane u is a tap, and a unit t is an offset between taps. In the form "frequency" units are
frequencies, and each has the planes that transform.py describes.

Panels of a fixed width make each of them one 2-D tensor, so that one host-made TMA descriptor per box shape serves
every layer. Rows are padded with zeros to the tile. Small groups (a depthwise convolution has one row per group) are
merged into *blocks*: their matrices lie on the diagonal of one bigger matrix, whose grams are block diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..geometry import Layer
from ..problem import Problem
from . import layout

PANEL, RESIDUAL_PANEL = layout.PANEL.value, layout.RESIDUAL_PANEL.value
ROW_BLOCK = 64  # the smallest tile; also the contraction step that padding must fill
NARROW_LAUNCH = 19_000  # 3 microseconds of tiles of 128 x 128, in columns that one of them contracts
WAVES = ("C", "S", "P", "N", "-N")  # the planes of a frequency, see transform.py

Unit = tuple[int, ...]


def ceil(value: int, step: int) -> int:
    return -(-value // step)


def pad(value: int, step: int) -> int:
    return ceil(value, step) * step


@dataclass(frozen=True)
class Packed:
    """Where one layer lies in the device's matrices, whatever the variant, so that shapes can be foretold."""

    layer: Layer
    units: tuple[Unit, ...]
    wide: bool  # tiles of 128 rows exist
    plane_base: int
    residual_base: int

    @cached_property
    def by_frequency(self) -> bool:
        return self.layer.triton_form == "frequency"

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
    def parts(self) -> int:
        """How many sets of planes a block has: one for each frequency, or over offsets one of all taps."""
        return len(self.units) if self.by_frequency else 1

    @cached_property
    def part_planes(self) -> int:
        return len(WAVES) if self.by_frequency else self.layer.taps

    @cached_property
    def part_gradients(self) -> int:
        """Gradients of planes: of every tap, or of C and S."""
        return 2 if self.by_frequency else self.layer.taps

    @cached_property
    def planes(self) -> int:
        """Planes per block."""
        return self.parts * self.part_planes

    @cached_property
    def gradients(self) -> int:
        """Gradients of planes per block."""
        return self.parts * self.part_gradients

    @cached_property
    def divisor(self) -> int:
        """What a sum over units is divided by."""
        return math.prod(self.layer.grid) if self.by_frequency else 1

    def pairs(self, unit: Unit) -> int:
        """Pairs of planes whose products add up to the residual of a unit."""
        if self.by_frequency:
            return 2 if any(unit) else 1
        return self.layer.overlap(unit)

    def factors(self, index: int) -> tuple[int, int, tuple[int, int, int]]:
        """The first pair of planes for the residual of unit `index`, and the box that all its pairs fill."""
        unit = self.units[index]
        if self.by_frequency:  # C P^T + S N^T, or C C^T
            first = index * len(WAVES)
            return first, first + (2 if any(unit) else 0), (1, 1, self.pairs(unit))
        _, ky, kx = self.kernel
        tz, ty, tx = t = (0,) * (3 - len(unit)) + unit
        u = (max(0, -tz) * ky + max(0, -ty)) * kx + max(0, -tx)
        v = (max(0, tz) * ky + max(0, ty)) * kx + max(0, tx)
        depth, height, width = (k - abs(x) for k, x in zip(self.kernel, t, strict=True))
        return u, v, (depth, height, width)

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
        return self.blocks * self.planes * self.tap_rows if self.units else 0

    @cached_property
    def residual_rows(self) -> int:
        return self.blocks * len(self.units) * self.offset_rows


def pack_layers(problem: Problem) -> list[Packed]:
    """Place the layers one after the other, with the units that this rank computes."""
    packed: list[Packed] = []
    plane = residual = 0
    fast = problem.precision is None
    units = problem.units(tuple([layer.triton_form for layer in problem.layers]), triton=True)
    narrow = fast and _narrow_pays(problem.layers, units)
    for layer, own in zip(problem.layers, units, strict=True):
        if math.prod(layer.shape) >= 2**31:
            raise ValueError(f"a weight of shape {layer.shape} has more elements than 32-bit offsets can name")
        one = Packed(layer, own, False, plane, residual)
        if fast and (not narrow or _suits_wide(one)):
            one = Packed(layer, own, True, plane, residual)
        packed.append(one)
        plane += one.plane_rows
        residual += one.residual_rows
    if max(plane, residual) >= 2**31:
        raise ValueError(f"the packed weights have {plane:,} rows of {PANEL}, more than 32-bit coordinates can name")
    return packed


def _suits_wide(p: Packed) -> bool:
    """Whether tiles of 128 rows serve this layer better than 64. Tiles of 64 read twice as many bytes per multiply-add,
    which costs 1.5 times as much where the L2 cache is the limit."""
    return pad(p.rows, 128) ** 2 <= 1.5 * pad(p.rows, 64) ** 2


def _narrow_pays(layers: Sequence[Layer], units: Sequence[tuple[Unit, ...]]) -> bool:
    """Whether tiles of 64 rows are worth a launch of their own, at whose end most of the GPU has nothing to do.

    They save about half of the work. Where that is less than NARROW_LAUNCH, they save less time than a launch takes.
    """
    work = {True: 0, False: 0}  # as wide tiles would do it
    for layer, own in zip(layers, units, strict=True):
        p = Packed(layer, own, False, 0, 0)
        tiles = p.blocks * ceil(p.rows, 128) ** 2
        work[_suits_wide(p)] += tiles * pad(p.columns, 64) * sum(map(p.pairs, own))
    return work[False] > 0.05 * work[True] and (work[False] > NARROW_LAUNCH or not work[True])


def shapes(problem: Problem) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `planes` and `residual`; at least one tile of each, as a descriptor of nothing is illegal."""
    packed = pack_layers(problem)
    planes = max(sum(p.plane_rows for p in packed), 128)
    residual = max(sum(p.residual_rows for p in packed), 128)
    return (planes, PANEL), (residual, RESIDUAL_PANEL)
