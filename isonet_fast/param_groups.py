"""The optimizer's parameter groups of the official recipe."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .nn import SharedScale
from .nn.srelu import SharedShift


def param_groups(model: nn.Module, lr: float | Tensor, weight_decay: float) -> list[dict[str, Any]]:
    """The official optimizer groups: SReLU biases without weight decay, shared scales (and Fixup's shifts) at lr / 10.

    Every parameter is in exactly one group; each group has its `lr` and `weight_decay`, and a schedule that
    multiplies learning rates keeps the ratio. `lr` may be a tensor, as optimizers take it.

    Raises TypeError for a model that is no module, and for an `lr` or a `weight_decay` that is no number; ValueError
    for a negative one.

    Examples:
        >>> net = nn.Sequential(isonet_fast.OrthoConv2d(3, 8, 3), isonet_fast.SReLU(8), isonet_fast.SharedScale())
        >>> groups = isonet_fast.param_groups(net, lr=0.1, weight_decay=1e-4)
        >>> [(len(group["params"]), group["lr"], group["weight_decay"]) for group in groups]
        [(2, 0.1, 0.0001), (1, 0.1, 0.0), (1, 0.01, 0.0001)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _check("lr", lr)
    _check("weight_decay", weight_decay)
    scalars = (m.parameters() for m in model.modules() if isinstance(m, (SharedScale, SharedShift)))
    slow = {id(parameter) for parameters in scalars for parameter in parameters}
    srelu: list[nn.Parameter] = []
    shared: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "srelu_bias":
            srelu.append(parameter)
        else:
            (shared if id(parameter) in slow or ".shared_scalar." in f".{name}" else other).append(parameter)
    groups = [
        {"params": other, "lr": lr, "weight_decay": weight_decay},
        {"params": srelu, "lr": lr, "weight_decay": 0.0},
        {"params": shared, "lr": lr / 10, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _check(name: str, value: Any) -> None:
    if isinstance(value, Tensor):  # its value is the optimizer's business: to ask for it would wait for the device
        if value.is_nested or value.layout != torch.strided or value.numel() != 1 or value.is_complex():
            raise TypeError(f"{name} must be a number or a dense tensor of one real number, got a Tensor")
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        rate = float(value)
    except OverflowError:
        rate = math.inf
    if rate == math.inf:
        raise ValueError(f"{name} must be finite")
    if not rate >= 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
