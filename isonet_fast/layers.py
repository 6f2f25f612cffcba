"""The layers that a penalty can serve: their classes, their weight, their geometry, and why one is left out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .geometry import Layer, Penalty
from .nn import OrthoLinear
from .nn.conv import Orthogonal
from .penalty_arguments import FLOATS, checked_layer
from .sharded import is_sharded

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
KINDS = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)

Filter = Callable[[str, nn.Module], bool]
Types = type[nn.Module] | tuple[type[nn.Module], ...]

# why a layer is left out
LINEAR, ADJOINT, NONE = "linear, not in include", "transposed, not in include", "penalty=None"
LAZY = "lazy, without a shape yet"
QUANTISED = "quantised"
PARAMETRIZED = "parametrized"
WEIGHT = " weight"  # ends a reason, after the kind of weight


def official_filter(name: str, module: nn.Module) -> bool:
    """Whether the official network penalises a layer: any but 7x7 kernels and layers of three input channels.

    A transposed convolution is judged by the convolution whose weight it shares, so one with three outputs is left out.

    Examples:
        >>> stem, later = nn.Conv2d(3, 64, 7), nn.Conv2d(64, 64, 3)
        >>> isonet_fast.layers.official_filter("stem", stem), isonet_fast.layers.official_filter("later", later)
        (False, True)
    """
    return getattr(module, "kernel_size", None) != (7, 7) and (
        isinstance(module, nn.Linear) or module.get_parameter("weight").shape[1] != 3
    )


def types(include: Any) -> tuple[type[nn.Module], ...]:
    """`include` as a tuple; TypeError where one of its classes could never be penalised."""
    classes = include if isinstance(include, tuple) else (include,)
    for one in classes:
        if not (isinstance(one, type) and issubclass(one, KINDS)):
            allowed = "nn.Linear, nn.ConvTranspose1d to 3d, nn.Conv1d to 3d or subclasses of them"
            raise TypeError(f"include must be a class or a tuple of classes: {allowed}; got {one!r}")
    return classes


def weight_of(module: nn.Module) -> nn.Parameter | None:
    """The Parameter itself, None if it is parametrized. It is never computed, as `module.weight` might be."""
    return module._parameters.get("weight")


def shape_of(module: nn.Module) -> tuple[int, ...]:
    """The shape of the module's weight; () if it has none of its own, or none yet."""
    weight = weight_of(module)
    return () if weight is None or is_lazy(weight) else tuple(weight.shape)


def has_values(tensor: Tensor) -> bool:
    """Whether the tensor can be read: it is not on the meta device, and not fake."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def is_transposed(module: nn.Module) -> bool:
    return isinstance(module, TRANSPOSED)


def layer_of(weight: Tensor, module: nn.Module, penalty: Penalty) -> Layer:
    """The geometry of a module of `KINDS`. A transposed convolution is the adjoint operator of the convolution with the
    same weight, so it gets the geometry of that convolution."""
    if isinstance(module, nn.Linear):
        return checked_layer(weight, 1, 1, 1, penalty)
    return checked_layer(weight, module.stride, module.dilation, module.groups, penalty)


def own_penalty(module: nn.Module) -> Penalty | None:
    """What the layer itself asks for: "isonet" for those of PyTorch, None where somebody has set `penalty = None`."""
    if isinstance(module, Orthogonal):
        return module.penalty
    return None if getattr(module, "penalty", "isonet") is None else "isonet"


def is_layer(module: nn.Module) -> bool:
    """Whether `summary()` and the report have a row for this module: a convolution, a transposed convolution, a linear
    layer, or a quantised form of these."""
    return isinstance(module, KINDS) or _is_quantised(module)


def _is_quantised(module: nn.Module) -> bool:
    """Whether it is a quantised layer. The classes are slow to import; if nobody has imported them, there is none."""
    quantised = sys.modules.get("torch.ao.nn.quantized.modules.utils")
    return quantised is not None and isinstance(module, quantised.WeightedQuantizedModule)


def absent(module: nn.Module, include: Types = ()) -> str:
    """The reason why a layer (`is_layer`) is left out before the filter is asked; empty if the filter is asked.

    `include` names classes that would be left out otherwise.
    """
    if not isinstance(module, KINDS):
        return QUANTISED
    weight, wanted = weight_of(module), isinstance(module, include)
    if isinstance(module, nn.Linear) and not isinstance(module, OrthoLinear) and not wanted:
        return LINEAR
    if isinstance(module, TRANSPOSED) and not wanted:
        return ADJOINT
    if own_penalty(module) is None:
        return NONE
    if weight is None:
        return PARAMETRIZED
    return LAZY if is_lazy(weight) else ""


def unfit(weight: Tensor) -> str:
    """Why no penalty can be computed from this weight; empty if it can."""
    if weight.is_nested or weight.layout != torch.strided:
        return f"{'nested' if weight.is_nested else str(weight.layout).rpartition('.')[2].strip('_')}{WEIGHT}"
    if weight.dtype not in FLOATS:
        return f"{str(weight.dtype).removeprefix('torch.')}{WEIGHT}"
    if is_traceable_wrapper_subclass(weight) and not is_sharded(weight):
        return f"{type(weight).__name__}{WEIGHT}"
    return ""


def overridden(module: nn.Module, include: Types = ()) -> str:
    """Says that a subclass has a forward of its own; empty if it has none, or its class is in `include`.

    Such a forward may compute another weight from the one that the layer holds (weight standardisation).
    """
    parent = next(kind for kind in KINDS if isinstance(module, kind))
    own = any(getattr(type(module), m, None) is not getattr(parent, m, None) for m in ("forward", "_conv_forward"))
    own = own and not isinstance(module, include)
    return f"{type(module).__name__} has a forward of its own and is not in include" if own else ""


def warn(message: str) -> None:
    """Warn, and point at the line outside this package that led to the warning."""
    package, level, frame = __name__.partition(".")[0], 2, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
