"""gram: R_t = G_t - [t = 0] I of every layer and offset, and the weighted square sum of every tile.

    G_t[m, m'] = sum over n, u of A_u[m, n] A_{u+t}[m', n]

One program per tile of one G_t. The taps that overlap at one offset form a rectangle, walked with arithmetic; the
planes are padded, so nothing in the loop is masked. A mask or a table there would stop the loads from running ahead.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .layout import PANEL, RESIDUAL_PANEL, field, int32_columns
from .split_k import SPLIT_COLUMNS, add_pieces, store_piece

# One row per tile, or per piece of a tile. A rectangle of overlapping taps is `depth` x `height` x `width`; its first
# pair is in rows `a_row` and `b_row` of `planes`, and a step along a side is as many rows further as its `_step` says.
# `columns` are contracted, a chunk per step; a piece is steps `first` to `last`. `out` and `mirror` are the places of
# the tile and of its transpose in `residual` (mirror_row -1: none). 1 is subtracted from the first `ones` diagonal
# entries; the tile's square sum counts `halves` times one half. split_k.py describes the last four.
GRAM = int32_columns(
    "partial layer a_row b_row first last depth height width depth_step height_step width_step panel_rows columns "
    "out_row out_column mirror_row mirror_column ones halves " + SPLIT_COLUMNS,
    width=24,
)
GRAM_WIDTH = tl.constexpr(GRAM.itemsize // 4)
TILE_PARTIAL = field(GRAM, "partial")
TILE_A_ROW = field(GRAM, "a_row")
TILE_B_ROW = field(GRAM, "b_row")
TILE_FIRST = field(GRAM, "first")
TILE_LAST = field(GRAM, "last")
TILE_DEPTH = field(GRAM, "depth")
TILE_HEIGHT = field(GRAM, "height")
TILE_WIDTH = field(GRAM, "width")
TILE_DEPTH_STEP = field(GRAM, "depth_step")
TILE_HEIGHT_STEP = field(GRAM, "height_step")
TILE_WIDTH_STEP = field(GRAM, "width_step")
TILE_PANEL_ROWS = field(GRAM, "panel_rows")
TILE_COLUMNS = field(GRAM, "columns")
TILE_OUT_ROW = field(GRAM, "out_row")
TILE_OUT_COLUMN = field(GRAM, "out_column")
TILE_MIRROR_ROW = field(GRAM, "mirror_row")
TILE_MIRROR_COLUMN = field(GRAM, "mirror_column")
TILE_ONES = field(GRAM, "ones")
TILE_HALVES = field(GRAM, "halves")
TILE_PIECES = field(GRAM, "pieces")


@triton.jit
def _place(
    it, chunks, height, width, depth_step, height_step, width_step, panel_rows, CHUNK: tl.constexpr
):  # fmt: skip
    """Rows and column at which a step of the loop reads, relative to the tile's first."""
    tap = it // chunks
    chunk = it % chunks
    line = tap // width
    row = (line // height) * depth_step + (line % height) * height_step + (tap % width) * width_step
    return row + chunk // (PANEL // CHUNK) * panel_rows, chunk % (PANEL // CHUNK) * CHUNK


@triton.jit
def _rows(plane, row, column, inside, TMA: tl.constexpr):
    """A tile of a plane."""
    if TMA:
        return plane.load([row, column])
    else:
        return tl.load(plane + (row.to(tl.int64) * PANEL + column) + inside)


@triton.jit
def _finish_tile(acc, tile, residual, partials, BLOCK: tl.constexpr, SAVE: tl.constexpr):
    """Store the square sum of a tile of R_t, and the tile itself for a backward."""
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK)
    ones = tl.load(tile + TILE_ONES)
    acc -= tl.where((r[:, None] == c[None, :]) & (r[:, None] < ones), 1.0, 0.0)
    halves = tl.load(tile + TILE_HALVES).to(tl.float32)
    tl.store(partials + tl.load(tile + TILE_PARTIAL), 0.5 * halves * tl.sum(acc * acc))
    if SAVE:
        out = acc.to(residual.dtype.element_ty)
        at = tl.load(tile + TILE_OUT_ROW).to(tl.int64) * RESIDUAL_PANEL + tl.multiple_of(
            tl.load(tile + TILE_OUT_COLUMN), BLOCK
        )
        tl.store(residual + at + r[:, None] * RESIDUAL_PANEL + c[None, :], out)
        mirror_row = tl.load(tile + TILE_MIRROR_ROW)
        if mirror_row >= 0:  # G_0 is symmetric: the other triangle is stored, not computed
            at = mirror_row.to(tl.int64) * RESIDUAL_PANEL + tl.multiple_of(tl.load(tile + TILE_MIRROR_COLUMN), BLOCK)
            tl.store(residual + at + c[:, None] * RESIDUAL_PANEL + r[None, :], out.T)


