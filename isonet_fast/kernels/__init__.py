"""Triton kernels for the orthogonality penalty. Importable without Triton; `unavailable` says why it can't serve."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..geometry import Layer, shard

_reasons: dict[torch.device, str | None] = {}


def unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels can't serve this device, or None. The first question launches the kernels once.

    Raises torch.cuda.OutOfMemoryError where that finds no memory: it would say nothing of the next time.
    """
    if device.type != "cuda":
        return f"the Triton kernels need a CUDA device, not {device.type}"
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    if device not in _reasons:
        if torch.cuda.is_current_stream_capturing():
            return "the Triton kernels were not tried before this CUDA graph capture"
        _reasons[device] = _probe(device)
    return _reasons[device]


def _probe(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the Triton kernels have not been tried on ROCm"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the Triton kernels need compute capability 8.0, this device has {capability[0]}.{capability[1]}"
    watched = torch.cuda.get_sync_debug_mode() if torch.cuda.is_initialized() else 0
    if watched:
        torch.cuda.set_sync_debug_mode(0)  # this one time the host has to wait
    try:
        with _disable_current_modes(), torch.no_grad():  # the question may come while shapes are traced
            return _launch(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # no compiler, an unwritable cache, a missing library: all end here
        lines = str(error).strip().splitlines() or [""]
        return f"Triton can't run here: {type(error).__name__}: {lines[0][:200]}"
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode(watched)


def _launch(device: torch.device) -> str | None:
    """A real loss and gradient, of twice the identity: the penalty is 1/2 (4 - 1)^2 per row, its gradient 12."""
    from . import orthogonality

    rows = 16
    weight = 2 * torch.eye(rows, dtype=torch.float32, device=device)
    arguments = (Layer((rows, rows), (), (), 1, "isonet"),), (1.0,), None
    offsets = shard(arguments[0], 0, 1)
    loss, _, saved = orthogonality.forward([weight], *arguments, offsets, True)
    (grad,) = orthogonality.backward(torch.ones_like(loss), saved, [weight], *arguments, offsets)
    if loss.item() != rows * 4.5 or not torch.equal(grad, 6 * weight):
        return f"the Triton kernels computed {loss.item()} where {rows * 4.5} is right"
    return None
