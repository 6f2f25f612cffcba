"""What a network is made of: the switches of the paper's tables, and the layers that they choose.

The defaults are ISONet and R-ISONet as published; each other setting is the official code's configuration of that name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, TypedDict

from torch import nn

from ..geometry import Penalty
from ..nn import OrthoConv2d, ResidualSReLU, SharedScale, SReLU
from ..nn.srelu import SharedShift
from .arguments import truth


class Switches(TypedDict, total=False):
    """The keyword arguments that every network takes beside its own. A default is the network as published.

    Attributes:
        activation: "srelu", or "relu"; then convolutions without normalisation behind them have biases, initially 0.
        bias_init: the initial value of SReLU's b, -1 as published.
        bias_learned: whether b is learned, as published.
        initialisation: "delta" (the 7x7 stem: PyTorch's), or "kaiming": normal with variance 2 / (kernel size x
            outputs).
        normalisation: "none", or "batch": BatchNorm behind every convolution, its weight 0 at first behind a branch's
            last. The official code does so without a skip too; the network is a constant then and does not train, until
            these weights are set to 1.
        fixup: Fixup in place of a normalisation (Zhang, Dauphin, Ma, ICLR 2019). It needs residual=True,
            activation="relu", normalisation="none" and initialisation="kaiming". It adds a scalar bias before every
            convolution, every activation and the classifier, and a multiplier that starts at 1 after every branch.
            There are no other biases. The last convolution of each branch and the classifier start at 0. The other
            convolutions of a branch are divided by L^(1/(2m-2)), for L branches of m convolutions.
        branch_scale: the initial value of the shared scalar after every branch, or None for no such scalar. "published"
            is 0 in R-ISONet and None in ISONet.

    Examples:
        >>> isonet_fast.models.isonet_cifar(8, activation="relu", normalisation="batch").stem.relu
        ReLU(inplace=True)
    """

    activation: Literal["srelu", "relu"]
    bias_init: float
    bias_learned: bool
    initialisation: Literal["delta", "kaiming"]
    normalisation: Literal["none", "batch"]
    branch_scale: float | Literal["published"] | None
    fixup: bool


_CHOICES = {
    "activation": ("srelu", "relu"),
    "initialisation": ("delta", "kaiming"),
    "normalisation": ("none", "batch"),
}


@dataclass(frozen=True)
class Ingredients:
    """`Switches`, checked: TypeError or ValueError names the one that is wrong."""

    residual: bool = False
    activation: str = "srelu"
    bias_init: float = -1.0
    bias_learned: bool = True
    initialisation: str = "delta"
    normalisation: str = "none"
    branch_scale: float | str | None = "published"
    fixup: bool = False

    def __post_init__(self) -> None:
        truth("residual", self.residual)
        truth("bias_learned", self.bias_learned)
        truth("fixup", self.fixup)
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        needed = (True, "relu", "none", "kaiming")
        if self.fixup and (self.residual, self.activation, self.normalisation, self.initialisation) != needed:
            raise ValueError(
                'fixup=True needs residual=True, activation="relu", normalisation="none" and initialisation="kaiming", '
                f"got {self.residual}, {self.activation!r}, {self.normalisation!r} and {self.initialisation!r}"
            )
        if not _finite(self.bias_init):
            raise ValueError(f"bias_init must be a finite number, got {self.bias_init!r}")
        if self.branch_scale not in ("published", None) and not _finite(self.branch_scale):
            raise ValueError(f'branch_scale must be "published", None or a finite number, got {self.branch_scale!r}')

    def conv(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, penalty: Penalty | None = "isonet"
    ) -> OrthoConv2d:
        """A convolution that keeps the size at stride 1."""
        bias = self.activation == "relu" and self.normalisation == "none" and not self.fixup
        conv = OrthoConv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias, penalty=penalty)
        if self.initialisation == "kaiming":
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (kernel**2 * outputs)))
        elif kernel == 7:
            nn.Conv2d.reset_parameters(conv)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
        return conv

    def norm(self, channels: int, last: bool = False) -> nn.BatchNorm2d | None:
        """last: behind a branch's last convolution."""
        if self.normalisation == "none":
            return None
        norm = nn.BatchNorm2d(channels)
        nn.init.constant_(norm.weight, 0.0 if last else 1.0)
        return norm

    def shift(self) -> SharedShift | None:
        return SharedShift() if self.fixup else None

    def act(self, channels: int) -> nn.Module:
        return self._act(SReLU, channels)

    def join(self, channels: int) -> nn.Module:
        """ResidualSReLU(shortcut, branch), or a ReLU of their sum."""
        return self._act(ResidualSReLU, channels)

    def _act(self, kind: type[SReLU] | type[ResidualSReLU], channels: int) -> nn.Module:
        if self.activation == "relu":
            return nn.ReLU(inplace=True)
        layer = kind(channels, float(self.bias_init), inplace=True, spatial_dims=2)
        layer.srelu_bias.requires_grad_(self.bias_learned)
        return layer

    @property
    def scaled(self) -> bool:
        """Whether a shared scale ends every branch."""
        return self.residual if self.branch_scale == "published" else self.branch_scale is not None

    def scale(self) -> SharedScale:
        published = 1.0 if self.fixup else 0.0
        return SharedScale(published if self.branch_scale == "published" else float(self.branch_scale))  # type: ignore[arg-type]

    def begin(self, network: nn.Module) -> None:
        """Initial values that depend on the depth: Fixup's."""
        if not self.fixup:
            return
        branches = [module for name, module in network.named_modules() if name.rpartition(".")[2] == "f"]
        for branch in branches:
            *others, last = (module for module in branch.modules() if isinstance(module, nn.Conv2d))
            nn.init.zeros_(last.weight)
            for conv in others:
                conv.weight.data.mul_(len(branches) ** (-1 / (2 * len(others))))
        for classifier in (module for module in network.modules() if isinstance(module, nn.Linear)):
            nn.init.zeros_(classifier.weight)
            nn.init.zeros_(classifier.bias)


def _finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
