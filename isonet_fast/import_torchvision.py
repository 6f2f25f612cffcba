"""torchvision, also where its compiled operators do not load: data sets, transforms and classifiers need none of them.

The torchvision that `pip` finds is built for a CUDA torch. Beside a CPU torch its library cannot load, and the import
ends with "operator torchvision::nms does not exist": the Python side describes operators that nobody has declared.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

_DESCRIBED = ("nms", "qnms")  # the operators that torchvision describes without looking whether its library is there


def import_torchvision() -> ModuleType:
    """The package; ModuleNotFoundError says how to get the one that fits this torch."""
    try:
        return _imported()
    except (ImportError, RuntimeError) as error:
        raise ModuleNotFoundError(
            f"no torchvision that works with torch {torch.__version__} ({error}): pip install 'isonet_fast[vision]' "
            f"torch=={torch.__version__.partition('+')[0]}  # naming this torch keeps it from being replaced"
        ) from error


def _imported() -> ModuleType:
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left, half initialised
        for name in _DESCRIBED:  # declared and nothing more: calling one says that it has no implementation
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision
