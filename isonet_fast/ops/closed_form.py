"""The orthogonality penalty and its gradient in closed form, on any device: batched matrix products, no autograd graph.

Every layer is computed in one of two forms, given as ("overlap", offsets) or ("frequency", frequencies): see
overlap_form.py and frequency_form.py. Small layers of one shape form a batch, so a deep network of them costs a few
large calls; a large layer is one by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..dtypes import wide
from ..geometry import Layer
from . import frequency_form, overlap_form

BATCH = 2**19  # elements of the layers that are computed together
FORMS = {"overlap": overlap_form, "frequency": frequency_form}
Work = tuple[str, tuple[tuple[int, ...], ...]]  # a form, and units of it


def evaluate(
    weights: Sequence[Tensor],
    layers: Sequence[Layer],
    work: Sequence[Work],
    sink: Callable[[int, Tensor], None] | None,
) -> Tensor:
    """The unweighted penalty of every layer, (L,); `sink(n, dpenalty_n / dW_n)` receives each gradient.

    Only the given units are computed. A gradient is a view in the shape of its weight, valid during the call.
    """
    batches: dict[tuple, list[int]] = {}
    for n, (weight, layer) in enumerate(zip(weights, layers, strict=True)):
        if work[n][1]:
            batches.setdefault((layer, work[n], wide(weight.dtype), weight.device), []).append(n)
    widest = max((wide(w.dtype) for w in weights), key=lambda d: d.itemsize, default=torch.float32)
    losses = torch.zeros(len(weights), dtype=widest, device=weights[0].device if weights else None)
    with torch.autocast(losses.device.type, enabled=False):
        for (layer, (name, units), dtype, _), alike in batches.items():
            form = FORMS[name]
            together = max(1, BATCH // max(1, math.prod(layer.shape)))
            for first in range(0, len(alike), together):
                members = alike[first : first + together]
                packed = [form.pack(_grouped(weights[n].detach().to(dtype), layer), layer) for n in members]
                taps = packed[0] if len(packed) == 1 else torch.cat(packed)
                batch_losses, grad = form.batch(taps, layer, units, sink is not None)
                constant = 0.0 if any(units[0]) else layer.constant
                losses[members] = (batch_losses.view(-1, layer.groups).sum(1) - constant).to(widest)
                if sink is not None and grad is not None:
                    for n, g in zip(members, grad.unflatten(0, (-1, layer.groups)), strict=True):
                        sink(n, _ungrouped(form.unpack(g, layer), layer))
    return losses


def _grouped(weight: Tensor, layer: Layer) -> Tensor:
    """(O, I/g, k...) -> (g, M, N, k...)"""
    if layer.rule.flatten:
        weight = weight.flatten(1)
    taps = weight.unflatten(0, (layer.groups, -1))
    return taps.movedim(2, 1) if layer.transposed else taps


def _ungrouped(taps: Tensor, layer: Layer) -> Tensor:
    """(g, M, N, k...) -> (O, I/g, k...)"""
    return (taps.movedim(2, 1) if layer.transposed else taps).flatten(0, 1).reshape(layer.shape)
