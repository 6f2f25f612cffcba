"""The CIFAR form of ISONet and R-ISONet: depth 6 n + 2, three stages, two 3x3 convolutions per block."""

from __future__ import annotations

from torch import Tensor, nn

from ..nn import SReLU
from .blocks import BasicBranch, Head, conv, stage


class CifarStem(nn.Module):
    """3x3 convolution and SReLU, no pooling; a delta, never penalised whatever its input channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 3, penalty=None)
        self.relu = SReLU(outputs, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class ISONetCifar(nn.Module):
    """See `isonet_cifar`."""

    def __init__(self, depth: int, residual: bool, width: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.stem = CifarStem(in_channels, width)
        self.s1 = stage(BasicBranch, width, width, 1, blocks, residual)
        self.s2 = stage(BasicBranch, width, 2 * width, 2, blocks, residual)
        self.s3 = stage(BasicBranch, 2 * width, 4 * width, 2, blocks, residual)
        self.head = Head(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, in_channels, H, W) -> (N, num_classes)
        return self.head(self.s3(self.s2(self.s1(self.stem(x)))))


def isonet_cifar(
    depth: int, residual: bool = False, width: int = 16, num_classes: int = 10, in_channels: int = 3
) -> ISONetCifar:
    """ISONet (or with `residual` R-ISONet) for small images: three stages of widths w, 2w, 4w, no normalisation.

    depth: 6 n + 2 with n blocks per stage: 8, 14, 20, 26, 32, ..., 110. Raises ValueError for another depth, or for a
    width, classes or channels below 1.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
    for name, value in (("width", width), ("num_classes", num_classes), ("in_channels", in_channels)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    return ISONetCifar(depth, residual, width, num_classes, in_channels)
