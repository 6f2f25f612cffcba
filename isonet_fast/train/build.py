"""From a configuration to a network on a device."""

from __future__ import annotations

import importlib
import operator
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn

from .. import models
from ..models.ingredients import Switches
from .config import Model

NETWORKS = (*(f"{kind}isonet{depth}" for kind in ("", "r") for depth in (18, 34, 50, 101)), "isonet_cifar")


def build_model(config: Model, num_classes: int, in_channels: int) -> nn.Module:
    """The network of the configuration for this data; ValueError for a name that is none of NETWORKS."""
    if config.name not in NETWORKS:
        raise ValueError(f"model.name must be one of {', '.join(NETWORKS)}, got {config.name!r}")
    switches = cast(Switches, {name: getattr(config, name) for name in Switches.__annotations__})
    if config.name == "isonet_cifar":
        return models.isonet_cifar(
            config.depth, config.residual, config.width, num_classes, in_channels, config.dropout, **switches
        )
    constructor = getattr(models, config.name)
    return constructor(num_classes=num_classes, in_channels=in_channels, dropout=config.dropout, **switches)


def construct(name: str) -> nn.Module:
    """The network that "module:function" returns without arguments; the module may lie in the working directory."""
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--model must be module:function, for example networks:my_network, got {name!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` has it; a console script does not
    try:
        model = operator.attrgetter(function)(importlib.import_module(module))()
    except Exception as error:  # whatever somebody else's code raises
        raise ValueError(f"--model {name} cannot be built: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA where there is a GPU, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but this machine has no GPU that PyTorch can use")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise ValueError(f"device is {name}, but this machine has {torch.cuda.device_count()} GPUs, counted from 0")
    return device


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to this precision; nothing for float32."""
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))
