"""Triton kernels for the orthogonality penalty. Importable without Triton; `why_not` says why they can't serve."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .. import reference
from ..geometry import Layer
from ..problem import Problem

PROBED = (((128, 256, 3, 3), (16, 16, 33, 1)), ((64, 64, 3, 3),))  # beside the others, small tiles would not pay
GRADIENT_TOLERANCE = 2e-2  # bfloat16 products are off by 5e-3

_reasons: dict[torch.device, str | None] = {}


def why_not(device: torch.device) -> str | None:
    """Why the Triton kernels can't serve this device, or None. The first question launches the kernels once.

    Raises torch.cuda.OutOfMemoryError if the launch runs out of memory. That is not kept: a later call may succeed.
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
    if capability[0] == 11:  # tcgen05, for which two products into one accumulator are miscompiled (triton #10821)
        return f"the Triton kernels have no tiles for compute capability {capability[0]}.{capability[1]}"
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
    """Check loss and gradient of random layers against their definition. The layers need every tile size, several taps
    and chunks, and R transposed: a compiler's mistake shows in some of these and in nothing smaller."""
    return next(filter(None, (_compare(device, shapes) for shapes in PROBED)), None)


def _compare(device: torch.device, shapes: tuple[tuple[int, ...], ...]) -> str | None:
    from . import orthogonality

    layers = tuple(Layer(shape, (1, 1), (1, 1), 1, "isonet") for shape in shapes)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(layer.shape, generator=generator) / layer.columns**0.5 for layer in layers]
    problem = Problem(layers, (1.0,) * len(layers))
    there = [weight.to(device) for weight in weights]
    loss, losses, saved = orthogonality.forward(there, problem, True)
    grads = orthogonality.backward(torch.ones_like(loss), saved, there, problem)
    for layer, weight, penalty, grad in zip(layers, weights, losses.tolist(), grads, strict=True):
        with torch.enable_grad():
            wanted = reference.orthogonality_loss(weight.requires_grad_())
            (gradient,) = torch.autograd.grad(wanted, weight)
        of = f"of a weight of shape {layer.shape}"
        if not abs(penalty - wanted.item()) <= 1e-3 * wanted.item():
            return f"the Triton kernels computed the penalty {penalty} {of}, where {wanted.item()} is right"
        error = ((grad.cpu() - gradient).norm() / gradient.norm()).item()
        if not error <= GRADIENT_TOLERANCE:
            return f"the Triton kernels computed a gradient {of} that is {error:.0%} off"
    return None
