"""The penalty as a sum over offsets between taps: one batched matrix product per offset.

    loss    = 1/2 * sum over t in T of || G_t - [t = 0] I ||_F^2,   G_t = sum over u of A_u A_{u+t}^T
    dL/dA_u = 2 * sum over v with v - u in T of (G_{v-u} - [u = v] I) A_v

Only half of T is computed (G_{-t} is the transpose of G_t) and only taps that overlap are multiplied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..geometry import Layer, Offset


def pack(taps: Tensor, layer: Layer) -> Tensor:
    """(g, M, N, k...) -> (g, M, k..., N): the taps of a row side by side."""
    return taps.movedim(2, -1)


def unpack(taps: Tensor, layer: Layer) -> Tensor:
    return taps.movedim(-1, 2)


def batch(taps: Tensor, layer: Layer, offsets: tuple[Offset, ...], want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Penalty (B,) and gradient (B, M, k..., N) of layers of one shape."""
    taps = taps.contiguous()
    losses = taps.new_zeros(len(taps))
    grad = torch.zeros_like(taps) if want_grad else None
    for t in offsets:
        here, there = _overlap(t, layer)
        u, v = taps[here], taps[there]
        a, b = u.flatten(2), v.flatten(2)
        residual = _gram(a, b, layer)
        if any(t):  # G_t and its transpose G_{-t}: twice the loss, and both gradients
            losses.add_(residual.square().sum((1, 2)), alpha=2)
            residual = residual.to(taps.dtype)
            if grad is not None:
                grad[here].add_(torch.bmm(residual, b).view_as(u))
                grad[there].add_(torch.bmm(residual.mT, a).view_as(v))
        else:
            residual.diagonal(dim1=1, dim2=2).sub_(1)
            losses.add_(residual.square().sum((1, 2)))
            residual = residual.to(taps.dtype)
            if grad is not None:
                grad.add_(torch.bmm(residual, a).view_as(u))
    return losses.mul_(0.5), None if grad is None else grad.mul_(2)


def _gram(a: Tensor, b: Tensor, layer: Layer) -> Tensor:
    if layer.thin and a.device.type != "mps":  # mps has no float64
        return torch.bmm(a.double(), b.double().mT)
    return torch.bmm(a, b.mT)


def _overlap(t: Offset, layer: Layer) -> tuple[Any, Any]:
    """Indices into (B, M, k..., N) of the rectangle of taps u for which u + t is a tap, and of those u + t."""
    pairs = list(zip(t, layer.kernel, strict=True))
    here = (..., *(slice(max(0, -ti), k - max(0, ti)) for ti, k in pairs), slice(None))
    there = (..., *(slice(max(0, ti), k - max(0, -ti)) for ti, k in pairs), slice(None))
    return here, there
