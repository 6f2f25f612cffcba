"""Where the elements of a tap matrix lie in a weight (or its gradient), whatever its strides, dtype and groups.

A *view* is one row of int64 per layer; the pack kernel reads weights through it, the grad kernel writes gradients
through it. tables.py makes them.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import numpy as np
import triton
import triton.language as tl

VIEW = np.dtype(  # strides count elements
    [
        ("address", np.int64),  # in bytes; of a gradient in a flat buffer relative to the buffer's
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


def _place(name: str) -> tl.constexpr:
    return tl.constexpr(VIEW.fields[name][1] // 8)  # type: ignore[index]


VIEW_WIDTH = tl.constexpr(VIEW.itemsize // 8)
VIEW_ADDRESS = _place("address")
VIEW_GROUP_STRIDE = _place("group_stride")
VIEW_ROW_STRIDE = _place("row_stride")
VIEW_COLUMN_STRIDE = _place("column_stride")
VIEW_TAP_STRIDES = _place("tap_strides")
VIEW_DTYPE = _place("dtype")
VIEW_PATH = _place("path")
VIEW_ROWS = _place("rows")
VIEW_COLUMNS = _place("columns")
VIEW_MERGED = _place("merged")
VIEW_GROUPS = _place("groups")
VIEW_TAPS_IN_ROWS = _place("taps_in_rows")
VIEW_TAPS_IN_COLUMNS = _place("taps_in_columns")
VIEW_KERNEL = _place("kernel")


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
