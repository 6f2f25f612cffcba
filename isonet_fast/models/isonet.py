"""ISONet and R-ISONet as published for ImageNet: depths 18 and 34 of basic blocks, 50 and 101 of bottlenecks.

Names of modules and order of the state_dict are those of the official checkpoints (`load_official`).
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from ..nn import OrthoConv2d
from ..nn.srelu import SharedShift
from .arguments import dropout_rate, integer, positive
from .blocks import BasicBranch, BottleneckBranch, Head, stage, through
from .ingredients import Ingredients, Switches
from .network import Network

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # per stage
BOTTLENECK = (50, 101)
_DROPOUT = {False: 0.1, True: 0.4}  # as published, by residual


class Stem(nn.Module):
    """7x7 convolution at stride 2 (PyTorch's initialisation, never penalised), 3x3 max pooling at stride 2, activation.

    SReLU commutes with max pooling, so it comes last: a quarter of the elements, the same outputs and gradients.
    It runs in place on the pooled map, which max pooling's own backward does not read (it keeps the indices).
    """

    conv: OrthoConv2d
    bn: nn.BatchNorm2d | None
    out: SharedShift | None
    relu: nn.Module
    pool: nn.MaxPool2d

    def __init__(self, inputs: int, outputs: int, made: Ingredients) -> None:
        super().__init__()
        self.conv = made.conv(inputs, outputs, 7, 2, penalty=None)
        self.bn, self.out = made.norm(outputs), made.shift()
        self.relu = made.act(outputs)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.pool(through(self.conv(x), self.bn, self.out)))


class ISONet(Network):
    """Depth 18, 34, 50 or 101, without or with skip connections; see `isonet18` to `risonet101`.

    switches: what else the network is made of (`ingredients.Switches`); the defaults are the published networks.
    """

    stem: Stem
    s1: nn.Sequential
    s2: nn.Sequential
    s3: nn.Sequential
    s4: nn.Sequential
    head: Head

    def __init__(
        self,
        depth: int,
        residual: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__()
        depth, made = integer("depth", depth), Ingredients(residual, **switches)
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {', '.join(map(str, BLOCKS))}, got {depth}")
        num_classes, in_channels = positive("num_classes", num_classes), positive("in_channels", in_channels)
        dropout = dropout_rate(dropout, _DROPOUT[residual], "as published")
        branch = BottleneckBranch if depth in BOTTLENECK else BasicBranch
        expansion = 4 if depth in BOTTLENECK else 1
        self.feature_channels: dict[str, int] = {f"s{n + 1}": 64 * 2**n * expansion for n in range(4)}
        self.stem = Stem(in_channels, 64, made)
        width = 64
        for (name, outputs), blocks in zip(self.feature_channels.items(), BLOCKS[depth], strict=True):
            self.add_module(name, stage(branch, width, outputs, 1 if name == "s1" else 2, blocks, made))
            width = outputs
        self.head = Head(width, num_classes, dropout, made)
        made.begin(self)


def isonet18(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """ISONet-18: no normalisation, no skip connection. dropout: before the classifier; None as published (0.1).

    Examples:
        >>> net = isonet_fast.models.isonet18(num_classes=10)
        >>> net(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 10])
        >>> {name: tuple(x.shape) for name, x in net.features(torch.zeros(1, 3, 64, 64)).items()}
        {'s1': (1, 64, 16, 16), 's2': (1, 128, 8, 8), 's3': (1, 256, 4, 4), 's4': (1, 512, 2, 2)}
    """
    return ISONet(18, False, num_classes, in_channels, dropout, **switches)


def isonet34(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """ISONet-34; see `isonet18`.

    Examples:
        >>> isonet_fast.models.isonet34(num_classes=10).head.fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    return ISONet(34, False, num_classes, in_channels, dropout, **switches)


def isonet50(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """ISONet-50, of bottlenecks; see `isonet18`.

    Examples:
        >>> isonet_fast.models.isonet50(num_classes=10).head.fc
        Linear(in_features=2048, out_features=10, bias=True)
    """
    return ISONet(50, False, num_classes, in_channels, dropout, **switches)


def isonet101(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """ISONet-101, of bottlenecks; see `isonet18`.

    Examples:
        >>> isonet_fast.models.isonet101(num_classes=10).head.fc
        Linear(in_features=2048, out_features=10, bias=True)
    """
    return ISONet(101, False, num_classes, in_channels, dropout, **switches)


def risonet18(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """R-ISONet-18: skip connections, each branch times a learnable scalar that starts at 0. dropout: before the
    classifier; None as published (0.4).

    Examples:
        >>> isonet_fast.models.risonet18(num_classes=10).head.fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    return ISONet(18, True, num_classes, in_channels, dropout, **switches)


def risonet34(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """R-ISONet-34; see `risonet18`.

    Examples:
        >>> isonet_fast.models.risonet34(num_classes=10).head.fc
        Linear(in_features=512, out_features=10, bias=True)
    """
    return ISONet(34, True, num_classes, in_channels, dropout, **switches)


def risonet50(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """R-ISONet-50, of bottlenecks; see `risonet18`.

    Examples:
        >>> isonet_fast.models.risonet50(num_classes=10).head.fc
        Linear(in_features=2048, out_features=10, bias=True)
    """
    return ISONet(50, True, num_classes, in_channels, dropout, **switches)


def risonet101(
    *, num_classes: int = 1000, in_channels: int = 3, dropout: float | None = None, **switches: Unpack[Switches]
) -> ISONet:
    """R-ISONet-101, of bottlenecks; see `risonet18`.

    Examples:
        >>> isonet_fast.models.risonet101(num_classes=10).head.fc
        Linear(in_features=2048, out_features=10, bias=True)
    """
    return ISONet(101, True, num_classes, in_channels, dropout, **switches)
