"""The CIFAR form of ISONet and R-ISONet: depth 6 n + 2, three stages, two 3x3 convolutions per block."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor, nn

from ..nn import OrthoConv2d
from ..nn.srelu import SharedShift
from .arguments import dropout_rate, integer, positive
from .blocks import BasicBranch, Head, stage, through
from .ingredients import Ingredients, Switches
from .network import Network


class CifarStem(nn.Module):
    """3x3 convolution and activation, no pooling; never penalised whatever its input channels."""

    conv: OrthoConv2d
    bn: nn.BatchNorm2d | None
    out: SharedShift | None
    relu: nn.Module

    def __init__(self, inputs: int, outputs: int, made: Ingredients) -> None:
        super().__init__()
        self.conv = made.conv(inputs, outputs, 3, penalty=None)
        self.bn, self.out = made.norm(outputs), made.shift()
        self.relu = made.act(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(through(self.conv(x), self.bn, self.out))


class ISONetCifar(Network):
    """See `isonet_cifar`."""

    stem: CifarStem
    s1: nn.Sequential
    s2: nn.Sequential
    s3: nn.Sequential
    head: Head

    def __init__(
        self,
        depth: int,
        residual: bool = False,
        width: int = 16,
        num_classes: int = 10,
        in_channels: int = 3,
        dropout: float | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__()
        depth, width = integer("depth", depth), positive("width", width)
        num_classes, in_channels = positive("num_classes", num_classes), positive("in_channels", in_channels)
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
        made, dropout = Ingredients(residual, **switches), dropout_rate(dropout, 0.0, "no such layer")
        blocks = (depth - 2) // 6
        self.feature_channels: dict[str, int] = {"s1": width, "s2": 2 * width, "s3": 4 * width}
        self.stem = CifarStem(in_channels, width, made)
        self.s1 = stage(BasicBranch, width, width, 1, blocks, made)
        self.s2 = stage(BasicBranch, width, 2 * width, 2, blocks, made)
        self.s3 = stage(BasicBranch, 2 * width, 4 * width, 2, blocks, made)
        self.head = Head(4 * width, num_classes, dropout, made)
        made.begin(self)


def isonet_cifar(
    depth: int,
    residual: bool = False,
    width: int = 16,
    num_classes: int = 10,
    in_channels: int = 3,
    dropout: float | None = None,
    **switches: Unpack[Switches],
) -> ISONetCifar:
    """ISONet (or with `residual` R-ISONet) for small images: three stages of widths w, 2w, 4w, no normalisation.

    depth: 6 n + 2 with n blocks per stage: 8, 14, 20, 26, 32, ..., 110. dropout: before the classifier; None: no such
    layer. switches: what else the network is made of (`ingredients.Switches`).

    Raises TypeError for an argument of another type; ValueError for another depth, for a width, classes or channels
    below 1, and for a dropout outside [0, 1).

    Examples:
        >>> net = isonet_fast.models.isonet_cifar(8, residual=True, width=4)
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> {name: tuple(x.shape) for name, x in net.features(torch.zeros(1, 3, 32, 32)).items()}
        {'s1': (1, 4, 32, 32), 's2': (1, 8, 16, 16), 's3': (1, 16, 8, 8)}
    """
    return ISONetCifar(depth, residual, width, num_classes, in_channels, dropout, **switches)
