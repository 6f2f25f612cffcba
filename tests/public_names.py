"""What the package offers: the names of `isonet_fast.__all__`, and those of the modules among them. And what the page
docs/api.md documents."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

import isonet_fast

NEEDS_OTHERS = ("isonet_fast.timm", "isonet_fast.hub", "isonet_fast.models.detection")


def public_names() -> dict[str, Any]:
    """Classes and functions by dotted name, such as "OrthoConv2d" and "functional.srelu"."""
    found: dict[str, Any] = {}
    for name in isonet_fast.__all__:
        value = getattr(isonet_fast, name)
        found |= _members(name, value) if isinstance(value, ModuleType) else {name: value}
    assert len(found) > 30
    return found


def _members(name: str, module: ModuleType) -> dict[str, Any]:
    return {f"{name}.{member}": getattr(module, member) for member in module.__all__}


def public_methods(value: type) -> dict[str, Any]:
    """The methods of a class that this package writes, by qualified name, except those that PyTorch has too."""
    found: dict[str, Any] = {}
    for base in value.__mro__:
        if base.__module__.startswith("isonet_fast"):
            methods = {name: method for name, method in vars(base).items() if inspect.isfunction(method)}
            found |= {
                method.__qualname__: method
                for name, method in methods.items()
                if not name.startswith("_") and not hasattr(nn.Conv2d if issubclass(value, nn.Module) else object, name)
            }
    return found


def _missing(name: str) -> ModuleNotFoundError | None:
    for module in NEEDS_OTHERS:
        if f"{name}.".startswith(f"{module}."):
            try:
                importlib.import_module(module)
            except ModuleNotFoundError as error:
                return error
    return None


def documented_names() -> dict[str, Any]:
    """The entries of docs/api.md. One that names a module stands for the members that the entry lists, or else for
    those that the module's `__all__` lists; for the module itself if it lists none. Where a package is missing that an
    entry needs, its value is the error that says so."""
    found: dict[str, Any] = {}
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for entry in re.split(r"^::: ", page, flags=re.MULTILINE)[1:]:
        name, listed = entry.split()[0], re.search(r"members: \[(.*?)\]", entry)
        members = re.findall(r"\w+", listed[1]) if listed else None
        error = _missing(name)
        if error:
            found |= {f"{name}.{member}": error for member in members} if members else {name: error}
            continue
        value = pkgutil.resolve_name(name)
        if not isinstance(value, ModuleType) or members == []:
            found[name] = value
        elif members:
            found |= {f"{name}.{member}": getattr(value, member) for member in members}
        else:
            found |= _members(name, value)
    return found
