"""grad: the gradient of every weight from the stored residuals and the packed hi plane.

    dL/dA_u = 2 * sum over v with v - u in T of R_{v-u} A_v,        R_{-t} = R_t^T

One program per tile of one dL/dA_u: a loop over the offsets that are stored, then one over those that are read
transposed. The tile is scaled by 2 * coefficient * grad_output, and stored through the layer's view, in its own layout.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    PANEL,
    RESIDUAL_PANEL,
    VIEW_ADDRESS,
    VIEW_COLUMN_STRIDE,
    VIEW_COLUMNS,
    VIEW_GROUP_STRIDE,
    VIEW_GROUPS,
    VIEW_MERGED,
    VIEW_PATH,
    VIEW_ROW_STRIDE,
    VIEW_ROWS,
    VIEW_TAPS_IN_COLUMNS,
    VIEW_TAPS_IN_ROWS,
    VIEW_WIDTH,
    field,
    int32_columns,
    side,
    tap_offset,
)
from .split_k import SPLIT_COLUMNS, add_pieces, store_piece

# One row per tile of one dL/dA_u, or per piece of a tile. `row`, `column`, `block` and `tap` say where it is stored.
# The runs from `first_run` on read R as it is stored, at `r_row` of `residual`, those from `middle_run` to `last_run`
# read it transposed, at `t_row` and `t_column`; a piece has a part of its tile's. A begins at `a_row` and
# `a_column` of `planes`. `contracted` rows of A are summed over. split_k.py describes the last four.
GRAD = int32_columns(
    "layer block row column tap first_run middle_run last_run r_row t_row t_column a_row a_column panel_rows "
    "contracted " + SPLIT_COLUMNS,
    width=20,
)
# What one loop contracts: a rectangle of taps, in lines of `width`. A tap takes as many steps as its `contracted` rows,
# and the loop goes from step `first` to `last`. R and A begin at `_base` and lie `_line` and `_tap` rows further for
# every line and tap. runs.py makes them.
RUN = int32_columns("first last width r_base r_line r_tap a_base a_line a_tap", width=12)
GRAD_WIDTH = tl.constexpr(GRAD.itemsize // 4)
RUN_LENGTH = tl.constexpr(RUN.itemsize // 4)
TILE_LAYER = field(GRAD, "layer")
TILE_BLOCK = field(GRAD, "block")
TILE_ROW = field(GRAD, "row")
TILE_COLUMN = field(GRAD, "column")
TILE_TAP = field(GRAD, "tap")
TILE_FIRST_RUN = field(GRAD, "first_run")
TILE_MIDDLE_RUN = field(GRAD, "middle_run")
TILE_LAST_RUN = field(GRAD, "last_run")
TILE_R_ROW = field(GRAD, "r_row")
TILE_T_ROW = field(GRAD, "t_row")
TILE_T_COLUMN = field(GRAD, "t_column")
TILE_A_ROW = field(GRAD, "a_row")
TILE_A_COLUMN = field(GRAD, "a_column")
TILE_PANEL_ROWS = field(GRAD, "panel_rows")
TILE_CONTRACTED = field(GRAD, "contracted")
TILE_PIECES = field(GRAD, "pieces")
RUN_FIRST = field(RUN, "first")
RUN_LAST = field(RUN, "last")
RUN_WIDTH = field(RUN, "width")
RUN_R_BASE = field(RUN, "r_base")
RUN_R_LINE = field(RUN, "r_line")
RUN_R_TAP = field(RUN, "r_tap")
RUN_A_BASE = field(RUN, "a_base")
RUN_A_LINE = field(RUN, "a_line")
RUN_A_TAP = field(RUN, "a_tap")


@triton.jit(do_not_specialize_on_alignment=["grad_output"])  # it may be any element of a tensor
def grad_kernel(
    residual,  # (rows, RESIDUAL_PANEL): boxes of (ROWS, DEPTH), or a pointer
    residual_t,  # the same tensor: boxes of (DEPTH, ROWS)
    hi,  # (rows, PANEL): boxes of (DEPTH, COLUMNS)
    out,  # float32: where the gradients go, unless ACCUMULATE; the views' addresses are relative to it
    parts,  # float32 (parts, ROWS, COLUMNS): pieces of tiles, see split_k.py
    arrivals,  # int32, 0
    tiles,  # int32 (tiles, GRAD_WIDTH)
    runs,  # int32 (runs, RUN_LENGTH)
    views,  # int64 (layers, VIEW_WIDTH), see layout.py
    coefficients,  # float64 (layers,)
    grad_output,  # one float32
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    IEEE: tl.constexpr,
    TMA: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add scale * gradient to what is there; else store grad_output * gradient
    REDUCE: tl.constexpr,  # add in the memory system, which from sm_90 on does so 16 bytes at a time
):
    tile = tiles + tl.program_id(0) * GRAD_WIDTH
    first_run = tl.load(tile + TILE_FIRST_RUN)
    middle_run = tl.load(tile + TILE_MIDDLE_RUN)
    last_run = tl.load(tile + TILE_LAST_RUN)
    r_row = tl.load(tile + TILE_R_ROW)
    t_row = tl.load(tile + TILE_T_ROW)
    t_column = tl.multiple_of(tl.load(tile + TILE_T_COLUMN), ROWS)
    a_row = tl.load(tile + TILE_A_ROW)
    a_column = tl.multiple_of(tl.load(tile + TILE_A_COLUMN), COLUMNS)
    panel_rows = tl.load(tile + TILE_PANEL_ROWS)
    steps = tl.load(tile + TILE_CONTRACTED) // DEPTH
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for index in tl.range(first_run, middle_run):
        run = runs + index * RUN_LENGTH
        width = tl.load(run + RUN_WIDTH)
        r_base = r_row + tl.load(run + RUN_R_BASE)
        r_line = tl.load(run + RUN_R_LINE)
        r_tap = tl.load(run + RUN_R_TAP)
        a_base = a_row + tl.load(run + RUN_A_BASE)
        a_line = tl.load(run + RUN_A_LINE)
        a_tap = tl.load(run + RUN_A_TAP)
        for it in tl.range(tl.load(run + RUN_FIRST), tl.load(run + RUN_LAST)):
            tap = it // steps
            step = it % steps
            r_at = (
                r_base
                + (tap // width) * r_line
                + (tap % width) * r_tap
                + step // (RESIDUAL_PANEL // DEPTH) * panel_rows
            )
            r_column = step % (RESIDUAL_PANEL // DEPTH) * DEPTH
            a_at = a_base + (tap // width) * a_line + (tap % width) * a_tap + step * DEPTH
            if TMA:
                left = residual.load([r_at, r_column])
                right = hi.load([a_at, a_column])
            else:
                left = tl.load(
                    residual + r_at.to(tl.int64) * RESIDUAL_PANEL + r_column + r[:, None] * RESIDUAL_PANEL + k[None, :]
                )
                right = tl.load(hi + a_at.to(tl.int64) * PANEL + a_column + k[:, None] * PANEL + c[None, :])
            if IEEE:
                acc = tl.dot(left, right, acc, input_precision="ieee")
            else:
                acc = tl.dot(left, right, acc)
    for index in tl.range(middle_run, last_run):
        run = runs + index * RUN_LENGTH
        width = tl.load(run + RUN_WIDTH)
        r_base = t_row + tl.load(run + RUN_R_BASE)
        r_line = tl.load(run + RUN_R_LINE)
        r_tap = tl.load(run + RUN_R_TAP)
        a_base = a_row + tl.load(run + RUN_A_BASE)
        a_line = tl.load(run + RUN_A_LINE)
        a_tap = tl.load(run + RUN_A_TAP)
        for it in tl.range(tl.load(run + RUN_FIRST), tl.load(run + RUN_LAST)):
            tap = it // steps
            depth = it % steps * DEPTH
            r_at = r_base + (tap // width) * r_line + (tap % width) * r_tap + depth
            a_at = a_base + (tap // width) * a_line + (tap % width) * a_tap + depth
            if TMA:
                left = residual_t.load([r_at, t_column]).T
                right = hi.load([a_at, a_column])
            else:
                left = tl.load(
                    residual_t
                    + r_at.to(tl.int64) * RESIDUAL_PANEL
                    + t_column
                    + r[:, None]
                    + k[None, :] * RESIDUAL_PANEL
                )
                right = tl.load(hi + a_at.to(tl.int64) * PANEL + a_column + k[:, None] * PANEL + c[None, :])
            if IEEE:
                acc = tl.dot(left, right, acc, input_precision="ieee")
            else:
                acc = tl.dot(left, right, acc)
    if tl.load(tile + TILE_PIECES) == 1:
        _finish(acc, 0, tile, out, views, coefficients, grad_output, scale, IEEE, ACCUMULATE, REDUCE)
    elif store_piece(acc, parts, arrivals, tile + TILE_PIECES):
        for at in range(0, COLUMNS, 64):  # registers hold one tile, not two
            acc_at = add_pieces(parts, tile + TILE_PIECES, at, ROWS, COLUMNS, 64)
            _finish(acc_at, at, tile, out, views, coefficients, grad_output, scale, IEEE, ACCUMULATE, REDUCE)


@triton.jit
def _finish(
    acc, at, tile, out, views, coefficients, grad_output, scale, IEEE: tl.constexpr, ACCUMULATE: tl.constexpr,
    REDUCE: tl.constexpr,
):  # fmt: skip
    """Scale a tile of a gradient, or its columns from `at` on, and store it in its layer's own layout."""
    layer = tl.load(tile + TILE_LAYER)
    factor = 2.0 * tl.load(coefficients + layer)
    if ACCUMULATE:
        factor *= scale
    else:
        factor *= tl.load(grad_output)
    acc *= factor.to(tl.float32)

    view = views + layer * VIEW_WIDTH
    address = tl.load(view + VIEW_ADDRESS)
    if not ACCUMULATE:
        address += out.to(tl.int64)
    block = tl.load(tile + TILE_BLOCK)
    row = tl.load(tile + TILE_ROW)
    column = tl.load(tile + TILE_COLUMN) + at
    start = tap_offset(tl.load(tile + TILE_TAP), view).to(tl.int64)
    sticks_out = (row + acc.shape[0] > tl.load(view + VIEW_ROWS)) | (
        column + acc.shape[1] > tl.load(view + VIEW_COLUMNS)
    )
    path = tl.where(sticks_out, 0, tl.load(view + VIEW_PATH))
    if IEEE:  # its operands are in registers: two more ways to store would halt the third program of a multiprocessor
        path = tl.where(path > 2, 0, path)
    start += tl.where(
        path == 0,
        0,
        block * tl.load(view + VIEW_GROUP_STRIDE)
        + row * tl.load(view + VIEW_ROW_STRIDE)
        + column * tl.load(view + VIEW_COLUMN_STRIDE),
    )
    place = address.to(tl.pointer_type(tl.float32)) + start  # only where path is not 0
    if path == 1:
        step = tl.load(view + VIEW_ROW_STRIDE) // 4 * 4
        _store_whole(acc, tl.multiple_of(place, 16), step, False, 16, ACCUMULATE, REDUCE)
    elif path == 2:
        step = tl.load(view + VIEW_COLUMN_STRIDE) // 4 * 4
        _store_whole(acc, tl.multiple_of(place, 16), step, True, 16, ACCUMULATE, REDUCE)
    elif (not IEEE) and path == 3:
        _store_whole(acc, place, tl.load(view + VIEW_ROW_STRIDE), False, 4, ACCUMULATE, REDUCE)
    elif (not IEEE) and path == 4:
        _store_whole(acc, place, tl.load(view + VIEW_COLUMN_STRIDE), True, 4, ACCUMULATE, REDUCE)
    else:
        _store_any(acc, address, start, block, row, column, view, ACCUMULATE, REDUCE)


