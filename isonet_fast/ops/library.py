"""The operator library `isonet_fast`: every schema is defined from here, and the compiled library adds its kernels.

The PyTorch implementations are registered at CompositeExplicitAutograd, below every device's own key: the
dispatcher takes a compiled kernel wherever one exists for the device and PyTorch everywhere else. They are registered
a second time, as ops of `isonet_fast_pytorch`: a GPU that refuses the first launch of a kernel is served by those.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

COMPILED = Path(__file__).parent.parent / "_C.so"


def _load() -> str | None:
    """Load the compiled library; the reason why not, or None."""
    if torch.version.hip:
        return "ROCm: its devices are called cuda, but the kernels are CUDA's"
    if not COMPILED.exists():
        reason = COMPILED.with_suffix(".txt")  # written by setup.py
        why = f": {reason.read_text(encoding='utf-8').strip()}" if reason.exists() else ""
        return f"built without the compiled kernels{why} (pip install --no-build-isolation builds them)"
    try:
        torch.ops.load_library(COMPILED)
    except (OSError, RuntimeError) as error:
        return f"{COMPILED.name} does not load: {error}"
    return None


ops = torch.ops.isonet_fast
library = torch.library.Library("isonet_fast", "FRAGMENT")
in_pytorch = torch.library.Library("isonet_fast_pytorch", "DEF")
why_not_compiled = _load()
_warned: set[torch.device] = set()


def define(schema: str, tags: Sequence[torch.Tag] = ()) -> str:
    """Define the op, whose kernels may be there already. Returns its name."""
    name = schema.partition("(")[0]
    try:
        library.define(schema, tags=tags)
    except RuntimeError as error:  # a library of an early build defined its ops itself
        found = getattr(ops, name).default._schema
        if str(found) != f"isonet_fast::{schema}":
            raise ImportError(
                f"{COMPILED} was built from other sources than this package: it defines {found}, not {schema}; "
                "build it again: pip install --no-build-isolation ."
            ) from error
    return name


def implement(schema: str, tags: Sequence[torch.Tag] = ()) -> Callable:
    """Define the op; the decorated function is its PyTorch implementation."""
    name = define(schema, tags)
    in_pytorch.define(schema)

    def register(function: Callable) -> Callable:
        def instead(x: torch.Tensor, *arguments: Any) -> Any:
            _warn(x.device)
            return function(x, *arguments)

        library.impl(name, function, "CompositeExplicitAutograd")
        in_pytorch.impl(name, instead, "CompositeExplicitAutograd")
        return function

    return register


def _warn(device: torch.device) -> None:
    """Warn once per device that the op is right, but slow."""
    if device not in _warned:
        _warned.add(device)
        warnings.warn(f"isonet_fast: PyTorch serves SReLU on {device}: {_refusal(device)}", stacklevel=2)


def why_not(device: torch.device) -> str | None:
    """The reason why the compiled kernels do not serve this device, or None. On a GPU, it launches one to find out."""
    if not compiled_for(device.type):
        return why_not_compiled or "the compiled library has no kernels for this device"
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(action="ignore"):
        ops.srelu(torch.zeros(1, 1, device=device), torch.zeros(1, device=device))
    return _refusal(device)


def _refusal(device: torch.device) -> str | None:
    """What the first launch on this GPU failed with, if it was made and failed."""
    ask = ctypes.CDLL(str(COMPILED)).isonet_fast_refusal
    ask.restype = ctypes.c_char_p
    reason = ask(torch.cuda.current_device() if device.index is None and device.type == "cuda" else device.index or 0)
    return None if reason is None else f"its first launch failed: {reason.decode()}"


def compiled_for(device_type: str) -> bool:
    """Whether the compiled library holds kernels for this device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return (
        key is not None
        and why_not_compiled is None
        and torch._C._dispatch_has_kernel_for_dispatch_key("isonet_fast::srelu", key)
    )
