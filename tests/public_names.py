"""What the package offers: the names of `isonet_fast.__all__`, and those of the modules among them. And what the page
docs/api.md documents."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import isonet_fast


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


def documented_names() -> dict[str, Any]:
    """The entries of docs/api.md. One that names a module stands for the members that the entry lists, or else for
    those that the module's `__all__` lists."""
    found: dict[str, Any] = {}
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    for entry in re.split(r"^::: ", page, flags=re.MULTILINE)[1:]:
        name, listed = entry.split()[0], re.search(r"members: \[(.*?)\]", entry)
        value = pkgutil.resolve_name(name)
        if not isinstance(value, ModuleType):
            found[name] = value
        elif listed:
            found |= {f"{name}.{member}": getattr(value, member) for member in listed[1].split(", ")}
        else:
            found |= _members(name, value)
    return found