@triton.jit
def _store(at, values, mask, ACCUMULATE: tl.constexpr, REDUCE: tl.constexpr):
    """Every element of a gradient is in one tile and is added to once: atomics too give the same bits each time.

    The result of an atomic is not used, so the addition is sent to the cache and nothing comes back to wait for.
    """
    if ACCUMULATE and REDUCE:
        tl.atomic_add(at, values, mask, sem="relaxed")
    else:
        if ACCUMULATE:
            values += tl.load(at, mask)
        tl.store(at, values, mask)


@triton.jit
def _store_whole(
    acc, at, step, ROWS_FIRST: tl.constexpr, ALIGNED: tl.constexpr, ACCUMULATE: tl.constexpr, REDUCE: tl.constexpr
):
    """Store a float32 tile inside the matrix, contiguous along one side: 16 bytes at a time where `at` and `step` are
    known to be ALIGNED to them, else 4, neighbours side by side."""
    if ACCUMULATE and acc.shape[1] > 64:  # else what is loaded would not fit the registers beside the tile
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        _store_whole(left, at, step, ROWS_FIRST, ALIGNED, ACCUMULATE, REDUCE)
        half = acc.shape[1] // 2 * (step if ROWS_FIRST else 1)
        _store_whole(right, tl.multiple_of(at + half, ALIGNED), step, ROWS_FIRST, ALIGNED, ACCUMULATE, REDUCE)
    else:
        r = tl.arange(0, acc.shape[0])
        c = tl.arange(0, acc.shape[1])
        if ROWS_FIRST:
            _store(at + step * c[:, None] + r[None, :], acc.T, None, ACCUMULATE, REDUCE)
        else:
            _store(at + step * r[:, None] + c[None, :], acc, None, ACCUMULATE, REDUCE)


