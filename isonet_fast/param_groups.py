"""The optimizer's parameter groups of the official recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from .nn import SharedScale


def param_groups(model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The official optimizer groups: SReLU biases without weight decay, shared scales at lr / 10 (with decay).

    Every parameter is in exactly one group; each group has its `lr` and `weight_decay`, and a schedule that
    multiplies learning rates keeps the ratio.
    """
    scales = {id(m.scale) for m in model.modules() if isinstance(m, SharedScale)}
    srelu: list[nn.Parameter] = []
    shared: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] == "srelu_bias":
            srelu.append(parameter)
        else:
            (shared if id(parameter) in scales or ".shared_scalar." in f".{name}" else other).append(parameter)
    groups = [
        {"params": other, "lr": lr, "weight_decay": weight_decay},
        {"params": srelu, "lr": lr, "weight_decay": 0.0},
        {"params": shared, "lr": lr / 10, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]
