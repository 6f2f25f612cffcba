"""Delta initialisation: a convolution that starts as the identity (Qi et al., ICML 2020, section 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .penalty_arguments import checked_layer

__all__ = ["delta_"]


@torch.no_grad()
def delta_(weight: Tensor, groups: int = 1, stride: int | Sequence[int] = 1) -> Tensor:
    """Fill a convolution weight (O, I/g, k...) or a linear weight (O, I) with a delta, in place; returns it.

    Within each group, output i copies input i through the middle tap, as `torch.nn.init.dirac_` does. If O > I and the
    stride is above 1, output I + i copies input i through another tap, which reads another pixel of the stride cell
    (the block of input pixels that one step of the stride covers). This goes on until the outputs or the taps are used
    up. With enough of both, no input pixel is lost: a 3x3 kernel 16 -> 64 of stride 2 keeps all the energy. Such a
    layer is an isometry in the sense of the "lorth" penalty. The remaining outputs start at 0.

    Raises as `functional.orthogonality_loss` does for rank, groups and stride.

    Examples:
        >>> isonet_fast.init.delta_(torch.empty(2, 1, 2)).tolist()
        [[[0.0, 1.0]], [[0.0, 0.0]]]
        >>> isonet_fast.init.delta_(torch.empty(2, 1, 2), stride=2).tolist()
        [[[0.0, 1.0]], [[1.0, 0.0]]]
    """
    geometry = checked_layer(weight, stride, 1, groups, "lorth")
    cells = [_cell(k, s) for k, s in zip(geometry.kernel, geometry.stride, strict=True)]
    weight.zero_()
    inputs = weight.shape[1]
    for group in weight.chunk(groups):
        for n, tap in enumerate(itertools.product(*cells)):
            at: tuple[slice | int, ...] = (slice(n * inputs, (n + 1) * inputs), slice(None), *tap)
            group[at].diagonal().fill_(1)
    return weight


def _cell(kernel: int, stride: int) -> list[int]:
    """One tap for each input phase that the kernel reaches, the middle tap first."""
    middle = kernel // 2
    phases = [*range(kernel - middle), *range(stride - middle, stride)] if stride > kernel else range(stride)
    taps = []
    for phase in phases:
        reached = [t for t in (middle + phase, middle + phase - stride) if 0 <= t < kernel]
        taps += reached[:1]
    return taps
