"""Where the elements of a tap matrix lie in a weight (or its gradient), whatever its strides, dtype and groups.

A *view* is one row of int64 per layer (columns below); the pack kernel reads weights through it, the grad kernel
writes gradients through it.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


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
    k1 = tl.load(view + 15).to(tl.int32)
    k2 = tl.load(view + 16).to(tl.int32)
    lines = tap // k2
    offset = (lines // k1) * tl.load(view + 4).to(tl.int32)
    offset += (lines % k1) * tl.load(view + 5).to(tl.int32)
    return offset + (tap % k2) * tl.load(view + 6).to(tl.int32)
