"""Weights from a file that somebody else wrote: read without running anything, found in every usual layout."""

from __future__ import annotations

import os
import pickle
import string
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SECTIONS = ("net", "model", "state_dict", "model_state_dict")  # where training scripts keep the weights of a checkpoint
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts that PyTorch puts into names
_PREFIXES = ("module.", "model.", "net.")  # DataParallel, DDP, AveragedModel; attributes of a Lightning module
_COUNTERS = {"n_averaged"}  # AveragedModel's, beside the weights

Where = str | os.PathLike[str]


def read_checkpoint(path: Where) -> Any:
    """What a checkpoint file holds, on the CPU; for a .safetensors file the dict of its tensors.

    A pickle is read with weights_only=True: one that would run code is refused and runs nothing. Raises ValueError
    that says why the file is refused or what it is instead, OSError for a file that is absent or cannot be opened.
    """
    if Path(path).suffix == ".safetensors":
        return read_safetensors(path)[0]
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # the reason that we give is shorter
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(_refusal(path, str(error))) from error
        except Exception as error:  # a pickle is a program: with a flipped bit it can fail in any way
            raise ValueError(f"{os.fspath(path)} is damaged or no PyTorch checkpoint: {_looks_like(path)}") from error


def read_safetensors(path: Where) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a .safetensors file and its metadata; ValueError if it is damaged or none."""
    safetensors = import_safetensors()
    with open(path, "rb"):  # an OSError that names the file
        pass
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{os.fspath(path)} is damaged or no safetensors file: {_looks_like(path)}") from error


def import_safetensors() -> Any:
    """The package; ModuleNotFoundError says how to get it."""
    try:
        import safetensors
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            ".safetensors files need the package safetensors: pip install 'isonet_fast[export]'"
        ) from error
    return safetensors


def weights_in(contents: Any, path: Where) -> dict[str, Tensor]:
    """The weights in what `read_checkpoint` returned, under plain names (see `plain_names`).

    contents: a state_dict, or a dict that holds one under one of SECTIONS; whatever lies beside it is ignored.
    Raises ValueError for anything else, and lists what was found.
    """
    sections = [key for key in SECTIONS if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping)]
    if len(sections) > 1:
        raise ValueError(f"{os.fspath(path)} holds weights more than once, under {' and '.join(map(repr, sections))}")
    state = contents[sections[0]] if sections else contents
    where = f"{os.fspath(path)}: under {sections[0]!r}" if sections else os.fspath(path)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(
            f"{where} holds no weights: expected a state_dict, or one under {', '.join(map(repr, SECTIONS))}; "
            f"found {_described(state)}"
        )
    strange = [
        (name, value) for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if strange:
        name, value = strange[0]
        raise ValueError(f"{where} must map names to tensors; found {name!r}: {_kind(value)}")
    state = {name: value for name, value in state.items() if name not in _COUNTERS}
    names = plain_names(state)
    if len(set(names.values())) < len(names):
        twice = sorted(name for name, plain in names.items() if list(names.values()).count(plain) > 1)
        raise ValueError(f"{where} holds the same weight under several names: {few(twice)}")
    return {names[name]: value for name, value in state.items()}


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name without what torch.compile, DDP, FSDP, AveragedModel and Lightning put into it.

    `_orig_mod` and the like are removed wherever they are a part of a name. `module.`, `model.` and `net.` are removed
    only at the beginning, and only if every name begins with it.
    """
    plain = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    while prefix := next((p for p in _PREFIXES if plain and all(n.startswith(p) for n in plain.values())), None):
        plain = {name: short.removeprefix(prefix) for name, short in plain.items()}
    return plain


def few(items: list[str], count: int = 5) -> str:
    """The first items, and how many more there are."""
    rest = len(items) - count
    return ", ".join(items[:count]) + (f" and {rest} more" if rest > 0 else "")


def _described(value: Any) -> str:
    if isinstance(value, Mapping) and value:
        return "a dict of " + few([f"{key!r}: {_kind(item)}" for key, item in value.items()])
    return _kind(value)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor"
    if isinstance(value, Mapping):
        return f"a dict of {len(value)} entries" if value else "an empty dict"
    return f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _refusal(path: Where, reason: str) -> str:
    lines = [line.strip() for line in reason.splitlines()] or [""]
    detail = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[-1])
    if "GLOBAL" not in detail and not _is_torch_file(path):
        return f"{os.fspath(path)} is no PyTorch checkpoint: {_looks_like(path)}"
    return (
        f"{os.fspath(path)} is refused, nothing in it was run: it holds more than tensors and plain values, or is "
        f"damaged ({detail})"
    )


def _is_torch_file(path: Where) -> bool:
    """Whether it begins as files of torch.save do: as a ZIP archive, or a pickle with its former format's number."""
    with open(path, "rb") as file:
        start = file.read(3)
    return start.startswith(b"PK") or (start[:1] == b"\x80" and start[2:] == b"\x8a")


_BEGINNINGS = {
    b"PK": "it begins as a ZIP archive, but is cut off or was not written by torch.save",
    b"\x80": "it begins as a pickle, but is cut off or was not written by torch.save",
    b"\x1f\x8b": "it is compressed by gzip; unpack it first",
    b"\x89HDF": "it is an HDF5 file, as Keras writes them",
    b"\x93NUMPY": "it is a NumPy array",
    b"version https://git-lfs": "it is a pointer of Git LFS; fetch the file itself with git lfs pull",
}


def _looks_like(path: Where) -> str:
    """In words, what a file that is no checkpoint is, by its first bytes."""
    with open(path, "rb") as file:
        start = file.read(512)
    if not start:
        return "it is empty"
    for beginning, words in _BEGINNINGS.items():
        if start.startswith(beginning):
            return words
    if start.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        return "it is a web page, perhaps of a download that failed"
    if all(byte in string.printable.encode() for byte in start):
        return "it is a text file"
    return "it is neither a ZIP archive nor a pickle, the formats of torch.save"
