"""Split-K: sums of tiles that are split between programs, so that no program takes longer than its share of a launch.

Each program stores its piece in `parts` and counts it in `arrivals`; the one that counts last adds the pieces up, in
their order, and finishes the tile. So the bits do not depend on which program is last, and none waits for another.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import heapq
import math
from typing import NamedTuple

import numpy as np
import triton
import triton.language as tl

from .layout import field, int32_columns

MULTIPROCESSORS = 132  # of an H100 or H200
SHARES = np.linspace(1.5, 0.7, 28)  # times of pieces to try, relative to the time of all tiles together
MOST_PIECES = 8  # equal ones

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


class Programs(NamedTuple):
    """What the programs of a launch take, in the order in which they start, and of which tile each has a piece."""

    own: np.ndarray  # until its sum is there, and stored where the tile is split
    rest: np.ndarray  # from there on, for the one of a tile that arrives last: to add the pieces and write the tile
    row: np.ndarray  # equal for the pieces of one tile
    pieces: np.ndarray  # of that tile

    @property
    def together(self) -> float:
        """The time of all programs."""
        return float(self.own.sum() + (self.rest / self.pieces).sum())

    @property
    def length(self) -> np.ndarray:
        """By what programs are sorted."""
        return self.own + np.where(self.pieces == 1, self.rest, 0)

    def longest_first(self) -> Programs:
        order = np.argsort(-self.length, kind="stable")
        return Programs(*(column[order] for column in self))


class Pieces(NamedTuple):
    """Rows of a table cut into pieces: `piece` of `pieces` of `row` is its steps `first` to `last`."""

    row: np.ndarray
    piece: np.ndarray
    pieces: np.ndarray
    first: np.ndarray  # step
    last: np.ndarray

    def programs(self, step: np.ndarray, cost: Cost) -> Programs:
        """What each piece takes if a step takes `step`."""
        part = np.where(self.pieces > 1, cost.part, 0)
        own = cost.begin + (self.last - self.first) * step[self.row] + part
        return Programs(own, cost.write + part * self.pieces, self.row, self.pieces)


def cut(steps: np.ndarray, most: np.ndarray) -> Pieces:
    """Sums of `steps` steps in pieces of `most` steps, the last one of which may be shorter."""
    pieces = -(-steps // most)
    row = np.repeat(np.arange(len(steps)), pieces)
    piece = np.arange(len(row)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    first, last = (np.minimum((piece + n) * most[row], steps[row]) for n in (0, 1))
    return Pieces(row, piece, pieces[row], first, last)


def within(limit: float, steps: np.ndarray, step: np.ndarray, cost: Cost, equal: bool) -> np.ndarray:
    """Steps of a piece, where sums that take longer than `limit` are cut: into pieces that are stored by then and a
    rest, which fills a gap; or, if `equal`, into as many equal pieces as it takes for all to be added by then."""
    most = np.clip((limit - cost.begin - cost.part) // step, 1, None).astype(np.int64)
    most = np.where(most < steps, most, -(-steps // 2))
    if equal:
        pieces = np.full(len(steps), 2)
        for _ in range(2, MOST_PIECES):
            end = cost.begin + -(-steps // pieces) * step + cost.part * (1 + pieces) + cost.write
            pieces += end > limit
        most = -(-steps // pieces)
    return np.where(cost.begin + steps * step + cost.write <= limit, steps, most)


def balanced(steps: np.ndarray, step: np.ndarray, cost: Cost) -> Pieces:
    """Whole sums, if they end at most 5 % later than multiprocessors with equal work would. Else several limits are
    tried, shares of that time and parts of the longest sum, and what ends first is taken. Then the sums of one length
    are cut otherwise, one length after the other, if that ends earlier."""
    best, end = steps, math.inf

    def attempt(most: np.ndarray) -> None:
        nonlocal best, end
        programs = cut(steps, most).programs(step, cost).longest_first()
        if programs.together < MULTIPROCESSORS * end and (ends := makespan(programs)) < end:
            best, end = most, ends

    attempt(steps)
    whole = cut(steps, steps).programs(step, cost)
    together = whole.together / MULTIPROCESSORS
    if end > 1.05 * together:
        for limit in np.concatenate([SHARES * together, whole.length.max() / np.arange(1, 9)]):
            for equal in (False, True):
                attempt(within(limit, steps, step, cost, equal))
        for kind in np.unique(np.stack([steps, step]), axis=1).T:
            same = (steps == kind[0]) & (step == kind[1])
            near = best[same][0] + np.arange(-3, 4)
            parts = -(-steps[same][0] // np.arange(1, MOST_PIECES + 1))
            for most in np.unique(np.clip(np.concatenate([near, parts]), 1, steps[same][0])):
                attempt(np.where(same, most, best))
    return cut(steps, best)


def makespan(programs: Programs, multiprocessors: int = MULTIPROCESSORS) -> float:
    """When the last program ends if each starts, in order, where a multiprocessor is free."""
    own, rest, rows, pieces = (column.tolist() for column in programs)
    left = dict(zip(rows, pieces, strict=True))  # pieces of each tile that have not arrived
    busy = [(0.0, -1)] * min(multiprocessors, len(own))  # until when, and with which program's own part
    waiting = iter(enumerate(own))
    end = 0.0
    while busy:
        end, program = busy[0]
        if program >= 0:
            left[rows[program]] -= 1
            if not left[rows[program]]:
                heapq.heapreplace(busy, (end + rest[program], -1))
                continue
        program, time = next(waiting, (-1, 0.0))
        if program >= 0:
            heapq.heapreplace(busy, (end + time, program))
        else:
            heapq.heappop(busy)
    return end
