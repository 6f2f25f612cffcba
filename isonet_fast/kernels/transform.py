"""transform: weights into planes at every frequency w; transform_back: gradients of these planes into those of weights.

For layers whose form is "frequency"; ops/frequency_form.py has the mathematics. Taps q are counted from the middle of
the kernel: that turns B(w) by a phase, which R does not see.

    C = sum over q of cos(wq) A_q      S = sum over q of sin(wq) A_q      P = C + S      N = S - C
    U = C P^T + S N^T - I              = Re R + Im R, of which the gram kernel stores U
    D_C = U P - U^T N                  D_S = U N + U^T P, from the grad kernel
    dL/dA_q = 2/n * sum over w of cos(wq) D_C + sin(wq) D_S

A frequency has the planes C, S, P, N, -N (packed.WAVES): a pair of frequencies is multiplied like an offset between two
taps. At w = 0 U = C C^T - I is symmetric, and D_C = U C. The tap opposite to q has the same cosine and the other sine,
so that A_q + A_-q and A_q - A_-q are multiplied, half as many. The middle tap is its own opposite: `waves` has half of
its cosine, which is 1.
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

# One row per patch of one layer's block: its first row and column, and its place. There, `out_row` and `out_column` are
# those of the first plane in `planes`, with `plane_rows` rows from plane to plane. Back, the patch begins at element
# `first` of D, counted in rows of 64, with `length` elements in a row and `size` rows of 64 in a plane. Cosines of
# `frequencies` and of half the taps are at `cosines`, in lines of `half`; sines at `sines`.
PATCH = int32_columns(
    "layer block row column out_row out_column plane_rows first length size frequencies real taps half cosines sines",
    width=16,
)
PATCH_WIDTH = tl.constexpr(PATCH.itemsize // 4)
TILE_LAYER = field(PATCH, "layer")
TILE_BLOCK = field(PATCH, "block")
TILE_ROW = field(PATCH, "row")
TILE_COLUMN = field(PATCH, "column")
TILE_OUT_ROW = field(PATCH, "out_row")
TILE_OUT_COLUMN = field(PATCH, "out_column")
TILE_PLANE_ROWS = field(PATCH, "plane_rows")
TILE_FIRST = field(PATCH, "first")
TILE_LENGTH = field(PATCH, "length")
TILE_SIZE = field(PATCH, "size")
TILE_FREQUENCIES = field(PATCH, "frequencies")
TILE_REAL = field(PATCH, "real")
TILE_TAPS = field(PATCH, "taps")
TILE_HALF = field(PATCH, "half")
TILE_COSINES = field(PATCH, "cosines")
TILE_SINES = field(PATCH, "sines")


@triton.jit
def _elements(tile, view, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The patch's elements, row after row: where each lies in the weight (32 bits), and whether it is there."""
    e = tl.arange(0, ROWS * COLUMNS)
    merged = tl.load(view + VIEW_MERGED).to(tl.int32)
    row_group, row_offset = side(
        tl.load(tile + TILE_ROW) + e // COLUMNS,
        tl.load(view + VIEW_ROWS),
        tl.load(view + VIEW_TAPS_IN_ROWS),
        tl.load(view + VIEW_ROW_STRIDE),
        view,
    )
    column_group, column_offset = side(
        tl.load(tile + TILE_COLUMN) + e % COLUMNS,
        tl.load(view + VIEW_COLUMNS),
        tl.load(view + VIEW_TAPS_IN_COLUMNS),
        tl.load(view + VIEW_COLUMN_STRIDE),
        view,
    )
    group = tl.load(tile + TILE_BLOCK) * merged + row_group
    offset = row_offset + column_offset + group * tl.load(view + VIEW_GROUP_STRIDE).to(tl.int32)
    inside = (row_group == column_group) & (row_group < merged) & (group < tl.load(view + VIEW_GROUPS))
    return offset, inside


