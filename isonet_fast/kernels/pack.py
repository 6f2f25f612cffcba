"""pack: every weight, whatever its strides and dtype, into padded panels of bf16 hi and lo planes.

    hi = bf16(w),  lo = bf16(w - hi)        (or one float32 plane for precision="highest")

One program per 32 x 64 piece of one layer's rows and columns, walking its taps: in a contiguous weight the taps are
the fastest dimension, so that one piece's taps share cache lines, which stay in L1 until all are read. Transposed
layers, groups and the flattening of penalty="matrix" end here: the matrix kernels see one kind of problem.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl

from .layout import (
    PANEL,
    VIEW_ADDRESS,
    VIEW_COLUMN_STRIDE,
    VIEW_COLUMNS,
    VIEW_DTYPE,
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

# One row per piece of one layer's block: its first row and column, its place in `planes` at tap 0, and how many rows
# further the next tap is.
PACK = int32_columns("layer block row column out_row out_column taps tap_rows", width=8)
PACK_WIDTH = tl.constexpr(PACK.itemsize // 4)
TILE_LAYER = field(PACK, "layer")
TILE_BLOCK = field(PACK, "block")
TILE_ROW = field(PACK, "row")
TILE_COLUMN = field(PACK, "column")
TILE_OUT_ROW = field(PACK, "out_row")
TILE_OUT_COLUMN = field(PACK, "out_column")
TILE_TAPS = field(PACK, "taps")
TILE_TAP_ROWS = field(PACK, "tap_rows")


@triton.jit(do_not_specialize=["counted"])
def pack_kernel(
    hi,  # (rows, PANEL): bf16, or float32 if there is one plane
    lo,
    tiles,  # int32 (tiles, PACK_WIDTH)
    views,  # int64 (layers, VIEW_WIDTH), see layout.py
    arrivals,  # int32 (counted,): set to 0 for gram, which counts in it
    counted,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    for at in range(tl.program_id(0), counted, tl.num_programs(0)):
        tl.store(arrivals + at, 0)
    tile = tiles + tl.program_id(0) * PACK_WIDTH
    view = views + tl.load(tile + TILE_LAYER) * VIEW_WIDTH
    block = tl.load(tile + TILE_BLOCK)
    taps = tl.load(tile + TILE_TAPS)
    tap_rows = tl.load(tile + TILE_TAP_ROWS).to(tl.int64)
    r = tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    out = tl.load(tile + TILE_OUT_ROW).to(tl.int64) * PANEL + tl.multiple_of(tl.load(tile + TILE_OUT_COLUMN), COLUMNS)
    out = out + r[:, None] * PANEL + c[None, :]

    address = tl.load(view + VIEW_ADDRESS)
    dtype = tl.load(view + VIEW_DTYPE)
    rows_first = tl.load(view + VIEW_PATH) == 2
    merged = tl.load(view + VIEW_MERGED).to(tl.int32)
    row_group, row_offset = side(
        tl.load(tile + TILE_ROW) + r,
        tl.load(view + VIEW_ROWS),
        tl.load(view + VIEW_TAPS_IN_ROWS),
        tl.load(view + VIEW_ROW_STRIDE),
        view,
    )
    column_group, column_offset = side(
        tl.load(tile + TILE_COLUMN) + c,
        tl.load(view + VIEW_COLUMNS),
        tl.load(view + VIEW_TAPS_IN_COLUMNS),
        tl.load(view + VIEW_COLUMN_STRIDE),
        view,
    )
    group = block * merged + row_group
    row_offset += group * tl.load(view + VIEW_GROUP_STRIDE).to(tl.int32)
    row_group = tl.where((row_group < merged) & (group < tl.load(view + VIEW_GROUPS)), row_group, -1)
    # Both orders of the same piece: lanes run along whichever side is closer together in memory
    offset = row_offset[:, None] + column_offset[None, :]
    mask = row_group[:, None] == column_group[None, :]
    offset_t = row_offset[None, :] + column_offset[:, None]
    mask_t = row_group[None, :] == column_group[:, None]
    for tap in range(taps):
        at = tap_offset(tap, view)
        if dtype == 0:
            pointer = address.to(tl.pointer_type(tl.float32)) + at
            if rows_first:
                w = tl.load(pointer + offset_t, mask_t, other=0.0).T
            else:
                w = tl.load(pointer + offset, mask, other=0.0)
        elif dtype == 1:
            w = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at + offset, mask, other=0.0).to(tl.float32)
        else:
            w = tl.load(address.to(tl.pointer_type(tl.float16)) + at + offset, mask, other=0.0).to(tl.float32)
        if SPLIT:
            w_hi = w.to(tl.bfloat16)
            tl.store(hi + out, w_hi)
            tl.store(lo + out, (w - w_hi.to(tl.float32)).to(tl.bfloat16))
        else:
            tl.store(hi + out, w)
        out += tap_rows * PANEL
