"""Reading the weights of a checkpoint file, of the official code or in another usual layout, into a network."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from ..safe_load import few, plain_names, read_checkpoint, weights_in


def load_official(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the weights of a checkpoint file into `model`, in place; returns `model`.

    The official trainer keeps them under "net", each name with the prefix "module."; optimizer and accuracies beside
    them are ignored. Other layouts are read too: a plain state_dict, one under "model", "state_dict" or
    "model_state_dict", a .safetensors file, and names as torch.compile, DDP, FSDP, AveragedModel and Lightning write
    them; `model` itself may be wrapped so. A pickle that would run code is refused and runs nothing.

    Raises ValueError for a file that is refused, damaged or of another layout, and where its names or shapes are not
    the model's; the message names what was found. The model is unchanged then. A file that cannot be opened is an
    OSError; TypeError for something that is no module or no path.

    Examples:
        >>> net = isonet_fast.models.isonet_cifar(8, width=4)
        >>> torch.save({"net": {f"module.{name}": value for name, value in net.state_dict().items()}}, "checkpoint.pt")
        >>> isonet_fast.models.load_official(net, "checkpoint.pt") is net
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(path, (str, os.PathLike)):  # open() would take an int too, as a file that is open already
        raise TypeError(f"path must be a str or an os.PathLike, got {type(path).__name__}")
    load_weights(model, weights_in(read_checkpoint(path), path), path)
    return model


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Load weights under plain names (`safe_load.weights_in`), all or none; ValueError where they do not fit."""
    state = model.state_dict()
    own = {plain: name for name, plain in plain_names(state).items()}
    faults = _faults(weights, {plain: state[name] for plain, name in own.items()})
    if faults:
        raise ValueError(f"{os.fspath(path)} does not fit this {type(model).__name__}: " + "; ".join(faults))
    model.load_state_dict({own[plain]: value for plain, value in weights.items()})


def _faults(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in weights]
    unexpected = [name for name in weights if name not in expected]
    shapes = [
        f"{name} {tuple(value.shape)} where the model has {tuple(expected[name].shape)}"
        for name, value in weights.items()
        if name in expected and value.shape != expected[name].shape
    ]
    kinds = [
        f"{name} is {value.dtype}, the model's {expected[name].dtype}"
        for name, value in weights.items()
        if name in expected and value.is_floating_point() != expected[name].is_floating_point()
    ]
    named = (("missing", missing), ("unexpected", unexpected), ("shapes differ:", shapes), ("types differ:", kinds))
    return [f"{title} {few(items)}" for title, items in named if items]
