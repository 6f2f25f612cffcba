"""The tile plan: which program computes which tile of which layer, from shapes alone, in numpy on the host.

Three matrices live on the device, whatever the number of layers:

    planes    (plane_rows, 256)     A_u of every layer, group and tap u, as panels of 256 columns:
                                    row = layer base + ((block * taps + u) * panels + n // 256) * padded + m
    residual  (residual_rows, 128)  R_t = G_t - [t = 0] I of every layer, group and offset t, as panels of 128:
                                    row = layer base + ((block * offsets + t) * panels + m' // 128) * padded + m
    partials  (gram tiles,)         one weighted square sum per gram tile

Panels of a fixed width make each of them one 2-D tensor, so that one host-made TMA descriptor per box shape serves
every layer. Rows are padded with zeros to the tile. Small groups (a depthwise convolution has one row per group) are
merged into *blocks*: their matrices lie on the diagonal of one bigger matrix, whose grams are block diagonal.

The half of T that is needed is in lexicographic order, so for whole layers the offset's index is affine in the taps:
both loops of the gradient are arithmetic. A table read in them would cost a pipeline stage.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..geometry import Layer
from .tiles import PACK_COLUMNS, PACK_ROWS, VARIANTS, GradTile, GramTile

Offset = tuple[int, ...]

PANEL = 256  # columns of `planes`: the widest gradient tile reads one box
RESIDUAL_PANEL = 128  # columns of `residual`: the highest gradient tile reads one box, transposed too
ROW_BLOCK = 64  # the smallest tile; also the contraction step that padding must fill


def _ceil(value: int, step: int) -> int:
    return -(-value // step)


def _pad(value: int, step: int) -> int:
    return _ceil(value, step) * step


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
        return _ceil(self.layer.groups, self.merged)

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
        return _pad(self.rows, 128 if self.wide else ROW_BLOCK)

    @cached_property
    def tap_rows(self) -> int:
        return _ceil(self.columns, PANEL) * self.padded

    @cached_property
    def offset_rows(self) -> int:
        return _ceil(self.rows, RESIDUAL_PANEL) * self.padded

    @cached_property
    def plane_rows(self) -> int:
        return self.blocks * self.layer.taps * self.tap_rows if self.offsets else 0

    @cached_property
    def residual_rows(self) -> int:
        return self.blocks * len(self.offsets) * self.offset_rows


def _lay_out(layers: Sequence[Layer], offsets: Sequence[tuple[Offset, ...]], precision: str | None) -> list[Packed]:
    packed: list[Packed] = []
    plane = residual = 0
    narrow = precision is None and _narrow_pays(layers, offsets)
    for layer, ts in zip(layers, offsets, strict=True):
        if math.prod(layer.shape) >= 2**31:
            raise ValueError(f"a weight of shape {layer.shape} has more elements than 32-bit offsets can name")
        one = Packed(layer, tuple(ts), False, plane, residual)
        if precision is None and (not narrow or _suits_wide(one)):
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
    return _pad(p.rows, 128) ** 2 <= 1.5 * _pad(p.rows, 64) ** 2


def _narrow_pays(layers: Sequence[Layer], offsets: Sequence[tuple[Offset, ...]]) -> bool:
    """Whether tiles of 64 rows are worth a launch of their own, at whose end most of the GPU has nothing to do."""
    work = {True: 0, False: 0}  # as wide tiles would do it
    for layer, ts in zip(layers, offsets, strict=True):
        p = Packed(layer, tuple(ts), False, 0, 0)
        tiles = p.blocks * _ceil(p.rows, 128) ** 2
        work[_suits_wide(p)] += tiles * _pad(p.columns, 64) * sum(layer.overlap(t) for t in ts)
    return work[False] > 0.05 * work[True]


def shapes(
    layers: Sequence[Layer], offsets: Sequence[tuple[Offset, ...]], precision: str | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes of `planes` and `residual`; at least one tile of each, as a descriptor of nothing is illegal."""
    packed = _lay_out(layers, offsets, precision)
    planes = max(sum(p.plane_rows for p in packed), 128)
    residual = max(sum(p.residual_rows for p in packed), 128)
    return (planes, PANEL), (residual, RESIDUAL_PANEL)


class Row(NamedTuple):
    """One layer in `Plan.summary()`. FLOPs are multiply-adds times two, the three products of bf16x3 counted."""

    shape: tuple[int, ...]
    offsets: int
    gram_tile: int
    grad_tile: tuple[int, int]
    gram_tiles: int
    grad_tiles: int
    flops: int  # what the mathematics needs: half plane, triangle at t = 0
    padded_flops: int  # what the tiles multiply
    bytes: int  # weights read and gradients written once, planes and residual written once

    @property
    def waste(self) -> float:
        """Multiply-adds spent on padding, relative to the useful ones."""
        return self.padded_flops / self.flops - 1 if self.flops else 0.0


