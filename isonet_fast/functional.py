"""The differentiable functions: arguments checked and normalised here, computed in `ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops import orthogonality as _orthogonality
from .ops.inplace import check_apart, check_writable, written
from .ops.residual_srelu import ResidualSReLU
from .ops.srelu import SReLU
from .penalty_arguments import FLOATS as _FLOATS
from .penalty_arguments import check_penalty, check_precision, checked_layer, listed, per_layer
from .problem import Problem


def srelu(
    x: Tensor,  # (N, C, ...)
    bias: Tensor,  # C values
    inplace: bool = False,
) -> Tensor:
    """Shifted ReLU: y = max(x, b) with one learnable b per channel (Qi et al., ICML 2020, section 3.2).

    dx = g m and db = sum of g (1 - m) over every axis but C, with m = not (y <= b): a tie gives its gradient to b,
    NaN in x or b propagates and passes its gradient. Twice differentiable. Only y and b are kept for the
    backward, so `inplace=True` saves a whole activation behind any operation that does not need its own output
    (a convolution). Not for the transforms of torch.func (vmap, jvp, ...).

    x: float32, float64, float16 or bfloat16. b: C values of any shape, rounded to x's dtype once; its gradient is
    accumulated in float32 (float64 for float64).

    Raises TypeError for other dtypes; ValueError for an x of fewer than two dimensions, a bias of the wrong length or
    on another device, and for `inplace` on a leaf that requires grad or on a tensor that overlaps itself.
    """
    _check_activation("x", x)
    bias = _bias(bias, "x", x)
    if not inplace:
        return SReLU.apply(x, bias, False)
    check_writable("x", x)
    return written(SReLU, x, bias)


def residual_srelu(
    shortcut: Tensor,  # (N, C, ...)
    branch: Tensor,  # (N, C, ...)
    bias: Tensor,  # C values
    scale: Tensor | None = None,  # one value
    inplace: bool = False,
) -> Tensor:
    """The join of a residual block: y = max(shortcut + s * branch, b) (Qi et al., section 3.4).

    dshortcut = g m, dbranch = s g m, ds = sum of g m branch, db = sum of g (1 - m), m = not (y <= b). The sum is formed
    in float32 (float64 for float64) and rounded once. Ties, NaN and dtypes as in `srelu`; twice differentiable.

    `inplace=True` writes y over the branch (saves one activation); it needs scale=None, because the gradient of the
    scale is formed with the branch.

    Raises as `srelu` does, and ValueError (shape) or TypeError (dtype) where shortcut and branch differ.
    """
    _check_activation("shortcut", shortcut)
    if branch.shape != shortcut.shape:
        raise ValueError(f"branch must have the shape of shortcut, {tuple(shortcut.shape)}, got {tuple(branch.shape)}")
    if branch.dtype != shortcut.dtype:
        raise TypeError(f"branch must have the dtype of shortcut, {shortcut.dtype}, got {branch.dtype}")
    _check_device("branch", branch, "shortcut", shortcut)
    bias = _bias(bias, "shortcut", shortcut)
    if scale is not None:
        if scale.numel() != 1:
            raise ValueError(f"scale must have one value, got shape {tuple(scale.shape)}")
        _check_device("scale", scale, "shortcut", shortcut)
        scale = _master(scale, shortcut)
    if not inplace:
        return ResidualSReLU.apply(branch, shortcut, bias, scale, False)
    if scale is not None:
        raise ValueError("inplace=True needs scale=None: the gradient of the scale is formed with the branch")
    check_writable("branch", branch)
    check_apart("branch", branch, "shortcut", shortcut)
    return written(ResidualSReLU, branch, shortcut, bias, None)


def orthogonality_loss(
    weights: Tensor | Sequence[Tensor],  # (O, I/g, k...) each; (O, I) for a linear layer
    *,
    stride: int | Sequence = 1,
    dilation: int | Sequence = 1,
    groups: int | Sequence[int] = 1,
    penalty: str = "isonet",
    precision: str | None = None,
) -> Tensor:
    """How far convolutions are from an isometry, summed over the weights: one 0-dim tensor.

        1/2 * sum over t in T of || G_t - [t = 0] I ||_F^2  -  c        (summed over groups)
        G_t[m, m'] = sum over n, u of A_u[m, n] A_{u+t}[m', n],  A_u the matrix of tap u
        T = { t : |t_i| <= k_i - 1 and dilation_i t_i divisible by stride_i }

    penalty: "isonet", the official one (Qi et al., ICML 2020, eq. 5: rows are inputs where I/g < O/g); "lorth", 0
    exactly where the operator is row- or column-orthogonal, the right choice for strided layers and for your own
    networks (after Achour et al., JMLR 2022); "matrix", the flattened kernel, 1/2 ||K K^T - I||^2.

    One tensor or a list. For a list, `stride`, `dilation` and `groups` may be *lists* with one entry per weight; an int
    or a tuple (one value per spatial dimension) serves all. All weights on one device; half precision is computed in
    float32, under autocast too. precision: None (fast: three bf16 products on tensor cores; float32 on the CPU) or
    "highest" (IEEE float32), which "lorth" layers with more rows than the operator has columns always take: their
    residual does not vanish at the optimum. float64 is always computed in float64.

    Differentiable once; `reference.orthogonality_loss` is differentiable at every order.

    Raises TypeError for something that is no tensor, a sparse or nested one, or an integer or complex dtype; ValueError
    for a rank outside 2 to 5, an unknown penalty or precision, groups that do not divide the outputs, a stride or
    dilation that is no positive int or of the wrong length, lists of different lengths, weights on two devices.
    """
    weights = listed(weights)
    check_penalty(penalty)
    check_precision(precision)
    if not weights:
        return torch.zeros(())
    named = {"stride": stride, "dilation": dilation, "groups": groups}
    geometry = [per_layer(name, value, len(weights)) for name, value in named.items()]
    layers = tuple(checked_layer(w, s, e, g, penalty) for w, s, e, g in zip(weights, *geometry, strict=True))
    for w in weights[1:]:
        _check_device("every weight", w, "the first", weights[0])
    problem = Problem(layers, (1.0,) * len(layers), precision)
    return _orthogonality.loss(weights, problem)[0]


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def _check_activation(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} must be {_names(_FLOATS)}, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name} must be (N, C, ...), at least two dimensions, got shape {tuple(x.shape)}")


def _check_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def _bias(bias: Tensor, name: str, x: Tensor) -> Tensor:
    """Checked, in a dtype that the kernels read."""
    if bias.numel() != x.shape[1]:
        raise ValueError(
            f"bias must have one value for each of the {x.shape[1]} channels of {name}, got shape {tuple(bias.shape)}"
        )
    if bias.dtype not in _FLOATS:
        raise TypeError(f"bias must be {_names(_FLOATS)}, got {bias.dtype}")
    _check_device("bias", bias, name, x)
    return _master(bias, x)


def _master(parameter: Tensor, x: Tensor) -> Tensor:
    """Kernels read a parameter in x's dtype or in float32 (a master copy); anything else is rounded here, once."""
    return parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.to(x.dtype)
