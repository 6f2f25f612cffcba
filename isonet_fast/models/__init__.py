"""The networks of the paper."""

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
