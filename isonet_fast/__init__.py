"""Isometric networks (ISONet, R-ISONet) for PyTorch: fused SReLU, the orthogonality penalty of a whole network
(on a GPU in a few launches), layers, a regularizer, ready networks and a trainer."""

from ._require_torch import require_torch

require_torch()

from . import diagnostics, functional, init, models, reference
from ._version import __version__ as __version__
from .convert import convert
from .deconvert import deconvert
from .environment import info
from .nn import (
    OrthoConv1d,
    OrthoConv2d,
    OrthoConv3d,
    OrthoLinear,
    ResidualSReLU,
    SharedScale,
    SReLU,
)
from .param_groups import param_groups
from .regularizer import OrthoRegularizer

__all__ = [
    "OrthoConv1d",
    "OrthoConv2d",
    "OrthoConv3d",
    "OrthoLinear",
    "OrthoRegularizer",
    "ResidualSReLU",
    "SReLU",
    "SharedScale",
    "convert",
    "deconvert",
    "diagnostics",
    "functional",
    "info",
    "init",
    "models",
    "param_groups",
    "reference",
]
del require_torch
