"""Which implementation serves each op on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable

import torch

from . import kernels
from ._version import __version__
from .functional import orthogonality_loss, srelu
from .ops import library


def describe() -> dict[str, str]:
    """Versions, and for each device what computes each op, after a real launch."""
    rows = {
        "isonet_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu threads": str(torch.get_num_threads()),
    }
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        rows["gpu"] = torch.cuda.get_device_name()
        devices.append(torch.device("cuda", torch.cuda.current_device()))
    for device in devices:
        rows[f"srelu, residual_srelu on {device.type}"] = _probe(device, _elementwise(device), _launch_elementwise)
        rows[f"orthogonality_loss on {device.type}"] = _probe(device, _matrix(device), _launch_matrix)
    return rows


def info() -> None:
    """Print which implementation serves each op on this machine, and why, after probing a real launch.

    Examples:
        >>> isonet_fast.info()
        isonet_fast ...
        python ...
        torch ...
        orthogonality_loss on ...
    """
    rows = describe()
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _elementwise(device: torch.device) -> str:
    if why := library.why_not(device):
        return f"PyTorch: {why}"
    return "CUDA kernels (csrc)" if device.type == "cuda" else "C++ kernels (csrc)"


def _matrix(device: torch.device) -> str:
    if device.type != "cuda":
        small = "C++ kernel (csrc) for small float32 layers, otherwise " if library.compiled_for(device.type) else ""
        return f"{small}closed form"
    try:
        why = kernels.why_not(device)
    except torch.cuda.OutOfMemoryError:
        return "not known: no memory is left to try the Triton kernels"
    return f"closed form: {why}" if why else "Triton kernels"


def _launch_elementwise(device: torch.device) -> None:
    x = torch.tensor([[-2.0, 0.5]], device=device)
    y = srelu(x, torch.full((2,), -1.0, device=device))
    assert y.tolist() == [[-1.0, 0.5]], y


def _launch_matrix(device: torch.device) -> None:
    loss = orthogonality_loss(2 * torch.eye(4, device=device))  # 4 I - I: 1/2 * 4 * 3^2
    assert abs(loss.item() - 18.0) < 1e-3, loss


def _probe(device: torch.device, served_by: str, launch: Callable[[torch.device], None]) -> str:
    try:
        launch(device)
    except Exception as error:  # whatever a driver, a compiler or a library throws belongs in the report
        return f"FAILS: {served_by}: {type(error).__name__}: {error}"
    return served_by
