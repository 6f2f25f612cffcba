"""How isometric a network is: the singular values of its convolutions as operators, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .functional import orthogonality_loss
from .nn.conv import _Orthogonal
from .regularizer import _CONVOLUTIONS, _layer, _weight

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
FINEST = 16  # frequencies per dimension that a report samples at most


@torch.no_grad()
def singular_values(conv: nn.Module, input_size: int | Sequence[int]) -> Tensor:
    """All singular values of a convolution (or linear layer) on a circular grid of `input_size`, descending, float64.

    A circular convolution is block diagonal in the Fourier basis: one (O/g, I/g) matrix per frequency and group
    (Sedghi, Gupta, Long, ICLR 2019). A stride s folds the s^d frequencies that alias onto one output frequency side by
    side, divided by s^(d/2). Computed from eigenvalues of the smaller gram matrix: values under 1e-8 are rounding.

    input_size: an int or one per dimension, divisible by the stride and at least dilation * (k - 1) + 1. A linear layer
    ignores it. Raises TypeError for another module, ValueError for such a size.
    """
    weight = _weight(conv)
    if weight is None or not isinstance(conv, (*_CONVOLUTIONS, nn.Linear)):
        raise TypeError(f"conv must be a convolution or a linear layer with its own weight, got {type(conv).__name__}")
    kernel = weight.detach().double()
    if isinstance(conv, nn.Linear):
        return _values(kernel.unsqueeze(0))
    size = (input_size,) * (kernel.dim() - 2) if isinstance(input_size, int) else tuple(input_size)
    _check_size(conv, kernel, size)
    return _values(torch.cat([_symbols(group, conv, size) for group in kernel.chunk(conv.groups)]))


def _check_size(conv: Convolution, kernel: Tensor, size: tuple[int, ...]) -> None:
    fits = len(size) == kernel.dim() - 2 and all(
        n % s == 0 and n >= e * (k - 1) + 1
        for n, s, e, k in zip(size, conv.stride, conv.dilation, kernel.shape[2:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"input_size must have {kernel.dim() - 2} values divisible by the stride {conv.stride} and no smaller than "
            f"the dilated kernel, got {size}"
        )


def _symbols(kernel: Tensor, conv: Convolution, size: tuple[int, ...]) -> Tensor:
    """(output frequencies, O/g, I/g * prod s): the blocks of one group's operator."""
    grid = kernel.new_zeros(*kernel.shape[:2], *size)
    spread = tuple(slice(0, e * (k - 1) + 1, e) for e, k in zip(conv.dilation, kernel.shape[2:], strict=True))
    grid[(slice(None), slice(None), *spread)] = kernel
    dims = tuple(range(2, kernel.dim()))
    symbol = torch.fft.fftn(grid, dim=dims)  # (O, I, n...)
    for d, s in zip(dims, conv.stride, strict=True):  # n = s * m: aliases a * m + f fold onto f
        symbol = symbol.unflatten(d, (s, -1)).movedim(d, 2).flatten(1, 2) / math.sqrt(s)
    return symbol.flatten(2).permute(2, 0, 1)


def _values(blocks: Tensor) -> Tensor:
    gram = blocks @ blocks.mH if blocks.shape[1] <= blocks.shape[2] else blocks.mH @ blocks
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flatten().sort(descending=True).values


class Row(NamedTuple):
    """One layer in `isometry_report`."""

    name: str
    shape: tuple[int, ...]
    grid: tuple[int, ...]
    smallest: float
    median: float
    largest: float
    penalty: float


class Report(list[Row]):
    """The rows of `isometry_report`; prints as a table."""

    def __str__(self) -> str:
        head = f"{'layer':<24} {'weight':<18} {'grid':<8} {'smallest':>9} {'median':>9} {'largest':>9} {'penalty':>10}"
        lines = [head]
        for row in self:
            shape, grid = ("x".join(map(str, sizes)) for sizes in (row.shape, row.grid))
            values = f"{row.smallest:>9.4f} {row.median:>9.4f} {row.largest:>9.4f} {row.penalty:>10.4g}"
            lines.append(f"{row.name:<24} {shape:<18} {grid:<8} {values}")
        return "\n".join(lines)


@torch.no_grad()
def isometry_report(model: nn.Module, input_size: Sequence[int]) -> Report:
    """Smallest, median and largest singular value, and the penalty, of every convolution: 1, 1, 1, 0 is an isometry.

    input_size: (C, H, W) of one input; it tells each layer's feature map, on which (or on the largest grid up to 16 per
    dimension, which samples the same spectrum) `singular_values` is computed. The penalty is the layer's own ("isonet"
    for plain convolutions). Shows its progress; parametrized weights are left out.
    """
    from tqdm import tqdm  # the package itself needs nothing but PyTorch

    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _CONVOLUTIONS) and _weight(module) is not None
    }
    sizes = _feature_maps(model, layers, input_size)
    rows = Report()
    for name, module in tqdm(layers.items(), desc="singular values", unit="layer", leave=False):
        if name not in sizes:
            continue  # not reached by this input
        grid = tuple(map(_grid, sizes[name], module.stride, module.dilation, module.kernel_size))
        values = singular_values(module, grid)
        middle = values[len(values) // 2].item()
        rows.append(
            Row(name, tuple(module.weight.shape), grid, values[-1].item(), middle, values[0].item(), _penalty(module))
        )
    return rows


def _grid(size: int, stride: int, dilation: int, kernel: int) -> int:
    """The feature map's size, at most FINEST, at least the dilated kernel, a multiple of the stride."""
    return -(-max(min(size, FINEST), dilation * (kernel - 1) + 1) // stride) * stride


def _feature_maps(model: nn.Module, layers: dict[str, Any], input_size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Spatial size of what each layer sees. Convolutions that a block computes itself (`SharedScale.fold`) run
    through `_conv_forward`, so that is what is watched."""
    sizes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: Any) -> None:
        original = module._conv_forward

        def watched(x: Tensor, *rest: Any) -> Tensor:
            sizes[name] = tuple(x.shape[2:])
            return original(x, *rest)

        module._conv_forward = watched

    parameter = next(model.parameters())
    training = model.training
    try:
        for name, module in layers.items():
            watch(name, module)
        model.eval()(torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device))
    finally:
        for module in layers.values():
            module.__dict__.pop("_conv_forward", None)
        model.train(training)
    return sizes


def _penalty(module: nn.Module) -> float:
    weight = _weight(module)
    assert weight is not None
    chosen = (module.penalty if isinstance(module, _Orthogonal) else None) or "isonet"
    layer = _layer(weight, module, chosen)
    return orthogonality_loss(
        weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups, penalty=chosen
    ).item()
