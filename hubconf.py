"""torch.hub: torch.hub.load("path/to/this/repository", "risonet50", source="local", num_classes=10)."""

dependencies = ["torch", "numpy"]

from isonet_fast.models import (  # noqa: F401
    isonet18,
    isonet34,
    isonet50,
    isonet101,
    isonet_cifar,
    risonet18,
    risonet34,
    risonet50,
    risonet101,
)
