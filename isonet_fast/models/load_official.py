"""Reading a checkpoint file of the official code into one of our networks."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_SNAPSHOT = {"net", "optim", "epoch", "train_accuracy", "test_accuracy"}  # what the official trainer writes
_PREFIX = "module."  # of its DataParallel wrapper


def load_official(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load the weights of an official checkpoint file into `model`, in place; returns `model`.

    The file holds the weights under "net" (or nothing else), each name with the prefix "module."; optimizer and
    accuracies beside them are left alone. It is read with weights_only=True: a pickle that would run code is refused
    and runs nothing.

    Raises ValueError for a file that is refused, damaged or no official checkpoint, and where its names or shapes
    are not the model's; the message names what was found. The model is unchanged then.
    """
    state = official_state(read_checkpoint(path), path)
    expected = model.state_dict()
    faults = _faults(state, expected)
    if faults:
        raise ValueError(f"{os.fspath(path)} does not fit this {type(model).__name__}: " + "; ".join(faults))
    model.load_state_dict(state)
    return model


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """torch.load on the CPU with weights_only=True; a ValueError that says why the file is refused."""
    with open(path, "rb") as file:  # a file that is absent or not ours to read is no damaged one
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).strip().splitlines()
            detail = next((line.strip() for line in reason if "Unsupported" in line or "GLOBAL" in line), reason[-1])
            raise ValueError(
                f"{os.fspath(path)} is refused, nothing in it was run: it holds more than tensors and plain values, "
                f"or is damaged ({detail})"
            ) from error
        except Exception as error:  # a pickle is a program: with a flipped bit it can fail in any way
            raise ValueError(
                f"{os.fspath(path)} is damaged or no PyTorch checkpoint ({type(error).__name__}: {error})"
            ) from error


def official_state(contents: Any, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The weights of an official checkpoint, names without the prefix; ValueError if it is none.

    As the official evaluation does, this takes the weights alone, not under "net", too.
    """
    where = os.fspath(path)
    if isinstance(contents, Mapping) and contents and all(str(name).startswith(_PREFIX) for name in contents):
        contents = {"net": contents}
    if not isinstance(contents, Mapping) or "net" not in contents:
        found = _keys(contents) if isinstance(contents, Mapping) else f"a {type(contents).__name__}"
        raise ValueError(f'{where} is no official checkpoint: expected a dict with the key "net", found {found}')
    unknown = set(contents) - _SNAPSHOT
    if unknown:
        raise ValueError(
            f"{where} is no official checkpoint: keys {sorted(map(str, unknown))} are not among {sorted(_SNAPSHOT)}"
        )
    net = contents["net"]
    if not isinstance(net, Mapping) or not net:
        raise ValueError(
            f'{where}: "net" must be a dict of weights, found {type(net).__name__} of {_size(net)} entries'
        )
    for name, value in net.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f'{where}: "net" must map names to floating-point tensors, found {name!r}: {_what(value)}')
        if not name.startswith(_PREFIX):
            raise ValueError(f'{where}: every name in "net" must start with "{_PREFIX}", found {name!r}')
    return {name.removeprefix(_PREFIX): value for name, value in net.items()}


def _faults(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes = [
        f"{name} {tuple(value.shape)} where the model has {tuple(expected[name].shape)}"
        for name, value in state.items()
        if name in expected and value.shape != expected[name].shape
    ]
    named = (("missing", missing), ("unexpected", unexpected), ("shapes differ:", shapes))
    return [f"{title} {_few(items)}" for title, items in named if items]


def _few(items: list[str], count: int = 5) -> str:
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")


def _keys(contents: Mapping) -> str:
    return "keys " + _few([repr(key) for key in contents]) if contents else "an empty dict"


def _size(value: Any) -> Any:
    return len(value) if hasattr(value, "__len__") else "no"


def _what(value: Any) -> str:
    return f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