@triton.jit
def gram_kernel(
    hi,  # bf16 (rows, PANEL), a descriptor or a pointer; float32 if there is one plane
    lo,  # A - hi, the same
    residual,  # (rows, RESIDUAL_PANEL)
    partials,  # float32, one per tile
    parts,  # float32 (parts, BLOCK, BLOCK): pieces of tiles, see split_k.py
    arrivals,  # int32, 0
    tiles,  # int32 (tiles, GRAM_WIDTH)
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCTS: tl.constexpr,  # 3 of two bf16 planes, or 1 of IEEE float32
    TMA: tl.constexpr,
    SAVE: tl.constexpr,  # whether a backward will want R
):
    tile = tiles + tl.program_id(0) * GRAM_WIDTH
    a_row = tl.load(tile + TILE_A_ROW)
    b_row = tl.load(tile + TILE_B_ROW)
    first = tl.load(tile + TILE_FIRST)
    depth = tl.load(tile + TILE_DEPTH)
    height = tl.load(tile + TILE_HEIGHT)
    width = tl.load(tile + TILE_WIDTH)
    depth_step = tl.load(tile + TILE_DEPTH_STEP)
    height_step = tl.load(tile + TILE_HEIGHT_STEP)
    width_step = tl.load(tile + TILE_WIDTH_STEP)
    panel_rows = tl.load(tile + TILE_PANEL_ROWS)
    chunks = tl.load(tile + TILE_COLUMNS) // CHUNK
    # `last` is the smaller. With a number from memory as the loops' bound, ptxas runs out of registers on sm_80
    last = tl.minimum(tl.load(tile + TILE_LAST), depth * height * width * chunks)
    r = tl.arange(0, BLOCK)
    k = tl.arange(0, CHUNK)
    inside = r[:, None] * PANEL + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    # Tensor cores truncate as they add: the small products get accumulators of their own
    acc_hl = tl.zeros((BLOCK, BLOCK), tl.float32)
    if (PRODUCTS == 3) and (a_row == b_row):  # on the diagonal of t = 0: half the loads, and lo hi^T = (hi lo^T)^T
        for it in tl.range(first, last):
            row, column = _place(it, chunks, height, width, depth_step, height_step, width_step, panel_rows, CHUNK)
            a_hi = _rows(hi, a_row + row, column, inside, TMA)
            a_lo = _rows(lo, a_row + row, column, inside, TMA)
            acc_hl = tl.dot(a_hi, a_lo.T, acc_hl)
            acc = tl.dot(a_hi, a_hi.T, acc)
        acc += acc_hl + acc_hl.T
    else:
        acc_lh = tl.zeros((BLOCK, BLOCK), tl.float32)
        # One flat loop: with a loop inside, Blackwell would carry all three accumulators in registers
        for it in tl.range(first, last):
            row, column = _place(it, chunks, height, width, depth_step, height_step, width_step, panel_rows, CHUNK)
            a_hi = _rows(hi, a_row + row, column, inside, TMA)
            b_hi = _rows(hi, b_row + row, column, inside, TMA)
            if PRODUCTS == 1:
                acc = tl.dot(a_hi, b_hi.T, acc, input_precision="ieee")
            else:
                a_lo = _rows(lo, a_row + row, column, inside, TMA)
                b_lo = _rows(lo, b_row + row, column, inside, TMA)
                acc_hl = tl.dot(a_hi, b_lo.T, acc_hl)
                if TMA:
                    acc_lh = tl.dot(a_lo, b_hi.T, acc_lh)
                else:  # mma holds operands in registers too: the two small products share an accumulator
                    acc_hl = tl.dot(a_lo, b_hi.T, acc_hl)
                acc = tl.dot(a_hi, b_hi.T, acc)
        if PRODUCTS == 3:
            acc += acc_hl + acc_lh
    whole = tl.load(tile + TILE_PIECES) == 1
    if not whole:
        whole = store_piece(acc, parts, arrivals, tile + TILE_PIECES)
        if whole:
            acc = add_pieces(parts, tile + TILE_PIECES, 0, BLOCK, BLOCK, BLOCK)
    if whole:
        _finish_tile(acc, tile, residual, partials, BLOCK, SAVE)
