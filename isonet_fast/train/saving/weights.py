"""Files with only a network's weights, NAME.pt or NAME.safetensors: a plain state_dict, and which network it is of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...safe_load import import_safetensors, read_checkpoint, read_safetensors
from ..config import Model
from .files import disk_errors_naming, replacing

SUFFIXES = (".pt", ".safetensors")
_KEY = "isonet_fast"  # the configuration's key in the metadata of a state_dict or of safetensors


def write(model: nn.Module, config: Model, path: Path) -> None:
    """Write the weights of `model`, which `config` builds, whole or not at all, in the format of the path's suffix."""
    check_target(path)
    state: Any = model.state_dict()  # an OrderedDict with the attribute _metadata, kept by torch.save and torch.load
    with replacing(path) as temporary, disk_errors_naming(path):
        if path.suffix == ".pt":
            state._metadata[""][_KEY] = dataclasses.asdict(config)
            with open(temporary, "wb") as file:
                torch.save(state, file)
        else:
            tensors = {name: value.contiguous() for name, value in state.items()}
            packed = import_safetensors().torch.save(tensors, {_KEY: json.dumps(dataclasses.asdict(config))})
            temporary.write_bytes(packed)  # not save_file: its error for a full disk is no OSError


def check_target(path: Path) -> None:
    """ValueError for another suffix, and for a file that is there and was not written by `write`."""
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file to write must end in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".safetensors":
        import_safetensors()
    if path.is_file() and not _written_here(path):
        raise ValueError(f"{path} is there already and is no exported file: choose another name, or remove it")


def _written_here(path: Path) -> bool:
    try:
        return read(path)[1] is not None
    except ValueError:
        return False


def read(path: Path) -> tuple[Any, dict[str, Any] | None]:
    """What a file holds (`safe_load.read_checkpoint`), and the configuration of its network if `write` wrote it."""
    if path.suffix == ".safetensors":
        contents, metadata = read_safetensors(path)
        return contents, _parsed(metadata.get(_KEY), path)
    contents = read_checkpoint(path)
    own = getattr(contents, "_metadata", None)  # of a state_dict: a dict by module
    about = own.get("") if isinstance(own, Mapping) else None
    return contents, about.get(_KEY) if isinstance(about, Mapping) else None


def _parsed(text: str | None, path: Path) -> dict[str, Any] | None:
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: its metadata {_KEY!r} must be JSON, found {text!r}") from error
