"""The operator library `isonet_fast`: the compiled kernels if they are there, the same schemas from Python if not.

The PyTorch implementations are registered at CompositeExplicitAutograd, below every device's own key: the
dispatcher takes a compiled kernel wherever one exists for the device and PyTorch everywhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

COMPILED = Path(__file__).parent.parent / "_C.so"

SCHEMAS = (
    "srelu(Tensor x, Tensor bias) -> Tensor",
    "srelu_(Tensor(a!) x, Tensor bias) -> ()",
    "srelu_backward(Tensor grad_output, Tensor output, Tensor bias) -> (Tensor, Tensor)",
    "residual_srelu(Tensor shortcut, Tensor branch, Tensor bias, Tensor? scale) -> Tensor",
    "residual_srelu_(Tensor shortcut, Tensor(a!) branch, Tensor bias, Tensor? scale) -> ()",
    "residual_srelu_backward(Tensor grad_output, Tensor output, Tensor branch, Tensor bias, Tensor scale)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


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
why_not_compiled = _load()
if why_not_compiled:
    for schema in SCHEMAS:
        library.define(schema)


def implement(name: str) -> Callable:
    """Register the decorated function as the PyTorch implementation of op `name`."""

    def register(function: Callable) -> Callable:
        library.impl(name, function, "CompositeExplicitAutograd")
        return function

    return register


def why_not(device_type: str) -> str | None:
    """Why the compiled library does not serve this device type, or None."""
    if compiled_for(device_type):
        return None
    return why_not_compiled or "the compiled library has no kernels for this device"


def compiled_for(device_type: str) -> bool:
    """Whether the compiled library holds kernels for this device type."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return (
        key is not None
        and why_not_compiled is None
        and torch._C._dispatch_has_kernel_for_dispatch_key("isonet_fast::srelu", key)
    )
