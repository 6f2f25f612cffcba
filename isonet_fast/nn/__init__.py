"""Layers: drop-in replacements for their torch.nn parents."""

from .conv import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear
from .srelu import ResidualSReLU, SharedScale, SharedShift, SReLU

__all__ = [
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoLinear",
    "ResidualSReLU",
    "SReLU",
    "SharedScale",
    "SharedShift",
]