@triton.jit
def _load_taps(address, dtype, taps_first, at, offset, inside):
    """(taps, elements) as float32, 0 outside. Lanes run along what is closer together in memory."""
    if dtype == 0:
        pointer = address.to(tl.pointer_type(tl.float32))
        if taps_first:
            w = tl.load(pointer + (offset[:, None] + at[None, :]), inside[:, None], other=0.0).T
        else:
            w = tl.load(pointer + (offset[None, :] + at[:, None]), inside[None, :], other=0.0)
    else:
        there = offset[None, :] + at[:, None]
        if dtype == 1:
            w = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + there, inside[None, :], other=0.0).to(tl.float32)
        else:
            w = tl.load(address.to(tl.pointer_type(tl.float16)) + there, inside[None, :], other=0.0).to(tl.float32)
    return w


@triton.jit
def _store_plane(hi, lo, at, values, mask, SPLIT: tl.constexpr):
    if SPLIT:
        values_hi = values.to(tl.bfloat16)
        tl.store(hi + at, values_hi, mask)
        tl.store(lo + at, (values - values_hi.to(tl.float32)).to(tl.bfloat16), mask)
    else:
        tl.store(hi + at, values, mask)


@triton.jit
def transform_kernel(
    hi,  # (rows, PANEL): bf16, or float32 if there is one plane
    lo,
    tiles,  # int32 (tiles, PATCH_WIDTH)
    waves,  # float32: cosines and sines
    views,  # int64 (layers, VIEW_WIDTH), see layout.py
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FREQUENCIES: tl.constexpr,  # at a time
    TAPS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    tile = tiles + tl.program_id(0) * PATCH_WIDTH
    view = views + tl.load(tile + TILE_LAYER) * VIEW_WIDTH
    taps = tl.load(tile + TILE_TAPS)
    frequencies = tl.load(tile + TILE_FREQUENCIES)
    half = tl.load(tile + TILE_HALF)
    cosines = waves + tl.load(tile + TILE_COSINES)
    sines = waves + tl.load(tile + TILE_SINES)
    plane = tl.load(tile + TILE_PLANE_ROWS).to(tl.int64) * PANEL
    address = tl.load(view + VIEW_ADDRESS)
    dtype = tl.load(view + VIEW_DTYPE)
    taps_first = (tl.load(view + VIEW_ROW_STRIDE) > 1) & (tl.load(view + VIEW_COLUMN_STRIDE) > 1)
    last = tap_offset(taps - 1, view)  # the offsets of a tap and of its opposite add up to this
    offset, inside = _elements(tile, view, ROWS, COLUMNS)
    e = tl.arange(0, ROWS * COLUMNS)
    out = tl.load(tile + TILE_OUT_ROW).to(tl.int64) * PANEL + tl.multiple_of(tl.load(tile + TILE_OUT_COLUMN), COLUMNS)
    out = out + ((e // COLUMNS) * PANEL + e % COLUMNS)
    for first in range(0, frequencies, FREQUENCIES):
        f = first + tl.arange(0, FREQUENCIES)
        c = tl.zeros((FREQUENCIES, ROWS * COLUMNS), tl.float32)
        s = tl.zeros((FREQUENCIES, ROWS * COLUMNS), tl.float32)
        for start in range(0, half, TAPS):
            tap = start + tl.arange(0, TAPS)
            wave = f[:, None] * half + tap[None, :]
            at_tap = tap_offset(tl.minimum(tap, (taps - 1) // 2), view)  # beyond the first half waves are 0
            here = _load_taps(address, dtype, taps_first, at_tap, offset, inside)
            there = _load_taps(address, dtype, taps_first, last - at_tap, offset, inside)
            c = tl.dot(tl.load(cosines + wave), here + there, c, input_precision="ieee")
            s = tl.dot(tl.load(sines + wave), here - there, s, input_precision="ieee")
        at = out[None, :] + f[:, None] * (5 * plane)
        mask = (f < frequencies)[:, None]
        _store_plane(hi, lo, at, c, mask, SPLIT)
        _store_plane(hi, lo, at + plane, s, mask, SPLIT)
        _store_plane(hi, lo, at + 2 * plane, c + s, mask, SPLIT)
        _store_plane(hi, lo, at + 3 * plane, s - c, mask, SPLIT)
        tl.store(hi + (at + 4 * plane), (c - s).to(hi.dtype.element_ty), mask)  # only the gradient reads it


@triton.jit
def transform_back_kernel(
    spectrum,  # float32: D_C and D_S of every frequency
    out,  # float32: where the gradients go, unless ACCUMULATE; the views' addresses are relative to it
    tiles,  # int32 (tiles, PATCH_WIDTH)
    waves,  # float32
    views,  # int64 (layers, VIEW_WIDTH)
    scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    TAPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,  # add to what is there
):
    tile = tiles + tl.program_id(0) * PATCH_WIDTH
    view = views + tl.load(tile + TILE_LAYER) * VIEW_WIDTH
    taps = tl.load(tile + TILE_TAPS)
    frequencies = tl.load(tile + TILE_FREQUENCIES)
    real = tl.load(tile + TILE_REAL)
    half = tl.load(tile + TILE_HALF)
    cosines = waves + tl.load(tile + TILE_COSINES)
    sines = waves + tl.load(tile + TILE_SINES)
    size = tl.load(tile + TILE_SIZE).to(tl.int64) * 64
    address = tl.load(view + VIEW_ADDRESS)
    if not ACCUMULATE:
        address += out.to(tl.int64)
    pointer = address.to(tl.pointer_type(tl.float32))
    taps_first = (tl.load(view + VIEW_ROW_STRIDE) > 1) & (tl.load(view + VIEW_COLUMN_STRIDE) > 1)
    last = tap_offset(taps - 1, view)  # the offsets of a tap and of its opposite add up to this
    offset, inside = _elements(tile, view, ROWS, COLUMNS)
    e = tl.arange(0, ROWS * COLUMNS)
    source = spectrum + tl.load(tile + TILE_FIRST).to(tl.int64) * 64
    source = source + ((e // COLUMNS) * tl.multiple_of(tl.load(tile + TILE_LENGTH), 64) + e % COLUMNS)
    for start in range(0, half, TAPS):
        tap = start + tl.arange(0, TAPS)
        even = tl.zeros((TAPS, ROWS * COLUMNS), tl.float32)
        odd = tl.zeros((TAPS, ROWS * COLUMNS), tl.float32)
        for first in range(0, frequencies, FREQUENCIES):
            f = first + tl.arange(0, FREQUENCIES)
            wave = f[None, :] * half + tap[:, None]
            at = source[None, :] + f[:, None] * (2 * size)
            mask = (f < frequencies)[:, None] & inside[None, :]
            even = tl.dot(tl.load(cosines + wave), tl.load(at, mask, other=0.0), even, input_precision="ieee")
            mask = mask & (f >= real)[:, None]  # w = 0 has no D_S
            odd = tl.dot(tl.load(sines + wave), tl.load(at + size, mask, other=0.0), odd, input_precision="ieee")
        at_tap, opposite = tap_offset(tap, view), taps - 1 - tap
        even *= tl.where(tap == opposite, 2.0, 1.0)[:, None] * scale
        odd *= scale
        _store_taps(pointer, taps_first, at_tap, offset, tap <= opposite, inside, even + odd, ACCUMULATE)
        _store_taps(pointer, taps_first, last - at_tap, offset, tap < opposite, inside, even - odd, ACCUMULATE)


@triton.jit
def _store_taps(pointer, taps_first, at, offset, exists, inside, values, ACCUMULATE: tl.constexpr):
    """The reverse of _load_taps. Every element of a gradient is in one patch."""
    if taps_first:
        _store(
            pointer + (offset[:, None] + at[None, :]), values.T, inside[:, None] & exists[None, :], ACCUMULATE
        )  # fmt: skip
    else:
        _store(
            pointer + (offset[None, :] + at[:, None]), values, inside[None, :] & exists[:, None], ACCUMULATE
        )  # fmt: skip


@triton.jit
def _store(at, values, mask, ACCUMULATE: tl.constexpr):
    if ACCUMULATE:
        values += tl.load(at, mask)
    tl.store(at, values, mask)
