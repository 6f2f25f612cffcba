"""Split-K: sums of tiles that are split between programs, so that no program takes longer than its share of a launch.

Each program stores its piece in `parts` and counts it in `arrivals`; the one that counts last adds the pieces up, in
their order, and finishes the tile. So the bits do not depend on which program is last, and none waits for another.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl

from .layout import field, int32_columns

MULTIPROCESSORS = 132  # of an H100 or H200
SHARES = np.linspace(1.5, 0.7, 28)  # times of pieces to try, relative to the time of all tiles together

# Columns that every table of tiles ends with: how many pieces the tile has, which one the row is, where in `parts` they
# begin, and where in `arrivals` they are counted.
SPLIT_COLUMNS = "pieces piece first_part arrival"
SPLIT = int32_columns(SPLIT_COLUMNS, width=4)
PIECES = field(SPLIT, "pieces")
PIECE = field(SPLIT, "piece")
FIRST_PART = field(SPLIT, "first_part")
ARRIVAL = field(SPLIT, "arrival")


@triton.jit
def store_piece(acc, parts, arrivals, columns):
    """Store the piece that SPLIT_COLUMNS at `columns` describe; whether it is the last of its tile to arrive."""
    r = tl.arange(0, acc.shape[0])
    c = tl.arange(0, acc.shape[1])
    part = (tl.load(columns + FIRST_PART) + tl.load(columns + PIECE)).to(tl.int64) * (acc.shape[0] * acc.shape[1])
    tl.store(parts + part + r[:, None] * acc.shape[1] + c[None, :], acc)
    tl.debug_barrier()  # every thread has stored before one of them counts
    return tl.atomic_add(arrivals + tl.load(columns + ARRIVAL), 1, sem="acq_rel") == tl.load(columns + PIECES) - 1


@triton.jit
def add_pieces(parts, columns, at, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Columns `at` to `at` + WIDTH of a tile whose pieces are all there."""
    r = tl.arange(0, ROWS)
    c = tl.arange(0, WIDTH)
    first_part = tl.load(columns + FIRST_PART).to(tl.int64)
    first = parts + first_part * (ROWS * COLUMNS) + at + r[:, None] * COLUMNS + c[None, :]
    acc = tl.load(first, cache_modifier=".cg")  # from where other multiprocessors have written it
    for piece in range(1, tl.load(columns + PIECES)):
        acc += tl.load(first + piece * (ROWS * COLUMNS), cache_modifier=".cg")
    return acc


class Cost(NamedTuple):
    """What a program takes beside its products: to begin, to write its tile, to store or load a piece of one."""

    begin: float
    write: float
    part: float


class Pieces(NamedTuple):
    """Rows of a table cut into pieces: `piece` of `pieces` of `row` is its steps `first` to `last`."""

    row: np.ndarray
    piece: np.ndarray
    pieces: np.ndarray
    first: np.ndarray  # step
    last: np.ndarray

    def times(self, step: np.ndarray, cost: Cost) -> np.ndarray:
        """What each piece takes if a step takes `step`. The last one of a tile adds them up and writes it."""
        ends, split = self.piece == self.pieces - 1, self.pieces > 1
        moved = split + split * ends * self.pieces
        return cost.begin + (self.last - self.first) * step[self.row] + cost.part * moved + cost.write * ends


def cut(steps: np.ndarray, step: np.ndarray, cost: Cost, limit: float) -> Pieces:
    """Sums of `steps` steps, cut into pieces that take at most `limit`, if they can. The last piece has to add and
    write, so it is shorter than the others."""
    most = np.maximum(1, (limit - cost.begin - cost.part) // step)
    # with p pieces the last one may have `room` - p * part / step steps
    room = (limit - cost.begin - cost.write - cost.part) / step
    fewest = np.ceil((steps + most - room) / np.maximum(most - cost.part / step, 1e-9))
    pieces = np.clip(np.minimum(fewest, np.ceil((steps - 1) / most) + 1), 2, steps)
    pieces = np.where(cost.begin + steps * step + cost.write <= limit, 1, pieces).astype(np.int64)
    row = np.repeat(np.arange(len(steps)), pieces)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    most, left = most.astype(np.int64)[row], steps[row] - pieces[row]  # every piece has a step
    ends = piece == pieces[row] - 1
    last = np.where(ends, steps[row], np.minimum((piece + 1) * most, left + piece + 1))
    return Pieces(row, piece, pieces[row], np.minimum(piece * most, left + piece), last)


def balanced(steps: np.ndarray, step: np.ndarray, cost: Cost) -> Pieces:
    """Whole sums, if they end at most 5 % later than multiprocessors with equal work would. Else several limits are
    tried, shares of that time and parts of the longest sum, and the pieces that end first are taken."""
    whole = cut(steps, step, cost, (cost.begin + steps * step + cost.write).max())
    time = whole.times(step, cost)
    together = time.sum() / MULTIPROCESSORS
    if makespan(np.sort(time)[::-1].tolist()) <= 1.05 * together:
        return whole
    limits = np.concatenate([SHARES * together, time.max() / np.arange(1, 9)])
    tried = [cut(steps, step, cost, limit) for limit in limits]
    return min(tried, key=lambda pieces: makespan(np.sort(pieces.times(step, cost))[::-1].tolist()))


def makespan(times: Iterable[float], multiprocessors: int = MULTIPROCESSORS) -> float:
    """When the last program ends if each starts, in order, where one is free."""
    busy = [0.0] * multiprocessors
    for time in times:
        heapq.heapreplace(busy, busy[0] + time)
    return max(busy)