@triton.jit
def _store_any(acc, address, start, block, row, column, view, ACCUMULATE: tl.constexpr, REDUCE: tl.constexpr):
    """Store with any strides, merged groups, or beyond an edge; 32 columns at a time, else the addresses would spill.

    Offsets inside a weight fit 32 bits (tables.py checks).
    """
    if acc.shape[1] > 32:
        left, right = acc.reshape(acc.shape[0], 2, acc.shape[1] // 2).permute(0, 2, 1).split()
        _store_any(left, address, start, block, row, column, view, ACCUMULATE, REDUCE)
        _store_any(right, address, start, block, row, column + acc.shape[1] // 2, view, ACCUMULATE, REDUCE)
    else:
        merged = tl.load(view + VIEW_MERGED).to(tl.int32)
        row_group, row_offset = side(
            row + tl.arange(0, acc.shape[0]),
            tl.load(view + VIEW_ROWS),
            tl.load(view + VIEW_TAPS_IN_ROWS),
            tl.load(view + VIEW_ROW_STRIDE),
            view,
        )
        column_group, column_offset = side(
            column + tl.arange(0, acc.shape[1]),
            tl.load(view + VIEW_COLUMNS),
            tl.load(view + VIEW_TAPS_IN_COLUMNS),
            tl.load(view + VIEW_COLUMN_STRIDE),
            view,
        )
        group = block * merged + row_group
        row_offset += group * tl.load(view + VIEW_GROUP_STRIDE).to(tl.int32)
        row_group = tl.where((row_group < merged) & (group < tl.load(view + VIEW_GROUPS)), row_group, -1)
        mask = row_group[:, None] == column_group[None, :]
        at = address.to(tl.pointer_type(tl.float32)) + start + (row_offset[:, None] + column_offset[None, :])
        _store(at, acc, mask, ACCUMULATE, REDUCE)
