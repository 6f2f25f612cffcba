"""finish: every layer's penalty and the weighted total from the gram tiles' partial sums, in a fixed order."""

# mypy: allow-untyped-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["layers", "longest"])
def finish_kernel(
    loss,  # float32: sum of coefficient * penalty
    losses,  # float32 (layers,)
    partials,  # float32
    ranges,  # int32 (layers, 2): first partial, count
    shares,  # float64 (layers,): what a sum is multiplied by
    constants,  # float64 (layers,)
    coefficients,  # float64 (layers,)
    layers,
    longest,  # the largest count
    LAYERS: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    """One program: a few thousand numbers, all layers side by side, added in float64 (no atomics: same bits)."""
    total = tl.zeros((LAYERS,), tl.float64)
    for start in range(0, layers, LAYERS):
        layer = start + tl.arange(0, LAYERS)
        exists = layer < layers
        first = tl.load(ranges + layer * 2, exists, other=0)
        count = tl.load(ranges + layer * 2 + 1, exists, other=0)
        sums = tl.zeros((LAYERS, PARTIALS), tl.float64)  # reduced once: a reduction in the loop costs its latency
        for at in range(0, longest, PARTIALS):
            index = at + tl.arange(0, PARTIALS)
            pointer = partials + first[:, None] + index[None, :]
            sums += tl.load(pointer, index[None, :] < count[:, None], other=0.0).to(tl.float64)
        penalty = tl.sum(sums, 1) * tl.load(shares + layer, exists, other=0.0)
        penalty -= tl.load(constants + layer, exists, other=0.0)
        tl.store(losses + layer, penalty.to(tl.float32), exists)
        total += penalty * tl.load(coefficients + layer, exists, other=0.0)
    tl.store(loss, tl.sum(total, 0).to(tl.float32))
