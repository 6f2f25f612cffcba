"""The arguments of SReLU and the residual join, checked and brought into the form that `ops` computes with."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import torch
from torch import Tensor

from .dtypes import wide
from .penalty_arguments import FLOATS, check_dense

LAYOUTS = {
    0: "(N, C) or (C,)",
    1: "(N, C, L) or (C, L)",
    2: "(N, C, H, W) or (C, H, W)",
    3: "(N, C, D, H, W) or (C, D, H, W)",
}


def check_tensor(name: str, value: Any) -> None:
    """Raise TypeError unless `value` is a dense tensor of a dtype that the kernels know."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested or value.dtype not in FLOATS:
        check_dense(name, value)


def check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_join(shortcut: Tensor, branch: Tensor, scale: Tensor | None, inplace: bool) -> None:
    """Raise ValueError unless shortcut and branch can be joined, with this scale, and written over where `inplace`."""
    if branch.shape != shortcut.shape:
        raise ValueError(f"branch must have the shape of shortcut, {tuple(shortcut.shape)}, got {tuple(branch.shape)}")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"scale must have one value, got shape {tuple(scale.shape)}")
    if inplace and scale is not None:
        raise ValueError("inplace=True needs scale=None: the gradient of the scale is formed with the branch")


def channel_axis(name: str, x: Tensor, bias: Tensor, spatial_dims: int | str | None) -> int:
    """The axis of x that holds the channels: 1, or 0 if x is unbatched.

    spatial_dims has three kinds of value. None: x is (N, C, ...) of any rank. A number: this many dimensions follow C,
    and x may have a batch or not. "inferred": an x of one dimension is unbatched. An x of three dimensions is an
    unbatched (C, H, W) if its second axis does not have length C. A (C, C, L) could be either, so it is refused.
    """
    rank, shape, channels = x.dim(), x.shape, bias.numel()
    axis = 1
    if isinstance(spatial_dims, int):
        axis = rank - spatial_dims - 1
        if axis not in (0, 1):
            raise ValueError(f"{name} must be {LAYOUTS[spatial_dims]}, got shape {tuple(shape)}")
    elif spatial_dims == "inferred" and rank in (1, 3):
        axis = 0 if rank == 1 or shape[0] == channels != shape[1] else 1
        if rank == 3 and shape[1] == channels and not torch.compiler._is_exporting_flag and shape[0] == channels:
            raise ValueError(
                f"{name} of shape {tuple(shape)} may be (N, C, L) or an unbatched (C, H, W), both with C = {channels}: "
                "construct the layer with spatial_dims=1 or spatial_dims=2"
            )
    if rank <= axis:
        raise ValueError(f"{name} must be (N, C, ...), at least two dimensions, got shape {tuple(shape)}")
    if shape[axis] != channels:
        raise ValueError(
            f"bias must have one value for each of the {shape[axis]} channels of {name}, got shape {tuple(bias.shape)}"
        )
    return axis


def checked_spatial_dims(value: Any) -> int | str:
    if value is None:
        return "inferred"
    if isinstance(value, bool) or not hasattr(value, "__index__") or int(value) not in LAYOUTS:
        raise ValueError(f"spatial_dims must be None, 0, 1, 2 or 3, got {value!r}")
    return int(value)


def kernel_parameter(parameter: Tensor, x: Tensor) -> Tensor:
    """A bias or a scale in x's dtype or in float32, which is what kernels read; never rounded to half precision here.

    The kernel rounds a bias to x's dtype, and its gradient, a long sum, comes in float32 at least.
    """
    if parameter.dtype in (x.dtype, torch.float32):
        return parameter
    return parameter.to(wide(x.dtype))


def number(name: str, value: Any) -> float:
    """A real number of any kind (numpy's, a fraction, a tensor of one element), as a float."""
    scalar, nested = value, isinstance(value, Tensor) and value.is_nested  # nested tensors have no shape
    if not nested and getattr(value, "shape", None) in ((), (1,)) and hasattr(value, "item"):
        scalar = value.item()
    if isinstance(scalar, (bool, complex)) or not isinstance(scalar, numbers.Number):
        raise TypeError(f"{name} must be a real number, got {value!r}")
    try:
        result = float(scalar)  # type: ignore[arg-type]
    except OverflowError:
        raise ValueError(f"{name} must be a number that a float can hold, got a larger one") from None
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, got NaN")
    return result


def positive_int(name: str, value: Any) -> int:
    try:
        result = 0 if isinstance(value, bool) else operator.index(value)
    except (TypeError, ValueError, RuntimeError):  # tensors of several elements or none raise any of them
        result = 0
    if result < 1:
        raise ValueError(f"{name} must be a positive int, got {value!r}")
    if result >= 2**63:
        raise ValueError(f"{name} must be below 2**63, as every size in PyTorch")
    return result


def flag(name: str, value: Any) -> bool:
    """The value as True or False, if Python takes it for one of them."""
    try:
        return bool(value)
    except (TypeError, ValueError, RuntimeError):  # arrays and tensors of several elements
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}") from None


def check_dtype(dtype: Any) -> None:
    if dtype is not None and dtype not in FLOATS:
        names = ", ".join(str(d).removeprefix("torch.") for d in FLOATS)
        raise TypeError(f"dtype must be one of {names}, got {dtype}")
