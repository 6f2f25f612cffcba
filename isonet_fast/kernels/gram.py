"""gram: R_t = G_t - [t = 0] I of every layer and offset, and the weighted square sum of every tile.

    G_t[m, m'] = sum over n, u of A_u[m, n] A_{u+t}[m', n]

One program per tile of one G_t. The taps that overlap at one offset form a rectangle, walked with arithmetic; the
planes are padded, so nothing in the loop is masked. A mask or a table there would stop the loads from running ahead.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _gram_kernel(
    hi,  # bf16 (rows, 256), a descriptor or a pointer; float32 if there is one plane
    lo,  # A - hi, the same
    residual,  # (rows, 128)
    partials,  # float32, one per tile
    tiles,  # int32 (tiles, 20), see Plan._gram_rows
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PRODUCTS: tl.constexpr,  # 3 of two bf16 planes, or 1 of IEEE float32
    TMA: tl.constexpr,
    SAVE: tl.constexpr,  # whether a backward will want R
):
    tile = tiles + tl.program_id(0) * 20
    partial = tl.load(tile)
    a_row = tl.load(tile + 2)
    b_row = tl.load(tile + 3)
    depth = tl.load(tile + 4)
    height = tl.load(tile + 5)
    width = tl.load(tile + 6)
    depth_step = tl.load(tile + 7)
    height_step = tl.load(tile + 8)
    width_step = tl.load(tile + 9)
    panel_rows = tl.load(tile + 10)
    chunks = tl.load(tile + 11) // CHUNK
    r = tl.arange(0, BLOCK)
    c = tl.arange(0, BLOCK)
    k = tl.arange(0, CHUNK)
    inside = r[:, None] * 256 + k[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    # Tensor cores truncate as they add: the small products get accumulators of their own
    acc_hl = tl.zeros((BLOCK, BLOCK), tl.float32)
    acc_lh = tl.zeros((BLOCK, BLOCK), tl.float32)
    # One flat loop: around an inner one, Blackwell would carry all three accumulators in registers
    for it in tl.range(0, depth * height * width * chunks):
        tap = it // chunks
        chunk = it % chunks
        line = tap // width
        row = (line // height) * depth_step + (line % height) * height_step + (tap % width) * width_step
        row += chunk // (256 // CHUNK) * panel_rows
        column = chunk % (256 // CHUNK) * CHUNK
        if TMA:
            a_hi = hi.load([a_row + row, column])
            b_hi = hi.load([b_row + row, column])
            a_lo = lo.load([a_row + row, column])
            b_lo = lo.load([b_row + row, column])
        else:
            a_at = (a_row + row).to(tl.int64) * 256 + column
            b_at = (b_row + row).to(tl.int64) * 256 + column
            a_hi = tl.load(hi + a_at + inside)
            b_hi = tl.load(hi + b_at + inside)
            if PRODUCTS == 3:
                a_lo = tl.load(lo + a_at + inside)
                b_lo = tl.load(lo + b_at + inside)
        if PRODUCTS == 1:
            acc = tl.dot(a_hi, b_hi.T, acc, input_precision="ieee")
        elif TMA:
            acc_hl = tl.dot(a_hi, b_lo.T, acc_hl)
            acc_lh = tl.dot(a_lo, b_hi.T, acc_lh)
            acc = tl.dot(a_hi, b_hi.T, acc)
        else:  # mma holds operands in registers too: the two small products share an accumulator
            acc_hl = tl.dot(a_hi, b_lo.T, acc_hl)
            acc_hl = tl.dot(a_lo, b_hi.T, acc_hl)
            acc = tl.dot(a_hi, b_hi.T, acc)
    if PRODUCTS == 3:
        acc += acc_hl + acc_lh
    ones = tl.load(tile + 16)
    acc -= tl.where((r[:, None] == c[None, :]) & (r[:, None] < ones), 1.0, 0.0)
    halves = tl.load(tile + 17).to(tl.float32)
    tl.store(partials + partial, 0.5 * halves * tl.sum(acc * acc))
    if SAVE:
        out = acc.to(residual.dtype.element_ty)
        at = tl.load(tile + 12).to(tl.int64) * 128 + tl.multiple_of(tl.load(tile + 13), BLOCK)
        tl.store(residual + at + r[:, None] * 128 + c[None, :], out)
        mirror_row = tl.load(tile + 14)
        if mirror_row >= 0:  # G_0 is symmetric: the other triangle is stored, not computed
            at = mirror_row.to(tl.int64) * 128 + tl.multiple_of(tl.load(tile + 15), BLOCK)
            tl.store(residual + at + c[:, None] * 128 + r[None, :], out.T)
