"""What the package offers: the names of `isonet_fast.__all__`, and the functions of the modules among them."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

import isonet_fast


def public_names() -> dict[str, Any]:
    """Classes and functions by dotted name, such as "OrthoConv2d" and "functional.srelu"."""
    found: dict[str, Any] = {}
    for name in isonet_fast.__all__:
        value = getattr(isonet_fast, name)
        found |= _functions(name, value) if isinstance(value, ModuleType) else {name: value}
    assert len(found) > 30
    return found


def _functions(name: str, module: ModuleType) -> dict[str, Any]:
    return {
        f"{name}.{function}": value
        for function, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__.startswith(module.__name__) and not function.startswith("_")
    }