class Plan:
    """Every table of the launches for one list of layers; see the module's docstring for what they index."""

    def __init__(
        self,
        layers: tuple[Layer, ...],
        offsets: tuple[tuple[Offset, ...], ...],
        precision: str | None,
        variant: str,
    ) -> None:
        self.layers, self.offsets, self.precision = layers, offsets, precision
        self.variant = VARIANTS[variant]
        self.packed = _lay_out(layers, offsets, precision)
        self.planes_shape, self.residual_shape = shapes(layers, offsets, precision)
        self._gram_tile = [self._choose_gram(p) for p in self.packed]
        self._grad_tile = [self._choose_grad(p) for p in self.packed]
        # longest layers first, so that short ones fill the tail; a layer stays together, so that it stays in L2
        self._order = sorted(range(len(layers)), key=lambda n: (-self._longest(n), n))
        self.pack_tiles = self._table([self._pack_rows(n) for n in self._order], 8)
        self.gram_tiles: dict[GramTile, np.ndarray] = {}
        self.partial_ranges = np.zeros((len(layers), 2), np.int32)  # first partial of a layer, and how many
        self._plan_gram()
        self.grad_tiles: dict[GradTile, np.ndarray] = {}
        self._plan_grad()

    @cached_property
    def partials(self) -> int:
        return int(self.partial_ranges[:, 1].sum())

    @cached_property
    def longest_range(self) -> int:
        """The most partial sums that one layer has."""
        return int(self.partial_ranges[:, 1].max())

    @property
    def constants(self) -> np.ndarray:
        """What is subtracted from each layer's penalty, by the rank that computes t = 0."""
        own = [any(not any(t) for t in p.offsets) for p in self.packed]
        return np.array([layer.constant * o for layer, o in zip(self.layers, own, strict=True)], np.float64)

    @property
    def launches(self) -> dict[str, int]:
        """Kernel launches of a loss, and of the gradient that follows it."""
        return {"loss": 2 + len(self.gram_tiles), "gradient": len(self.grad_tiles)}

    def _choose_gram(self, p: Packed) -> GramTile:
        return next(g for g in self.variant.gram if p.wide or g.block == ROW_BLOCK)

    def _choose_grad(self, p: Packed) -> GradTile:
        fitting = (g for g in self.variant.grad if p.wide or g.rows == ROW_BLOCK)
        return min(fitting, key=lambda g: _pad(p.rows, g.rows) * _pad(p.columns, g.columns) * g.cost)

    def _longest(self, n: int) -> int:
        p = self.packed[n]
        return max((p.layer.overlap(t) for t in p.offsets), default=0) * p.columns

    @staticmethod
    def _table(rows: list[np.ndarray], width: int) -> np.ndarray:
        return np.ascontiguousarray(np.concatenate(rows) if rows else np.zeros((0, width)), np.int32)

    @staticmethod
    def _product(*axes: Sequence[int] | range) -> list[np.ndarray]:
        """Every combination, the last axis fastest, as one flat array per axis."""
        return [a.ravel() for a in np.meshgrid(*(np.asarray(a, np.int64) for a in axes), indexing="ij")]

    def _pack_rows(self, n: int) -> np.ndarray:
        """layer, block, first row, first column, row in `planes` at tap 0, column there, taps, rows per tap"""
        p = self.packed[n]
        blocks = range(p.blocks if p.offsets else 0)
        block, column, row = self._product(
            blocks, range(0, _pad(p.columns, PACK_COLUMNS), PACK_COLUMNS), range(0, p.padded, PACK_ROWS)
        )
        out = p.plane_base + block * p.layer.taps * p.tap_rows + column // PANEL * p.padded + row
        same = np.ones_like(block)
        fields = n * same, block, row, column, out, column % PANEL, p.layer.taps * same, p.tap_rows * same
        return np.stack(fields, 1)

    def _plan_gram(self) -> None:
        parts: dict[GramTile, list[np.ndarray]] = {}
        for tile in self.variant.gram:
            parts[tile] = [self._gram_rows(n) for n in self._order if self._gram_tile[n] == tile]
        first = 0
        for tile, rows in parts.items():
            table = self._table(rows, 20)
            if len(table):
                self.gram_tiles[tile] = table
                table[:, 0] = first + np.arange(len(table))
                layers, starts, counts = np.unique(table[:, 1], return_index=True, return_counts=True)
                self.partial_ranges[layers] = np.stack([first + starts, counts], 1)
                first += len(table)

    def _gram_rows(self, n: int) -> np.ndarray:
        """One row per tile of one layer:

        partial, layer, row of A_u and of A_{u+t} at the first overlapping tap, depth, height, width of the rectangle
        of overlapping taps, rows in `planes` per step of each, rows per panel, columns, row and column in `residual`
        of the tile and of its mirror (-1: none), diagonal entries that 1 is subtracted from, halves of the loss
        """
        p = self.packed[n]
        block_size = self._gram_tile[n].block
        side = _ceil(p.rows, block_size)
        kz, ky, kx = p.kernel
        rows = []
        for index, t in sorted(enumerate(p.offsets), key=lambda it: -p.layer.overlap(it[1])):
            tz, ty, tx = (0,) * (3 - len(t)) + t
            u = (max(0, -tz) * ky + max(0, -ty)) * kx + max(0, -tx)
            v = (max(0, tz) * ky + max(0, ty)) * kx + max(0, tx)
            block, i, j = self._product(range(p.blocks), range(side), range(side))
            if not any(t):  # G_0 is symmetric: tiles on or above the diagonal
                block, i, j = block[i <= j], i[i <= j], j[i <= j]
            plane = p.plane_base + block * p.layer.taps * p.tap_rows
            base = p.residual_base + (block * len(p.offsets) + index) * p.offset_rows
            filled = np.array([p.filled(b) for b in range(p.blocks)])[block]
            diagonal = (i == j) if not any(t) else np.zeros_like(i, bool)
            mirrored = (i < j) if not any(t) else np.zeros_like(i, bool)
            r, c = i * block_size, j * block_size
            same = np.ones_like(i)
            fields = (
                same,
                n * same,
                plane + u * p.tap_rows + r,
                plane + v * p.tap_rows + c,
                (kz - abs(tz)) * same,
                (ky - abs(ty)) * same,
                (kx - abs(tx)) * same,
                ky * kx * p.tap_rows * same,
                kx * p.tap_rows * same,
                p.tap_rows * same,
                p.padded * same,
                _pad(p.columns, 64) * same,
                base + c // RESIDUAL_PANEL * p.padded + r,
                c % RESIDUAL_PANEL,
                np.where(mirrored, base + r // RESIDUAL_PANEL * p.padded + c, -1),
                r % RESIDUAL_PANEL,
                np.where(diagonal, np.clip(filled - r, 0, block_size), 0),
                np.where(diagonal, 1, 2),
                0 * same,
                0 * same,
            )
            rows.append(np.stack(fields, 1))
        return np.concatenate(rows) if rows else np.zeros((0, 20), np.int64)

    def _plan_grad(self) -> None:
        runs: list[tuple[int, ...]] = []
        cache: dict[tuple, list[tuple[int, int, int]]] = {}
        for tile in self.variant.grad:
            rows = [self._grad_rows(n, runs, cache) for n in self._order if self._grad_tile[n] == tile]
            if rows:
                self.grad_tiles[tile] = self._table(rows, 16)
        self.runs = np.array(runs, np.int32).reshape(-1, 12)

    def _grad_rows(self, n: int, runs: list, cache: dict[tuple, list[tuple[int, int, int]]]) -> np.ndarray:
        """One row per tile of one layer:

        layer, block, first row, first column, tap, first run, first transposed run, last run, row of R at offset 0,
        the same transposed, its column, row of A at tap 0, column there, rows per residual panel, rows contracted
        """
        p, tile = self.packed[n], self._grad_tile[n]
        key = p.layer.shape, p.layer.stride, p.layer.dilation, p.layer.penalty, p.offsets, p.padded, p.merged
        if key not in cache:
            cache[key] = [_append_runs(p, u, runs) for u in itertools.product(*map(range, p.kernel))]
        ranges = np.array(cache[key], np.int64).reshape(-1, 3)
        block, tap, row, column = self._product(
            range(p.blocks),
            range(p.layer.taps),
            range(0, p.rows, tile.rows),
            range(0, p.columns, tile.columns),
        )
        residual = p.residual_base + block * len(p.offsets) * p.offset_rows
        same = np.ones_like(row)
        fields = (
            n * same,
            block,
            row,
            column,
            tap,
            *ranges[tap].T,
            residual + row,
            residual + row // RESIDUAL_PANEL * p.padded,
            row % RESIDUAL_PANEL,
            p.plane_base + block * p.layer.taps * p.tap_rows + column // PANEL * p.padded,
            column % PANEL,
            p.padded * same,
            _pad(p.rows, ROW_BLOCK) * same,
            0 * same,
        )
        return np.stack(fields, 1)

    def summary(self) -> list[Row]:
        """What each layer costs, in the order of the layers."""
        rows = []
        for n, p in enumerate(self.packed):
            gram, grad = self._gram_tile[n], self._grad_tile[n]
            products = 3 if self.precision is None else 1
            useful = padded = tiles = 0
            side = _ceil(p.rows, gram.block)
            m, pairs = p.layer.rows, 0
            for t in p.offsets:
                overlap = p.layer.overlap(t)
                zero = not any(t)
                entries = m * (m + 1) // 2 if zero else m * m
                count = side * (side + 1) // 2 if zero else side * side
                useful += products * overlap * p.layer.columns * entries * p.layer.groups
                padded += products * overlap * _pad(p.columns, 64) * count * gram.block**2 * p.blocks
                tiles += count * p.blocks
                pairs += overlap * (1 if zero else 2)
            useful += pairs * m * m * p.layer.columns * p.layer.groups
            area = _pad(p.rows, grad.rows) * _pad(p.columns, grad.columns)
            padded += pairs * area * _pad(p.rows, ROW_BLOCK) * p.blocks
            grad_tiles = p.blocks * p.layer.taps * area // (grad.rows * grad.columns)
            size = 2 * products // 3 * 2 or 4  # bytes per packed element: two bf16 planes or one of float32
            traffic = math.prod(p.layer.shape) * 8 + p.plane_rows * PANEL * size
            traffic += p.residual_rows * RESIDUAL_PANEL * (2 if self.precision is None else 4)
            rows.append(
                Row(
                    p.layer.shape,
                    len(p.offsets),
                    gram.block,
                    (grad.rows, grad.columns),
                    tiles,
                    grad_tiles,
                    2 * useful,
                    2 * padded,
                    traffic,
                )
            )
        return rows


def _append_runs(p: Packed, u: tuple[int, ...], runs: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """Append what the gradient of tap u contracts; returns (first run, first transposed run, last run).

    A run is a rectangle of taps walked with arithmetic, from its first to its last index:
        first, last, width, row of R at index 0, per line, per tap, row of A at index 0, per line, per tap
    """
    first = len(runs)
    direct, transposed = _whole_runs(p, u) if _is_whole(p) else _partial_runs(p, u)
    runs += direct
    middle = len(runs)
    runs += transposed
    return first, middle, len(runs)


def _is_whole(p: Packed) -> bool:
    """All offsets are here and lie in a plane: one run serves each direction."""
    return p.offsets == p.layer.offsets and p.kernel[0] == 1


def _whole_runs(p: Packed, u: tuple[int, ...]) -> tuple[list, list]:
    """Taps v with v - u in T form a lattice with u on it; those from u on are the direct run, those before it the
    transposed one. The index of offset t is (line of t) * width of T + (column of t)."""
    _, ky, kx = p.kernel
    _, uy, ux = u
    sy, sx = (1, 1, *p.layer.steps)[-2:]
    offsets_wide = 2 * ((kx - 1) // sx) + 1
    width = (kx - 1 - ux % sx) // sx + 1
    lines = (ky - 1 - uy % sy) // sy + 1
    here = (uy // sy) * width + ux // sx
    at_u = ((uy // sy) * offsets_wide + ux // sx) * p.offset_rows
    line, step = offsets_wide * p.offset_rows, p.offset_rows
    a = ((uy % sy) * kx + ux % sx) * p.tap_rows, sy * kx * p.tap_rows, sx * p.tap_rows
    direct = (here, lines * width, width, -at_u, line, step, *a, 0, 0, 0)
    transposed = (0, here, width, at_u, -line, -step, *a, 0, 0, 0)
    return [direct], [transposed] if here else []


def _partial_runs(p: Packed, u: tuple[int, ...]) -> tuple[list, list]:
    """Any subset of the offsets, any dimension: maximal arithmetic progressions."""
    _, ky, kx = p.kernel
    found: tuple[list, list] = ([], [])
    for index, t in enumerate(p.offsets):
        t3 = (0,) * (3 - len(t)) + t
        for transposed, sign in ((0, 1), (1, -1)):
            if transposed and not any(t):
                continue
            v = tuple(ui + sign * ti for ui, ti in zip(u, t3, strict=True))
            if all(0 <= vi < k for vi, k in zip(v, p.kernel, strict=True)):
                tap = (v[0] * ky + v[1]) * kx + v[2]
                found[transposed].append((index * p.offset_rows, tap * p.tap_rows))
    return _progressions(found[0]), _progressions(found[1])


def _progressions(pairs: list[tuple[int, int]]) -> list[tuple[int, ...]]:
    runs: list[tuple[int, ...]] = []
    at = 0
    while at < len(pairs):
        end = at + 1
        step = (0, 0)
        if end < len(pairs):
            step = pairs[end][0] - pairs[at][0], pairs[end][1] - pairs[at][1]
            while end < len(pairs) and (pairs[end][0] - pairs[end - 1][0], pairs[end][1] - pairs[end - 1][1]) == step:
                end += 1
        count = end - at
        runs.append((0, count, count, pairs[at][0], 0, step[0], pairs[at][1], 0, step[1], 0, 0, 0))
        at = end
    return runs
