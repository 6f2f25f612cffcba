"""The specification: what every kernel must compute, in plain PyTorch, readable and differentiable at every order.

Nothing here is fast. `isonet_fast.functional` computes the same and is tested against this file in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["orthogonality_loss", "residual_srelu", "srelu"]


def srelu(x: Tensor, bias: Tensor) -> Tensor:
    """y = x if (x > b or x is NaN) else b, for x (N, C, ...) and one b for each of the C channels.

    Gradient: with m = not (y <= b), dx = g m and db = sum of g (1 - m): a tie belongs to b, and a NaN output
    passes its gradient to x. b is rounded to x's dtype once. (Qi et al., ICML 2020, section 3.2.)

    Examples:
        >>> x = torch.tensor([[-2.0, 0.5]])
        >>> isonet_fast.reference.srelu(x, bias=torch.tensor([-1.0, 0.0]))
        tensor([[-1.0000,  0.5000]])
    """
    b = bias.reshape(1, -1, *[1] * (x.dim() - 2)).to(x.dtype)
    y = torch.where(x <= b, b, x)  # every comparison with NaN is false: x is taken
    return torch.where(b.isnan(), x + b.detach(), y)  # a NaN in b shows in y, as a NaN in x does


def residual_srelu(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    """y = srelu(shortcut + s * branch, b): the join of a residual block (Qi et al., section 3.4).

    The sum is formed in float32 (float64 for float64) and rounded to shortcut's dtype once. Without a scale s = 1.

    Examples:
        >>> shortcut, branch = torch.tensor([[1.0, -3.0]]), torch.tensor([[2.0, 0.5]])
        >>> isonet_fast.reference.residual_srelu(shortcut, branch, bias=torch.tensor([-1.0, -1.0]))
        tensor([[ 3., -1.]])
    """
    wide = torch.promote_types(shortcut.dtype, torch.float32)
    scaled = branch.to(wide) if scale is None else scale.reshape(()).to(wide) * branch.to(wide)
    return srelu((shortcut.to(wide) + scaled).to(shortcut.dtype), bias)


def orthogonality_loss(
    weights: Tensor | Sequence[Tensor],
    *,
    stride: int | Sequence[int | Sequence[int]] = 1,
    dilation: int | Sequence[int | Sequence[int]] = 1,
    groups: int | Sequence[int] = 1,
    penalty: Literal["isonet", "lorth", "matrix"] = "isonet",
) -> Tensor:
    """Distance of convolutions from an isometry: the sum over layers and their groups of

        1/2 * sum over t in T of || G_t - [t = 0] I ||_F^2  -  c
        G_t[m, m'] = sum over n, u of A_u[m, n] A_{u+t}[m', n]
        T = { t : |t_i| <= k_i - 1 and dilation_i t_i divisible by stride_i }

    for weights (O, I/g, k...), with A_u the matrix of tap u. Rows m are outputs, or inputs where noted:

    - "isonet": inputs if I/g < O/g; c = 0. The official penalty (Qi et al., eq. 5).
    - "lorth": outputs; c = max(0, O/g - (I/g) prod r_i) / 2, r_i = min(k_i, s_i / gcd(dilation_i, s_i)), which makes
      the minimum 0 for every shape (after Achour et al., JMLR 2022).
    - "matrix": the kernel flattened to (O/g, I/g prod k), as inputs if that is the smaller side; T = {0}; c = 0.

    A list of weights takes lists of stride, dilation and groups too (an int or a tuple serves every weight). Raises
    ValueError for another penalty.

    Examples:
        >>> weight = torch.zeros(8, 4, 3, 3, dtype=torch.float64)
        >>> isonet_fast.reference.orthogonality_loss(weight, stride=2, penalty="isonet")  # rows are the 4 inputs
        tensor(2., dtype=torch.float64)
        >>> isonet_fast.reference.orthogonality_loss(weight, stride=2, penalty="lorth")  # rows are the 8 outputs
        tensor(4., dtype=torch.float64)
    """
    if penalty not in ("isonet", "lorth", "matrix"):
        raise ValueError(f"penalty must be 'isonet', 'lorth' or 'matrix', got {penalty!r}")
    if isinstance(weights, Tensor):
        return _layer_loss(weights, stride, dilation, groups, penalty)
    geometry = [v if isinstance(v, list) else [v] * len(weights) for v in (stride, dilation, groups)]
    return sum(
        (_layer_loss(w, s, e, g, penalty) for w, s, e, g in zip(weights, *geometry, strict=True)),
        torch.zeros(()),
    )


def _layer_loss(weight: Tensor, stride: Any, dilation: Any, groups: Any, penalty: str) -> Tensor:
    if penalty == "matrix":
        weight = weight.flatten(1)
    kernel = weight.shape[2:]
    s, e = ((v,) * len(kernel) if isinstance(v, int) else tuple(v) for v in (stride, dilation))
    every = itertools.product(*(range(1 - k, k) for k in kernel))
    offsets = [t for t in every if all(ei * ti % si == 0 for ei, ti, si in zip(e, t, s))]
    total = weight.new_zeros(())
    for taps in weight.chunk(groups):  # (O/g, I/g, k...)
        outputs, inputs = taps.shape[:2]
        rows = taps if penalty == "lorth" or inputs >= outputs else taps.transpose(0, 1)
        identity = torch.eye(len(rows), dtype=taps.dtype, device=taps.device)
        for t in offsets:
            here = tuple(slice(max(0, -ti), k - max(0, ti)) for ti, k in zip(t, kernel))
            there = tuple(slice(max(0, ti), k - max(0, -ti)) for ti, k in zip(t, kernel))
            gram = rows[:, :, *here].flatten(1) @ rows[:, :, *there].flatten(1).T
            total = total + 0.5 * (gram - identity if not any(t) else gram).square().sum()
        if penalty == "lorth":
            phases = math.prod(min(k, si // math.gcd(ei, si)) for k, si, ei in zip(kernel, s, e))
            total = total - max(0, outputs - inputs * phases) / 2
    return total
