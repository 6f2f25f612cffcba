"""The orthogonality penalty and its gradient in closed form: one batched GEMM per offset, no autograd graph.

    loss    = 1/2 * sum over t in T of || G_t - [t = 0] I ||_F^2,   G_t = sum over u of A_u A_{u+t}^T
    dL/dA_u = 2 * sum over v with v - u in T of (G_{v-u} - [u = v] I) A_v

Only half of T is computed (G_{-t} is the transpose of G_t) and only taps that overlap are multiplied. Layers of one
shape form one batch, so a deep network of small layers costs a few large calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..geometry import Layer, Offset


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The penalty of half-precision weights is computed in float32."""
    return torch.promote_types(dtype, torch.float32)


def evaluate(
    weights: Sequence[Tensor],
    layers: Sequence[Layer],
    offsets: Sequence[tuple[Offset, ...]],
    sink: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """The unweighted penalty of every layer, (L,); `sink(n, dpenalty_n / dW_n)` receives each gradient.

    Only the given offsets are computed. A gradient is a view in the shape of its weight, valid during the call.
    """
    batches: dict[tuple, list[int]] = {}
    for n, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if offsets[n]:
            batches.setdefault((layer, offsets[n], wide_dtype(weight.dtype), weight.device), []).append(n)
    wide = max((wide_dtype(w.dtype) for w in weights), key=lambda d: d.itemsize, default=torch.float32)
    losses = torch.zeros(len(weights), dtype=wide, device=weights[0].device if weights else None)
    with torch.autocast(losses.device.type, enabled=False):
        for (layer, ts, dtype, _), members in batches.items():
            taps = torch.stack([_pack(weights[n].detach(), layer, dtype) for n in members]).flatten(0, 1)
            batch_losses, grad = _batch(taps, layer, ts, sink is not None)
            losses[members] = batch_losses.view(len(members), layer.groups).sum(1).to(wide)
            if not any(ts[0]):
                losses[members] -= layer.constant
            if sink is not None and grad is not None:
                for n, g in zip(members, grad.unflatten(0, (len(members), layer.groups)), strict=True):
                    sink(n, _unpack(g, layer))
    return losses


def _pack(weight: Tensor, layer: Layer, dtype: torch.dtype) -> Tensor:
    """(O, I/g, k...) -> (g, M, k..., N): the taps of a row side by side."""
    taps = weight.to(dtype)
    if layer.rule.flatten:
        taps = taps.flatten(1)
    taps = taps.unflatten(0, (layer.groups, -1))  # (g, O/g, I/g, k...)
    return (taps.movedim(2, 1) if layer.transposed else taps).movedim(2, -1)


def _unpack(taps: Tensor, layer: Layer) -> Tensor:
    weight = taps.movedim(-1, 2)
    return (weight.movedim(2, 1) if layer.transposed else weight).flatten(0, 1).reshape(layer.shape)


def _batch(taps: Tensor, layer: Layer, ts: tuple[Offset, ...], want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Penalty (B,) and gradient of the taps (B, M, k..., N) of layers of one shape."""
    taps = taps.contiguous()
    losses = taps.new_zeros(len(taps))
    grad = torch.zeros_like(taps) if want_grad else None
    for t in ts:
        here, there = _overlap(t, layer)
        u, v = taps[here], taps[there]
        a, b = u.flatten(2), v.flatten(2)
        residual = torch.bmm(a.double(), b.double().mT) if layer.thin else torch.bmm(a, b.mT)
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


def _overlap(t: Offset, layer: Layer) -> tuple[Any, Any]:
    """Indices into (B, M, k..., N) of the rectangle of taps u for which u + t is a tap, and of those u + t."""
    pairs = list(zip(t, layer.kernel, strict=True))
    here = (..., *(slice(max(0, -ti), k - max(0, ti)) for ti, k in pairs), slice(None))
    there = (..., *(slice(max(0, ti), k - max(0, -ti)) for ti, k in pairs), slice(None))
    return here, there
