"""ISONet and R-ISONet as published for ImageNet: depths 18 and 34 of basic blocks, 50 and 101 of bottlenecks.

Names of modules and order of the state_dict are those of the official checkpoints (`load_official`).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import SReLU
from .arguments import dropout_rate, integer, positive, truth
from .blocks import BasicBranch, BottleneckBranch, Head, conv, stage
from .network import Network

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # per stage
BOTTLENECK = (50, 101)
_DROPOUT = {False: 0.1, True: 0.4}  # as published, by residual


class Stem(nn.Module):
    """7x7 convolution at stride 2 (PyTorch's initialisation, never penalised), 3x3 max pooling at stride 2, SReLU.

    SReLU commutes with max pooling, so it comes last: a quarter of the elements, the same outputs and gradients.
    In place on the pooled map, which max pooling's own backward does not read (it keeps the indices).
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 7, 2, penalty=None)
        nn.Conv2d.reset_parameters(self.conv)
        self.relu = SReLU(outputs, inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.pool(self.conv(x)))


class ISONet(Network):
    """See `isonet18` to `risonet101`."""

    def __init__(
        self,
        depth: int,
        residual: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        depth, residual = integer("depth", depth), truth("residual", residual)
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        num_classes, in_channels = positive("num_classes", num_classes), positive("in_channels", in_channels)
        dropout = dropout_rate(dropout, _DROPOUT[residual], "as published")
        branch = BottleneckBranch if depth in BOTTLENECK else BasicBranch
        expansion = 4 if depth in BOTTLENECK else 1
        self.feature_channels = {f"s{n + 1}": 64 * 2**n * expansion for n in range(4)}
        self.stem = Stem(in_channels, 64)
        width = 64
        for (name, outputs), blocks in zip(self.feature_channels.items(), BLOCKS[depth], strict=True):
            self.add_module(name, stage(branch, width, outputs, 1 if name == "s1" else 2, blocks, residual))
            width = outputs
        self.head = Head(width, num_classes, dropout)


def isonet18(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """ISONet-18: no normalisation, no skip connection. dropout: before the classifier; None as published (0.1)."""
    return ISONet(18, False, num_classes, in_channels, dropout)


def isonet34(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """ISONet-34; see `isonet18`."""
    return ISONet(34, False, num_classes, in_channels, dropout)


def isonet50(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """ISONet-50, of bottlenecks; see `isonet18`."""
    return ISONet(50, False, num_classes, in_channels, dropout)


def isonet101(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """ISONet-101, of bottlenecks; see `isonet18`."""
    return ISONet(101, False, num_classes, in_channels, dropout)


def risonet18(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """R-ISONet-18: skip connections, each branch times a learnable scalar that starts at 0. dropout: before the
    classifier; None as published (0.4)."""
    return ISONet(18, True, num_classes, in_channels, dropout)


def risonet34(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """R-ISONet-34; see `risonet18`."""
    return ISONet(34, True, num_classes, in_channels, dropout)


def risonet50(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """R-ISONet-50, of bottlenecks; see `risonet18`."""
    return ISONet(50, True, num_classes, in_channels, dropout)


def risonet101(*, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None) -> ISONet:
    """R-ISONet-101, of bottlenecks; see `risonet18`."""
    return ISONet(101, True, num_classes, in_channels, dropout)
