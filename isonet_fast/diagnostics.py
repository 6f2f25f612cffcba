"""How isometric a network is: the singular values of its convolutions as operators, layer by layer."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import existence
from .functional import orthogonality_loss
from .layers import (
    CONVOLUTIONS,
    KINDS,
    NONE,
    PARAMETRIZED,
    Types,
    absent,
    has_values,
    is_layer,
    is_transposed,
    layer_of,
    overridden,
    own_penalty,
    shape_of,
    types,
    unfit,
    weight_of,
)

__all__ = ["Report", "isometry_report", "singular_values"]

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
NO_VALUES = "no values (meta device or FakeTensor)"
FINEST = 16  # frequencies per dimension that a report samples at most
LARGEST = 2**31  # sizes from here on are refused: no machine could hold the grid


@torch.no_grad()
def singular_values(conv: nn.Module, input_size: int | Sequence[int]) -> Tensor:
    """All singular values of a convolution (or linear layer) on a circular grid of `input_size`, descending, float64.

    A circular convolution is block diagonal in the Fourier basis: one (O/g, I/g) matrix per frequency and group
    (Sedghi, Gupta, Long, ICLR 2019). A stride s folds the s^d frequencies that alias onto one output frequency side by
    side, divided by s^(d/2). Computed from eigenvalues of the smaller gram matrix: values under 1e-8 are rounding.

    If a weight is not finite, all values are NaN.

    A transposed convolution has the singular values of the convolution with the same weight. `input_size` is then the
    size of its output, which is the input of that convolution.

    input_size: an int or one per dimension, divisible by the stride and at least dilation * (k - 1) + 1. A linear layer
    ignores it. Raises TypeError for another module, for a weight that is parametrized, lazy, sparse, complex or without
    values, and for sizes that are no ints; ValueError for a size that does not fit.

    Examples:
        >>> conv = isonet_fast.OrthoConv2d(2, 2, 3)
        >>> conv.weight.data *= 3
        >>> values = isonet_fast.diagnostics.singular_values(conv, input_size=4)
        >>> values.min().item(), values.max().item()
        (3.0, 3.0)
    """
    weight = weight_of(conv) if isinstance(conv, KINDS) else None
    if weight is None:
        raise TypeError(f"conv must be a convolution or a linear layer with its own weight, got {type(conv).__name__}")
    assert isinstance(conv, KINDS)
    why = absent(conv, KINDS) or unfit(weight) or ("" if has_values(weight) else NO_VALUES)
    if why not in ("", NONE):
        raise TypeError(f"conv must have a dense floating-point weight to read, got {type(conv).__name__}: {why}")
    kernel = weight.detach().double()
    if isinstance(conv, nn.Linear):
        return _values(kernel.unsqueeze(0))
    size = _sizes((input_size,) * (kernel.dim() - 2) if isinstance(input_size, int) else input_size)
    _check_size(conv, kernel, size)
    return _values(torch.cat([_symbols(group, conv, size) for group in kernel.chunk(conv.groups)]))


def _sizes(input_size: Any) -> tuple[int, ...]:
    try:
        sizes = tuple([operator.index(n) for n in input_size])
    except (TypeError, ValueError, RuntimeError):  # some tensors raise the latter
        raise TypeError(f"input_size must be a sequence of ints, got {type(input_size).__name__}") from None
    if any(not 0 < n < LARGEST for n in sizes):
        raise ValueError(f"input_size must be positive and below {LARGEST}, got {str(sizes)[:60]}")
    return sizes


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
    if not gram.isfinite().all():  # eigvalsh would raise
        return gram.real.new_full(gram.shape[:-1], math.nan).flatten()
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flatten().sort(descending=True).values


class ReportRow(NamedTuple):
    """One layer in `isometry_report`. Its numbers are NaN where it is excluded."""

    name: str
    shape: tuple[int, ...]
    grid: tuple[int, ...] = ()
    smallest: float = math.nan
    median: float = math.nan
    largest: float = math.nan
    penalty: float = math.nan
    excluded: str = ""  # why it is excluded; empty if it is not
    isometry: str = ""  # how near to an isometry it can come (`existence.isometry`)


class Report(list[ReportRow]):
    """The rows of `isometry_report`; prints as a table.

    Examples:
        >>> first, second = isonet_fast.OrthoConv2d(4, 8, 3), isonet_fast.OrthoConv2d(8, 16, 3)
        >>> second.weight.data *= 2
        >>> report = isonet_fast.diagnostics.isometry_report(nn.Sequential(first, second), input_size=(4, 8, 8))
        >>> print(isonet_fast.diagnostics.Report(row for row in report if row.largest > 1.1))
        layer                    weight             grid      smallest    median   largest    penalty  isometry
        1                        16x8x3x3           6x6         2.0000    2.0000    2.0000         36  columns
    """

    def __str__(self) -> str:
        lines = [_line("layer", "weight", "grid", "smallest", "median", "largest", "penalty", "isometry")]
        for row in self:
            shape, grid = ("x".join(map(str, sizes)) for sizes in (row.shape, row.grid))
            if row.excluded:
                lines.append(f"{row.name:<24} {shape:<18} excluded: {row.excluded}")
            else:
                values = f"{row.smallest:.4f}", f"{row.median:.4f}", f"{row.largest:.4f}"
                lines.append(_line(row.name, shape, grid, *values, f"{row.penalty:.4g}", row.isometry))
        return "\n".join(lines)


def _line(name: str, shape: str, grid: str, low: str, middle: str, high: str, penalty: str, isometry: str) -> str:
    return f"{name:<24} {shape:<18} {grid:<8} {low:>9} {middle:>9} {high:>9} {penalty:>10}  {isometry}".rstrip()


@torch.no_grad()
def isometry_report(model: nn.Module, input_size: Sequence[int], include: Types = ()) -> Report:
    """Smallest, median and largest singular value, and the penalty, of every convolution and OrthoLinear. An isometry
    has 1, 1, 1 and 0. `existence.isometry` says in the last column what the shape allows.

    input_size: (C, H, W) of one input. It determines the size of each layer's feature map, on which `singular_values`
    is computed. Larger maps are replaced by a grid of about 16 points per dimension, which samples the same spectrum.
    The penalty is the layer's own ("isonet" for plain convolutions). A progress bar is shown. Some rows say "excluded":
    plain linear layers and transposed convolutions whose class is not in `include`, layers whose weight cannot be
    read, and layers that this input does not reach.

    Raises TypeError for a model that is no module and for sizes that are no ints; ValueError for a model with lazy
    layers that have no shape yet and for an input that it does not take.

    Examples:
        >>> net = nn.Sequential(isonet_fast.OrthoConv2d(4, 8, 3), isonet_fast.SReLU(8))
        >>> print(isonet_fast.diagnostics.isometry_report(net, input_size=(4, 8, 8)))
        layer                    weight             grid      smallest    median   largest    penalty  isometry
        0                        8x4x3x3            8x8         1.0000    1.0000    1.0000          0  columns
    """
    from tqdm import tqdm  # the package itself needs nothing but PyTorch

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    include = types(include)
    layers = {name: module for name, module in model.named_modules() if is_layer(module)}
    excluded = {name: _why_not(module, include) for name, module in layers.items()}
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:  # a forward pass would give them one
        raise ValueError(f"model has lazy layers without a shape yet, {lazy[0]!r} first; give it a batch before")
    readable = {name: module for name, module in layers.items() if not excluded[name]}
    sizes = _feature_maps(model, readable, _sizes(input_size)) if readable else {}
    rows = Report()
    for name, module in tqdm(layers.items(), desc="singular values", unit="layer", leave=False):
        if name in readable and name not in sizes and not isinstance(module, nn.Linear):
            excluded[name] = "not reached by this input"
        if excluded[name]:
            rows.append(ReportRow(name, shape_of(module), excluded=excluded[name]))
        else:
            rows.append(_row(name, module, sizes.get(name, ())))
    return rows


def _why_not(module: nn.Module, include: Types) -> str:
    why = absent(module, include)
    if why and why != NONE:
        return why
    weight = weight_of(module)
    if weight is None:
        return PARAMETRIZED
    return unfit(weight) or overridden(module, include) or ("" if has_values(weight) else NO_VALUES)


def _row(name: str, module: Any, size: tuple[int, ...]) -> ReportRow:
    grid = () if isinstance(module, nn.Linear) else _grid(module, size)
    values = singular_values(module, grid)
    weight, penalty = module.weight, own_penalty(module) or "isonet"
    layer = layer_of(weight, module, penalty)
    loss = orthogonality_loss(
        weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups, penalty=penalty
    ).item()
    numbers = values[-1].item(), values[len(values) // 2].item(), values[0].item(), loss
    possible = existence.isometry(layer, is_transposed(module))
    return ReportRow(name, tuple(weight.shape), grid, *numbers, isometry=possible)


def _grid(module: Convolution, size: tuple[int, ...]) -> tuple[int, ...]:
    """The feature map's size, at most FINEST, at least the dilated kernel, a multiple of the stride."""
    return tuple(
        -(-max(min(n, FINEST), e * (k - 1) + 1) // s) * s
        for n, s, e, k in zip(size, module.stride, module.dilation, module.kernel_size, strict=True)
    )


def _feature_maps(model: nn.Module, layers: dict[str, Any], input_size: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Spatial size of what each convolution reads (a transposed one: about what it writes).

    Convolutions that a block computes itself (`SharedScale.fold`) run through `_conv_forward`, so that is what is
    watched.
    """
    sizes: dict[str, tuple[int, ...]] = {}

    def watch(name: str, module: Any) -> None:
        if is_transposed(module):
            handles.append(module.register_forward_pre_hook(lambda _, args: note(name, args[0], module.stride)))
        elif isinstance(module, CONVOLUTIONS):
            original = module._conv_forward

            def watched(x: Tensor, *rest: Any) -> Tensor:
                note(name, x, (1,) * len(module.stride))
                return original(x, *rest)

            module._conv_forward = watched  # type: ignore[method-assign,assignment]

    def note(name: str, x: Tensor, stride: Sequence[int]) -> None:
        sizes[name] = tuple(n * s for n, s in zip(x.shape[-len(stride) :], stride, strict=True))

    parameter = next(model.parameters())
    handles: list[Any] = []
    modes = {module: module.training for module in model.modules()}
    try:
        for name, module in layers.items():
            watch(name, module)
        model.eval()(torch.zeros(1, *input_size, dtype=parameter.dtype, device=parameter.device))
    except Exception as error:  # whatever the model raises
        raise ValueError(f"model takes no input of input_size {str(input_size)[:60]}: {error}") from error
    finally:
        for module in layers.values():
            module.__dict__.pop("_conv_forward", None)
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return sizes
