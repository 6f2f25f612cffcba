"""The matrices that the kernels share, and where the elements of a weight (or its gradient) lie in memory.

A *view* is one row of int64 per layer, for any strides, dtype and groups. The pack kernel reads weights through it, the
grad kernel writes gradients through it. tables.py makes them. The tables of tiles are described beside their kernels.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

PANEL = tl.constexpr(256)  # columns of `planes`: the widest gradient tile reads one box
RESIDUAL_PANEL = tl.constexpr(128)  # columns of `residual`: the highest gradient tile reads one box, transposed too

VIEW = np.dtype(  # strides count elements
    [
        ("address", np.int64),  # in bytes; for a gradient in a flat buffer, relative to the buffer
        ("group_stride", np.int64),
        ("row_stride", np.int64),
        ("column_stride", np.int64),
        ("tap_strides", np.int64, 3),
        ("dtype", np.int64),  # tables.DTYPES
        ("path", np.int64),  # how a tile is read or stored: Tables._choose_path
        ("rows", np.int64),  # of one group's matrix
        ("columns", np.int64),
        ("merged", np.int64),  # groups per block
        ("groups", np.int64),
        ("taps_in_rows", np.int64),  # taps that penalty="matrix" has flattened into a side, else 1
        ("taps_in_columns", np.int64),
        ("kernel", np.int64, 2),  # the two inner sizes
        ("unused", np.int64, 3),
    ]
)


def field(table: np.dtype, name: str) -> tl.constexpr:
    """The number of a named column, as kernels add it to the address of a row of int32 (int64 in a view)."""
    size = 8 if table is VIEW else 4
    return tl.constexpr(table.fields[name][1] // size)  # type: ignore[index]


def int32_columns(names: str, width: int) -> np.dtype:
    """A table of int32 with these columns, filled up to a row of `width`."""
    fields = [(name, np.int32) for name in names.split()]
    return np.dtype([*fields, ("unused", np.int32, width - len(fields))] if len(fields) < width else fields)


VIEW_WIDTH = tl.constexpr(VIEW.itemsize // 8)
VIEW_ADDRESS = field(VIEW, "address")
VIEW_GROUP_STRIDE = field(VIEW, "group_stride")
VIEW_ROW_STRIDE = field(VIEW, "row_stride")
VIEW_COLUMN_STRIDE = field(VIEW, "column_stride")
VIEW_TAP_STRIDES = field(VIEW, "tap_strides")
VIEW_DTYPE = field(VIEW, "dtype")
VIEW_PATH = field(VIEW, "path")
VIEW_ROWS = field(VIEW, "rows")
VIEW_COLUMNS = field(VIEW, "columns")
VIEW_MERGED = field(VIEW, "merged")
VIEW_GROUPS = field(VIEW, "groups")
VIEW_TAPS_IN_ROWS = field(VIEW, "taps_in_rows")
VIEW_TAPS_IN_COLUMNS = field(VIEW, "taps_in_columns")
VIEW_KERNEL = field(VIEW, "kernel")


@triton.jit
def side(index, size, inner, stride, view):
    """Which group of its block an index of a merged side falls in, and the offset of its element; all 32 bits.

    inner is 1, or the number of taps where penalty="matrix" has flattened them into this side.
    """
    size = size.to(tl.int32)
    inner = inner.to(tl.int32)
    element = index % size
    return index // size, (element // inner) * stride.to(tl.int32) + tap_offset(element % inner, view)


@triton.jit
def tap_offset(tap, view):
    """Offset of a linear tap index: up to three kernel dimensions of any strides."""
    k1 = tl.load(view + VIEW_KERNEL).to(tl.int32)
    k2 = tl.load(view + VIEW_KERNEL + 1).to(tl.int32)
    lines = tap // k2
    offset = (lines // k1) * tl.load(view + VIEW_TAP_STRIDES).to(tl.int32)
    offset += (lines % k1) * tl.load(view + VIEW_TAP_STRIDES + 1).to(tl.int32)
    return offset + (tap % k2) * tl.load(view + VIEW_TAP_STRIDES + 2).to(tl.int32)
