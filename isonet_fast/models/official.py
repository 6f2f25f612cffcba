"""This package's networks in the arithmetic of the official code, to be timed against.

`official(model)` computes SReLU as relu(x - b) + b, the scale as a pass of its own and the join as sum, then SReLU;
`bare(model)` deletes the SReLUs. Both are copies of the model with the same weights.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ResidualSReLU, SharedScale, SReLU
from ..regularizer import official_filter
from .isonet import Stem


def srelu(x: Tensor, bias: Tensor) -> Tensor:
    """relu(x - b) + b: three passes, promoted to float32 under autocast."""
    return F.relu(x - bias, inplace=True) + bias


class OfficialSReLU(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.srelu_bias: nn.Parameter = like.srelu_bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return srelu(x, self.srelu_bias)


class OfficialJoin(OfficialSReLU):
    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(shortcut + branch)


class OfficialScale(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.scale: Tensor = like.get_parameter("scale")

    def fold(self, conv: nn.Module, x: Tensor) -> Tensor:
        return conv(x) * self.scale


class OfficialStem(nn.Module):
    """SReLU on the whole map, then max pooling."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.conv: nn.Module = like.conv  # type: ignore[assignment]
        self.relu: nn.Module = OfficialSReLU(like.relu)  # type: ignore[arg-type]
        self.pool: nn.Module = like.pool  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.relu(self.conv(x)))


class Add(nn.Module):
    def __init__(self, like: nn.Module) -> None:
        super().__init__()

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return shortcut + branch


def official(model: nn.Module) -> nn.Module:
    """A copy that computes as the official code does."""
    replacements = {SReLU: OfficialSReLU, ResidualSReLU: OfficialJoin, SharedScale: OfficialScale, Stem: OfficialStem}
    return _swap(copy.deepcopy(model), replacements)


def bare(model: nn.Module) -> nn.Module:
    """A copy without SReLU: the ceiling of what faster kernels can win."""
    return _swap(copy.deepcopy(model), {SReLU: lambda like: nn.Identity(), ResidualSReLU: Add})


def _swap(model: nn.Module, replacements: dict) -> nn.Module:
    for name, child in list(model.named_children()):
        if type(child) in replacements:
            setattr(model, name, replacements[type(child)](child))
        else:
            _swap(child, replacements)
    return model


def official_penalty(model: nn.Module, identity_device: torch.device | str = "cpu") -> Tensor:
    """1/2 ||conv(K, K, padding=k-1, stride) - delta||^2 layer by layer, with the identity built on the CPU each time.

    identity_device: where it is built instead; the weights' own device spares the copies. Like the official code, it
    takes only ungrouped 2-d convolutions whose stride divides k - 1.
    """
    return sum(
        (
            _official_layer(module, identity_device)
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and official_filter(name, module) and getattr(module, "penalty", True)
        ),
        torch.zeros((), device=next(model.parameters()).device),
    )


def _official_layer(conv: nn.Conv2d, identity_device: torch.device | str) -> Tensor:
    weight = conv.weight
    rows = weight.transpose(0, 1) if weight.shape[1] < weight.shape[0] else weight
    padding = tuple(k - 1 for k in conv.kernel_size)
    gram = F.conv2d(rows, rows, padding=padding, stride=conv.stride)
    identity = torch.zeros(gram.shape, device=identity_device).to(weight.device)
    identity[:, :, gram.shape[2] // 2, gram.shape[3] // 2] = torch.eye(len(rows), device=identity_device)
    return ((gram - identity) ** 2).sum() / 2
