"""SReLU, the join and the penalty in standard operators, which torch.func, exports and traces can see through.

Transforms (grad, vmap, jvp, ...) and forward-mode AD differentiate the reference's formulas. What torch.export,
torch.onnx.export and torch.jit.trace record is one maximum, which every runtime knows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import reference
from ..geometry import Penalty
from .residual_srelu import summed
from .srelu import per_channel


def wanted() -> bool:
    """Whether the caller runs inside a transform, forward-mode AD, an export or a trace.

    The flag of exports is read directly, because PyTorch 2.11's is_exporting() is true under torch.compile too.
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.compiler._is_exporting_flag
        or torch._C._get_tracing_state() is not None
    )


def srelu(x: Tensor, bias: Tensor) -> Tensor:
    if torch.compiler._is_exporting_flag or torch._C._get_tracing_state() is not None:
        return torch.maximum(x, per_channel(bias, x))
    return reference.srelu(x, bias)


def residual_srelu(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None) -> Tensor:
    return srelu(summed(shortcut, branch, scale), bias)


def orthogonality_loss(
    weights: Sequence[Tensor], stride: list, dilation: list, groups: list[int], penalty: Penalty
) -> Tensor:
    """The penalty, in float32 at least, under autocast too. Differentiable at every order.

    A derivative that is taken under autocast is multiplied as autocast says, as every plain operator's is.
    """
    with torch.autocast(weights[0].device.type, enabled=False):
        wide = [weight.to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
        return reference.orthogonality_loss(wide, stride=stride, dilation=dilation, groups=groups, penalty=penalty)
