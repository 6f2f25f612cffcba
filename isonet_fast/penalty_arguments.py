"""The arguments of the orthogonality penalty, checked before anything is computed or changed."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .geometry import Layer, Penalty, check_penalty

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
PRECISIONS = (None, "highest")
_LARGEST = torch.finfo(torch.float32).max


def listed(weights: Any) -> list[Tensor]:
    """One tensor, or those of any iterable but a mapping, as a list."""
    if isinstance(weights, Tensor):
        return [weights]
    if not isinstance(weights, Iterable) or isinstance(weights, (Mapping, str, torch.nn.Module)):
        raise TypeError(f"weights must be a tensor or a list of tensors, got {type(weights).__name__}")
    return list(weights)


def per_layer(name: str, value: Any, count: int) -> list[Any]:
    """One entry for each weight: a list as it is, anything else repeated."""
    if not isinstance(value, list):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} is a list of {len(value)} entries for {count} weights; give one per weight")
    return value


def checked_layer(weight: Tensor, stride: Any, dilation: Any, groups: Any, penalty: Penalty) -> Layer:
    """The geometry of one weight."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weights must be tensors, got {type(weight).__name__}")
    check_dense("weights", weight)
    if not 2 <= weight.dim() <= 5:
        raise ValueError(
            f"weights must be (O, I/groups, *kernel) with 0 to 3 kernel dimensions, got shape {tuple(weight.shape)}"
        )
    check_penalty(penalty)
    count = _integer(groups)
    if count is None or count < 1 or weight.shape[0] % count:
        raise ValueError(
            f"groups must be a positive divisor of the {weight.shape[0]} output channels, got {_shown(groups)}"
        )
    dims = weight.dim() - 2
    sizes = _per_dimension("stride", stride, dims), _per_dimension("dilation", dilation, dims)
    return Layer(tuple(weight.shape), *sizes, count, penalty)


def check_precision(precision: Any) -> None:
    if not (precision is None or isinstance(precision, str)) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {_shown(precision)}")


def check_dense(name: str, tensor: Tensor) -> None:
    """Raise unless the tensor has memory and strides, and a dtype that the penalty is computed for."""
    if tensor.is_nested:
        raise TypeError(f"{name} must be dense, got a nested tensor")
    if tensor.layout != torch.strided:
        kind = str(tensor.layout).removeprefix("torch._").removeprefix("torch.")
        raise TypeError(f"{name} must be dense, got the layout {kind}; tensor.to_dense() makes it so")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be {', '.join(str(d).removeprefix('torch.') for d in FLOATS)}, got {tensor.dtype}"
        )


def check_gradients(grads: Iterable[Tensor]) -> None:
    """Raise unless a gradient can be added to all in place: dense, floating-point, no two elements in one place."""
    for grad in grads:
        name = f"the .grad of the weight of shape {tuple(grad.shape)}"
        check_dense(name, grad)
        if not grad.is_contiguous() and shares_memory(grad):
            raise ValueError(f"{name} has elements that share memory (strides {grad.stride()}); clone it first")


def checked_scale(scale: Any) -> float:
    """`grad_scale`: a real number of any kind, also as a tensor of one element."""
    if isinstance(scale, Tensor) and not scale.is_nested and scale.numel() == 1 and not scale.is_complex():
        scale = scale.item()
    elif not isinstance(scale, Tensor) and hasattr(scale, "item") and getattr(scale, "shape", None) == ():  # numpy's
        scale = scale.item()
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"grad_scale must be a real number, got {_shown(scale)}")
    if not abs(scale) <= _LARGEST:  # type: ignore[operator]
        raise ValueError(f"grad_scale must be finite in float32, at most {_LARGEST:.3g}, got {_shown(scale)}")
    return float(scale)


def _per_dimension(name: str, value: Any, dims: int) -> tuple[int, ...]:
    if isinstance(value, Sequence) and not isinstance(value, str):
        values = [_integer(v) for v in value]
    else:
        values = [_integer(value)] * dims
        if _integer(value) is None and dims == 0:
            values = [None]
    if len(values) != dims or not all(v is not None and v >= 1 for v in values):
        raise ValueError(f"{name} must be a positive int or a tuple of {dims} of them, got {_shown(value)}")
    return tuple(values)  # type: ignore[arg-type]


def _integer(value: Any) -> int | None:
    """An int of any kind (numpy's too), None for anything else; a bool counts as something else."""
    if type(value) is int:
        return value
    if isinstance(value, (bool, Tensor)) or type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return "a nested tensor" if value.is_nested else f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({type(value).__name__})"


def shares_memory(tensor: Tensor) -> bool:
    """Whether two elements of a tensor are one place in memory."""
    reach, sides = 0, sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1)
    if tensor.numel() == 0:
        return False
    for stride, size in sides:
        if stride <= reach:
            break
        reach += stride * (size - 1)
    else:
        return False  # every dimension steps over all that the smaller ones reach
    places = torch.zeros(1, dtype=torch.int64)
    for stride, size in sides:
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    return len(places.unique()) < math.prod(tensor.shape)
