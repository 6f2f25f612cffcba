"""The networks of the paper."""

from .isonet_cifar import isonet_cifar

__all__ = ["isonet_cifar"]
