"""Finer feature maps with the same weights: dilation in place of stride."""

from __future__ import annotations

from torch import nn

from .network import Network


def dilate_(network: Network, output_stride: int, stem_stride: int) -> None:
    """Let no stage of `network` go beyond `output_stride` (8 or 16 instead of 32), in place.

    A stage that would halve the map beyond it keeps its size, and every later 3x3 convolution reads taps twice as far
    apart (the "à trous" algorithm): the old map is then the new one at every second pixel.

    stem_stride: the stride of the stem and the first stage together. Raises ValueError for a stride that the network
    never has.
    """
    strides = [stem_stride * 2**n for n in range(len(network.feature_channels))]
    if output_stride not in strides:
        raise ValueError(f"output_stride must be one of {', '.join(map(str, strides))}, got {output_stride!r}")
    dilation = 1
    for name, stride in zip(network.feature_channels, strides, strict=True):
        for conv in network.get_submodule(name).modules():
            if isinstance(conv, nn.Conv2d):
                conv.dilation = (dilation, dilation)
                conv.padding = tuple(dilation * (k // 2) for k in conv.kernel_size)
                if conv.stride[0] == 2 and stride > output_stride:
                    conv.stride = (1, 1)
                    if conv.kernel_size[0] > 1:  # not the shortcut, which comes after the branch
                        dilation *= 2
