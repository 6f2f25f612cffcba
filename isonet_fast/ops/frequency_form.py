"""The penalty as a sum over frequencies: fewer multiplications than the overlapping taps, and fewer roundings.

Let tap u be r q + p, with the phase p and q = 0 .. m - 1 in every dimension (r: `Layer.phases`, m: `Layer.periods`).
The phases side by side are columns: B_q = [A_{r q + p}]_p. Then G_{r t} = sum over q of B_q B_{q+t}^T. It vanishes
for |t| >= m, so that n = 2 m - 1 frequencies per dimension hold it without wrapping, and by Parseval

    B(w) = sum over q of B_q e^{-iwq} = C - iS              R = B(w) B(w)^H - I
    loss = 1/(2n) * sum over w of || R ||_F^2               dL/dB_q = 2/n * sum over w of Re(e^{iwq} R B(w))

Frequencies other than 0 come in conjugate pairs, and only one of each pair is computed. Two real products give its R,
and three give its R B (Gauss's trick). The definition of the complex product would take four for each. U = Re R + Im R
determines R, because Re R is symmetric and Im R is antisymmetric: Re R - Im R = U^T, and || R ||^2 = || U ||^2.

    X = C + S:         U = C X^T - S (C - S)^T - I
    D = Re R X:        Re(R B) = D - U^T S,   Im(R B) = U C - D          Re R = (U + U^T) / 2

Near the optimum R is a small difference of large numbers. So the diagonal of R is not taken from the product, whose
running sum is near one when small squares are still to come. torch.sum forms it, pairwise.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import Frequency, Layer

# Elements of C and S together, at most: as many pairs are computed at a time as fit.
SCRATCH = 2**22
# Elements of the few pairs that are multiplied at a time: every thread has some, in its second-level cache.
CACHE = 2**19
Waves = tuple[Tensor, Tensor]  # cos(wq) and sin(wq), for the transform there and for the one back


def pack(taps: Tensor, layer: Layer) -> Tensor:
    """(g, M, N, k...) -> (g, Q, M, N phases): the B_q, filled up with zeros where r q + p is no tap."""
    sizes = list(zip(layer.kernel, layer.periods, layer.phases, strict=True))
    missing = [m * r - k for k, m, r in sizes]
    if any(missing):
        taps = F.pad(taps, [side for fill in reversed(missing) for side in (0, fill)])
    dims = len(sizes)
    split = taps.reshape(*taps.shape[:3], *(size for _, m, r in sizes for size in (m, r)))
    q, p = range(3, 3 + 2 * dims, 2), range(4, 4 + 2 * dims, 2)
    return split.permute(0, *q, 1, 2, *p).reshape(len(taps), math.prod(layer.periods), taps.shape[1], -1)


def unpack(blocks: Tensor, layer: Layer) -> Tensor:
    dims, columns = len(layer.kernel), layer.columns
    split = blocks.reshape(len(blocks), *layer.periods, layer.rows, columns, *layer.phases)
    pairs = [axis for d in range(dims) for axis in (1 + d, 3 + dims + d)]
    sizes = [m * r for m, r in zip(layer.periods, layer.phases, strict=True)]
    taps = split.permute(0, 1 + dims, 2 + dims, *pairs).reshape(len(blocks), layer.rows, columns, *sizes)
    inside: tuple = (..., *(slice(k) for k in layer.kernel))
    return taps[inside]


def batch(
    blocks: Tensor, layer: Layer, frequencies: tuple[Frequency, ...], want_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Penalty (B,) and gradient (B, Q, M, N phases) of layers of one shape."""
    blocks = blocks.index_select(1, _inward(layer.periods, blocks.device))
    # the device of Apple's GPUs has no float64
    losses = blocks.new_zeros(len(blocks), dtype=None if blocks.device.type == "mps" else torch.float64)
    grads = torch.zeros_like(blocks) if want_grad else None
    pairs = [w for w in frequencies if any(w)]
    at_once = max(1, _scratch(layer, len(blocks)) // (2 * len(blocks) * layer.rows * blocks.shape[-1]))
    if len(pairs) < len(frequencies):
        losses += _at_zero(blocks, grads)
    for first in range(0, len(pairs), at_once):
        some = tuple(pairs[first : first + at_once])
        waves = _waves(layer.periods, layer.grid, some, blocks.dtype, blocks.device)
        losses += _at_pairs(blocks, waves, grads)
    n = math.prod(layer.grid)
    return losses.div_(2 * n), None if grads is None else grads.mul_(2 / n)


def _scratch(layer: Layer, layers: int) -> int:
    """SCRATCH, or fewer elements where rows are few: two thirds of what the official form needs for its products."""
    return min(SCRATCH, 2 * layers * math.prod(layer.grid) * layer.rows**2)


def _at_zero(blocks: Tensor, grad: Tensor | None) -> Tensor:
    """|| R ||^2 at w = 0, (B,). R B is added to `grad`."""
    b = blocks.sum(1)
    residual = torch.bmm(b, b.mT)
    torch.sum(b.square(), 2, out=residual.diagonal(dim1=1, dim2=2)).sub_(1)
    if grad is not None:
        grad.add_(torch.bmm(residual, b).unsqueeze(1))
    return residual.square().sum((1, 2))


def _at_pairs(blocks: Tensor, waves: Waves, grad: Tensor | None) -> Tensor:
    """|| R ||^2 summed over w and -w for the pairs of `waves`, (B,). Their gradient is added to `grad`."""
    layers, _, rows, columns = blocks.shape
    there, back = waves
    flat = blocks.flatten(2)
    c, s = (torch.bmm(wave.expand(layers, -1, -1), flat).view(-1, rows, columns) for wave in there)
    few = max(2, CACHE // (4 * rows * max(rows, columns)))
    squares = torch.cat([_products(*pairs, grad is not None) for pairs in zip(c.split(few), s.split(few), strict=True)])
    if grad is not None:
        for part, wave, sign in ((c, back[0], 2), (s, back[1], -2)):
            grad.flatten(2).baddbmm_(wave.mT.expand(layers, -1, -1), part.view(layers, len(wave), -1), alpha=sign)
    return 2 * squares.view(layers, -1).sum(1)


def _products(c: Tensor, s: Tensor, want_grad: bool) -> Tensor:
    """|| R ||^2 of each pair. Re(R B) and Im(R B) are written over C and S."""
    x = c + s
    z = c - s
    u = torch.bmm(c, x.mT).baddbmm_(s, z.mT, alpha=-1)
    squares = torch.mul(c, c, out=z).addcmul_(s, s)
    torch.sum(squares, 2, out=u.diagonal(dim1=1, dim2=2)).sub_(1)
    del z, squares
    if want_grad:
        # Measured on two threads of an AMD EPYC: with four plain products in place of these three, penalty and gradient
        # of one layer of 64 to 512 channels, 3x3, take 1.06 to 1.14 times as long.
        im = torch.bmm(u, c)
        d = torch.bmm(torch.lerp(u, u.mT, 0.5), x, out=c)
        im.sub_(d)
        d.baddbmm_(u.mT, s, alpha=-1)
        s.copy_(im)
    return u.square_().sum((1, 2))


@functools.lru_cache(maxsize=256)
def _waves(
    periods: tuple[int, ...],
    grid: tuple[int, ...],
    frequencies: tuple[Frequency, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Waves:
    """cos(wq) and sin(wq), rounded once, (2, frequencies, Q): with the q in the order of `_inward`, and as they are."""
    q = torch.tensor(list(itertools.product(*map(range, periods))), dtype=torch.float64)
    turns = torch.tensor(frequencies, dtype=torch.float64) / torch.tensor(grid, dtype=torch.float64)
    angles = 2 * math.pi * (turns @ q.T)
    back = torch.stack([angles.cos(), angles.sin()]).to(device, dtype)
    return back[..., _inward(periods, device)], back


@functools.lru_cache(maxsize=256)
def _inward(periods: tuple[int, ...], device: torch.device) -> Tensor:
    """The places of all q, the farthest from the middle of the kernel first.

    The largest taps are those in the middle. Added last, they cost one rounding of a large number. Added early, they
    cost one for every tap that follows.
    """
    q = torch.tensor(list(itertools.product(*map(range, periods))), dtype=torch.float64)
    middle = (torch.tensor(periods, dtype=torch.float64) - 1) / 2
    return (q - middle).square().sum(1).argsort(descending=True, stable=True).to(device)
