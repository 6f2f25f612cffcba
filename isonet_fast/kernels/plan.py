"""The tile plan: which program computes which tile of which layer. It follows only from shapes, in numpy.

The tables' columns are described beside the kernels that read them (`pack.PACK`, `transform.PATCH`, `gram.GRAM`,
`grad.GRAD`, `grad.RUN`), the matrices that they point into in packed.py. Each gram tile also has one float32 in
`partials`, its weighted square sum.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..geometry import Layer, Precision
from ..problem import Problem
from .grad import GRAD, RUN
from .gram import GRAM
from .pack import PACK
from .packed import PANEL, RESIDUAL_PANEL, ROW_BLOCK, Packed, Unit, ceil, pack_layers, pad, shapes
from .rows import joined, product, tabulate
from .runs import append_part, append_tap_runs, append_wave_runs
from .spectrum import Spectrum, plan_spectrum
from .split_k import Cost, Pieces, balanced
from .tiles import PACK_COLUMNS, PACK_ROWS, VARIANTS, GradTile, GramTile, Variant

L2_BYTES = 30 << 20  # of an H100's 50 MB: half of them may belong to the other half of the chip
# In steps of the largest tiles: 2 microseconds to begin, with what gram writes; 4 for a tile of a gradient
GRAM_COST = Cost(begin=1.5, write=0.0, part=0.9)
GRAD_COST = Cost(begin=2.2, write=4.3, part=2.7)
GRAD_LAUNCH = 5e8  # what a launch takes that has little to do, 1.6 microseconds, in multiply-adds


class PlanRow(NamedTuple):
    """One layer in `Plan.summary()`. FLOPs are multiply-adds times two, the three products of bf16x3 counted."""

    shape: tuple[int, ...]
    units: int  # offsets or frequencies
    gram_tile: int
    grad_tile: tuple[int, int]
    gram_tiles: int
    grad_tiles: int
    flops: int  # what the mathematics needs: half plane, triangle at 0
    padded_flops: int  # what the tiles multiply
    bytes: int  # weights read and gradients written once, planes, residual and spectrum written once

    @property
    def waste(self) -> float:
        """Multiply-adds spent on padding, relative to the useful ones."""
        return self.padded_flops / self.flops - 1 if self.flops else 0.0


class Plan:
    """Every table of the launches for one problem; the module's docstring says what they index."""

    layers: tuple[Layer, ...]
    coefficients: tuple[float, ...]
    precision: Precision | None
    variant: Variant
    packed: list[Packed]
    planes_shape: tuple[int, int]
    residual_shape: tuple[int, int]
    pack_tiles: np.ndarray
    spectrum: Spectrum
    partial_ranges: np.ndarray  # each layer's first partial, and how many it has
    gram_parts: int  # pieces of the tiles that are split: split_k.py
    grad_parts: int
    arrivals: int  # tiles that are split
    runs: np.ndarray

    def __init__(self, problem: Problem, variant: str) -> None:
        self.layers, self.coefficients, self.precision = problem.layers, problem.coefficients, problem.precision
        self.variant = VARIANTS[variant]
        self.packed = pack_layers(problem)
        self.planes_shape, self.residual_shape = shapes(problem)
        self._gram_tile = self._choose_gram()
        self._grad_tile = self._choose_grad()
        # longest layers first, so that short ones fill the tail; a layer stays together, so that it stays in L2
        self._order = sorted(range(len(self.layers)), key=lambda n: (-self._longest(n), n))
        self.pack_tiles = joined([self._pack_rows(n) for n in self._order if not self.packed[n].by_frequency], PACK)
        self.spectrum = plan_spectrum(self.packed, self._grad_tile, self._order)
        self.gram_tiles: dict[GramTile, np.ndarray] = {}
        self.partial_ranges = np.zeros((len(self.layers), 2), np.int32)
        self.gram_parts = self.grad_parts = self.arrivals = 0
        self._plan_gram()
        self.grad_tiles: dict[GradTile, np.ndarray] = {}  # of weights
        self.spectrum_tiles: dict[GradTile, np.ndarray] = {}  # of planes, for transform_back
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
        """What is subtracted from each layer's penalty, by the rank that computes the unit 0."""
        own = [any(not any(t) for t in p.units) for p in self.packed]
        return np.array([layer.constant * o for layer, o in zip(self.layers, own, strict=True)], np.float64)

    @property
    def shares(self) -> np.ndarray:
        """What each layer's sum over units is multiplied by: 1 / n for n frequencies."""
        return 1 / np.array([p.divisor for p in self.packed], np.float64)

    @property
    def parts_size(self) -> int:
        """Elements of `parts`, for whichever of gram and the gradient needs more."""
        gram, grad = self.variant.gram[0], self.variant.grad[0]
        return max(self.gram_parts * gram.block**2, self.grad_parts * grad.rows * grad.columns)

    @cached_property
    def fills(self) -> bool:
        """Whether the gradient's tiles write every element: those of t = 0 do, and any frequency's transform back."""
        return all(any(p.by_frequency or not any(t) for t in p.units) for p in self.packed)

    @property
    def launches(self) -> dict[str, int]:
        """Kernel launches of a loss, and of the gradient that follows it."""
        first = (len(self.pack_tiles) > 0) + (len(self.spectrum.there) > 0)
        last = len(self.spectrum_tiles) + (len(self.spectrum.back) > 0)
        return {"loss": first + len(self.gram_tiles) + 1, "gradient": len(self.grad_tiles) + last}

    def _choose_gram(self) -> list[GramTile]:
        """The largest tile that fits each layer."""
        return [next(g for g in self.variant.gram if p.wide or g.block == ROW_BLOCK) for p in self.packed]

    def _gram_products(self, side: int, t: Unit) -> int:
        """Products of tiles for a residual of side x side tiles. A symmetric residual (unit 0) needs one triangle,
        and on its diagonal two products are each other's transposes."""
        products = self.variant.products
        return products * (side**2 if any(t) else side * (side + 1) // 2) - (products // 3 * side if not any(t) else 0)

    def _choose_grad(self) -> list[GradTile]:
        """The tile of least work for each layer. The layers of one form share a tile, and so a launch, if a second
        launch would save less than it costs: 5 %, since it has an end of its own, and GRAD_LAUNCH."""
        tiles = self.variant.grad
        work = [
            [self._grad_work(p, g) if p.wide or g.rows == ROW_BLOCK else math.inf for g in tiles] for p in self.packed
        ]
        one = {}
        for form in (False, True):
            members = [row for row, p in zip(work, self.packed, strict=True) if p.by_frequency == form]
            launches = len({row.index(min(row)) for row in members})
            one[form] = sum(row[0] for row in members) <= 1.05 * sum(map(min, members)) + GRAD_LAUNCH * (launches - 1)
        return [
            tiles[0] if one[p.by_frequency] else tiles[row.index(min(row))]
            for row, p in zip(work, self.packed, strict=True)
        ]

    @staticmethod
    def _grad_work(p: Packed, tile: GradTile) -> float:
        """Multiply-adds of a layer's gradient in tiles of this size, weighted with what they cost."""
        pairs = sum(p.pairs(t) * (2 if any(t) else 1) for t in p.units)
        return (
            p.blocks
            * pairs
            * pad(p.rows, tile.rows)
            * pad(p.columns, tile.columns)
            * pad(p.rows, ROW_BLOCK)
            * tile.cost
        )

    def _longest(self, n: int) -> int:
        p = self.packed[n]
        return max((p.pairs(t) for t in p.units), default=0) * p.columns

    def _shortest(self, n: int) -> int:
        p = self.packed[n]
        return min((p.pairs(t) for t in p.units), default=0) * p.columns

    def _pack_rows(self, n: int) -> np.ndarray:
        p = self.packed[n]
        blocks = range(p.blocks if p.units else 0)
        block, column, row = product(
            blocks, range(0, pad(p.columns, PACK_COLUMNS), PACK_COLUMNS), range(0, p.padded, PACK_ROWS)
        )
        return tabulate(
            PACK,
            layer=n,
            block=block,
            row=row,
            column=column,
            out_row=p.plane_base + block * p.planes * p.tap_rows + column // PANEL * p.padded + row,
            out_column=column % PANEL,
            taps=p.layer.taps,
            tap_rows=p.tap_rows,
        )

    def _plan_gram(self) -> None:
        first = 0
        # A layer of one offset has no short tile to fill the tail with, however long its tiles are: it comes early
        order = sorted(self._order, key=lambda n: -self._shortest(n))
        for tile in self.variant.gram:
            rows = [self._gram_rows(n) for n in order if self._gram_tile[n] == tile]
            table = joined(rows, GRAM)
            if len(table):
                self.gram_tiles[tile] = table
                table["partial"] = first + np.arange(len(table))
                layers, starts, counts = np.unique(table["layer"], return_index=True, return_counts=True)
                self.partial_ranges[layers] = np.stack([first + starts, counts], 1)
                first += len(table)
                products = np.where(table["a_row"] == table["b_row"], 2, 3) / 3
                cut = balanced(table["last"].astype(np.int64), products, GRAM_COST)
                table, self.gram_parts = self._in_pieces(table, cut, self.gram_parts)
                table["first"], table["last"] = cut.first, cut.last
                time = cut.programs(products, GRAM_COST).length
                planes = {n: self.packed[n].plane_rows * PANEL * 4 for n in layers}  # hi and lo
                self.gram_tiles[tile] = _longest_last_layers_first(table, time, planes)

    def _in_pieces(self, table: np.ndarray, cut: Pieces, parts: int) -> tuple[np.ndarray, int]:
        """The table with a row for each piece, for `add_pieces`, and the number of parts so far with these."""
        table = table[cut.row]
        split, starts = cut.pieces > 1, (cut.pieces > 1) & (cut.piece == 0)
        table["pieces"], table["piece"] = cut.pieces, cut.piece
        table["first_part"] = parts + np.cumsum(split) - 1 - cut.piece
        table["arrival"] = self.arrivals + np.cumsum(starts) - 1
        self.arrivals += int(starts.sum())
        return table, parts + int(split.sum())

    def _gram_rows(self, n: int) -> np.ndarray:
        """The rows of layer n, the units with the most products first."""
        p = self.packed[n]
        longest_first = sorted(enumerate(p.units), key=lambda it: -p.pairs(it[1]))
        return joined([self._gram_rows_at(n, index, t) for index, t in longest_first], GRAM)

    def _gram_rows_at(self, n: int, index: int, t: Unit) -> np.ndarray:
        p = self.packed[n]
        size, zero = self._gram_tile[n].block, not any(t)
        side = ceil(p.rows, size)
        block, i, j = product(range(p.blocks), range(side), range(side))
        if zero:  # symmetric: tiles on or above the diagonal
            block, i, j = block[i <= j], i[i <= j], j[i <= j]
        _, ky, kx = p.kernel
        u, v, (depth, height, width) = p.factors(index)
        r, c = i * size, j * size
        plane = p.plane_base + block * p.planes * p.tap_rows
        out = p.residual_base + (block * len(p.units) + index) * p.offset_rows
        filled = np.array([p.filled(b) for b in range(p.blocks)], np.int64)[block]
        return tabulate(
            GRAM,
            layer=n,
            a_row=plane + u * p.tap_rows + r,
            b_row=plane + v * p.tap_rows + c,
            last=p.pairs(t) * pad(p.columns, 64) // self._gram_tile[n].chunk,
            depth=depth,
            height=height,
            width=width,
            depth_step=ky * kx * p.tap_rows,
            height_step=kx * p.tap_rows,
            width_step=p.tap_rows,
            panel_rows=p.padded,
            columns=pad(p.columns, 64),
            out_row=out + c // RESIDUAL_PANEL * p.padded + r,
            out_column=c % RESIDUAL_PANEL,
            mirror_row=np.where(zero & (i < j), out + r // RESIDUAL_PANEL * p.padded + c, -1),
            mirror_column=r % RESIDUAL_PANEL,
            ones=np.where((zero | p.by_frequency) & (i == j), np.clip(filled - r, 0, size), 0),
            halves=np.where(zero & (i == j), 1, 2),
        )

    def _plan_grad(self) -> None:
        runs: list[tuple[int, ...]] = []
        known: dict[tuple, list[tuple[int, int, int]]] = {}
        for by_frequency, tables in ((False, self.grad_tiles), (True, self.spectrum_tiles)):
            members = [n for n in self._order if self.packed[n].by_frequency == by_frequency]
            for tile in self.variant.grad:
                rows = [self._grad_rows(n, runs, known) for n in members if self._grad_tile[n] == tile]
                table = joined(rows, GRAD)
                if len(table):
                    tables[tile] = self._in_grad_pieces(table, runs)
        self.runs = np.array([(*run, 0) for run in runs], RUN)

    def _in_grad_pieces(self, table: np.ndarray, runs: list[tuple[int, ...]]) -> np.ndarray:
        done = np.concatenate([[0], np.cumsum([run[1] - run[0] for run in runs])])
        steps = done[table["last_run"]] - done[table["first_run"]]
        cut = balanced(steps, np.ones(len(steps)), GRAD_COST)
        table, self.grad_parts = self._in_pieces(table, cut, self.grad_parts)
        _cut_runs(table, cut, runs)
        time = cut.programs(np.ones(len(steps)), GRAD_COST).length
        read = {n: 2 * (p.plane_rows * PANEL + p.residual_rows * RESIDUAL_PANEL) for n, p in enumerate(self.packed)}
        return _longest_last_layers_first(table, time, read)

    def _grad_rows(self, n: int, runs: list, known: dict[tuple, list[tuple[int, int, int]]]) -> np.ndarray:
        """Rows for each tap, or for C and S of each frequency, which the kernel takes for a block with two taps."""
        p, tile = self.packed[n], self._grad_tile[n]
        block, part, tap, row, column = product(
            range(p.blocks),
            range(p.parts),
            range(p.part_gradients),
            range(0, p.rows, tile.rows),
            range(0, p.columns, tile.columns),
        )
        contracted = pad(p.rows, ROW_BLOCK)
        steps = contracted // tile.depth
        if p.by_frequency:
            key: tuple = p.tap_rows, steps
            kind = 2 * np.array([any(w) for w in p.units], np.int64)[part] + tap
        else:
            key = p.layer.shape, p.layer.stride, p.layer.dilation, p.layer.penalty, p.units, p.padded, p.merged
            kind = tap
        if key not in known:
            known[key] = append_wave_runs(p, steps, runs) if p.by_frequency else append_tap_runs(p, steps, runs)
        first, middle, last = np.array(known[key], np.int64).reshape(-1, 3)[kind].T
        some = first < last  # if the work is split, a tap can have no runs here
        block, part, tap, row, column, first, middle, last = (
            x[some] for x in (block, part, tap, row, column, first, middle, last)
        )
        residual = p.residual_base + (block * len(p.units) + part) * p.offset_rows
        plane = p.plane_base + (block * p.parts + part) * p.part_planes * p.tap_rows
        return tabulate(
            GRAD,
            layer=n,
            block=block * p.parts + part,
            row=row,
            column=column,
            tap=tap,
            first_run=first,
            middle_run=middle,
            last_run=last,
            r_row=residual + row,
            t_row=residual + row // RESIDUAL_PANEL * p.padded,
            t_column=row % RESIDUAL_PANEL,
            a_row=plane + column // PANEL * p.padded,
            a_column=column % PANEL,
            panel_rows=p.padded,
            contracted=contracted,
        )

    def summary(self) -> list[PlanRow]:
        """What each layer costs, in the order of the layers."""
        rows = []
        for n, p in enumerate(self.packed):
            gram, grad = self._gram_tile[n], self._grad_tile[n]
            products = self.variant.products
            useful = padded = tiles = 0
            side = ceil(p.rows, gram.block)
            m, pairs = p.layer.rows, 0
            for t in p.units:
                multiplied = p.pairs(t)
                zero = not any(t)
                entries = m * (m + 1) // 2 if zero else m * m
                count = side * (side + 1) // 2 if zero else side * side
                useful += products * multiplied * p.layer.columns * entries * p.layer.groups
                padded += multiplied * pad(p.columns, 64) * self._gram_products(side, t) * gram.block**2 * p.blocks
                tiles += count * p.blocks
                pairs += multiplied * (1 if zero else 2)
            useful += pairs * m * m * p.layer.columns * p.layer.groups
            area = pad(p.rows, grad.rows) * pad(p.columns, grad.columns)
            padded += pairs * area * pad(p.rows, ROW_BLOCK) * p.blocks
            computed = p.gradients - (p.by_frequency and any(not any(t) for t in p.units))  # w = 0 has no D_S
            grad_tiles = p.blocks * computed * area // (grad.rows * grad.columns)
            size = 2 * products // 3 * 2 or 4  # bytes per packed element: two bf16 planes or one of float32
            traffic = math.prod(p.layer.shape) * 8 + p.plane_rows * PANEL * size
            traffic += p.residual_rows * RESIDUAL_PANEL * (2 if self.precision is None else 4)
            if p.by_frequency:
                traffic += p.blocks * p.gradients * p.padded * pad(p.columns, grad.columns) * 4
            rows.append(
                PlanRow(
                    p.layer.shape,
                    len(p.units),
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


def _cut_runs(table: np.ndarray, cut: Pieces, runs: list[tuple[int, ...]]) -> None:
    """Give each piece of a tile runs of its own; equal pieces of a tap share them."""
    known: dict[tuple[int, ...], tuple[int, int, int]] = {}
    names = ["first_run", "middle_run", "last_run"]
    for n in np.flatnonzero(cut.pieces > 1):
        whole = tuple(table[names][n].tolist())
        key = *whole, int(cut.first[n]), int(cut.last[n])
        if key not in known:
            known[key] = append_part(runs, *key)
        for name, value in zip(names, known[key], strict=True):
            table[name][n] = value


def _longest_last_layers_first(table: np.ndarray, time: np.ndarray, nbytes: dict[int, int]) -> np.ndarray:
    """Sort the tiles of the last layers by length, longest first, of as many layers as the L2 cache holds together.

    What starts last should be short, so that multiprocessors end together. Among all layers, that order would read the
    same rows from memory again and again.
    """
    layers = list(dict.fromkeys(table["layer"].tolist()))
    held, last = 0, set()
    for n in reversed(layers):
        held += nbytes[n]
        if held > L2_BYTES:
            break
        last.add(n)
    start = int(np.isin(table["layer"], list(last)).argmax()) if last else len(table)
    order = np.argsort(-time[start:], kind="stable")
    return np.concatenate([table[:start], table[start:][order]])
