"""The networks of the paper. `detection`, which needs torchvision, is imported when it is asked for."""

import importlib
from typing import Any

from .isonet import isonet18, isonet34, isonet50, isonet101, risonet18, risonet34, risonet50, risonet101
from .isonet_cifar import isonet_cifar
from .load_official import load_official

__all__ = [
    "isonet18",
    "isonet34",
    "isonet50",
    "isonet101",
    "isonet_cifar",
    "load_official",
    "risonet18",
    "risonet34",
    "risonet50",
    "risonet101",
]


def __getattr__(name: str) -> Any:
    if name == "detection":
        return importlib.import_module(".detection", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
