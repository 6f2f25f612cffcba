"""Files of a network's weights alone, NAME.pt or NAME.safetensors: a plain state_dict, and beside it which network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .config import Model
from .files import replacing

SUFFIXES = (".pt", ".safetensors")
_KEY = "isonet_fast"  # of the configuration in a file's metadata: the state_dict's own, or that of safetensors


def write(model: nn.Module, config: Model, path: Path) -> None:
    """Write the weights of `model`, which `config` builds, whole or not at all, in the format of the path's suffix."""
    check_suffix(path)
    state: Any = model.state_dict()  # an OrderedDict with the attribute _metadata, kept by torch.save and torch.load
    with replacing(path) as temporary:
        if path.suffix == ".pt":
            state._metadata[""][_KEY] = dataclasses.asdict(config)
            torch.save(state, temporary)
        else:
            tensors = {name: value.contiguous() for name, value in state.items()}
            _safetensors().torch.save_file(tensors, temporary, {_KEY: json.dumps(dataclasses.asdict(config))})


def check_suffix(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"the file to write must end in {' or '.join(SUFFIXES)}, got {path}")
    if path.suffix == ".safetensors":
        _safetensors()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """The weights and the configuration of their network; None where the file is not of `write`."""
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    return tensors, None if about is None else json.loads(about)


def described(contents: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration of the network in what a .pt file of `write` holds; None for any other."""
    return getattr(contents, "_metadata", {}).get("", {}).get(_KEY)


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need the package safetensors: pip install 'isonet_fast[export]'"
        ) from error
    return safetensors
