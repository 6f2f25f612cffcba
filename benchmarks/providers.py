"""What is compared: the official arithmetic, the authors' own code, torch.compile, bounds that no code can beat."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from isonet_fast import OrthoConv2d, models
from isonet_fast.models import official

from .harness import Contender


def official_srelu(x: Tensor, bias: Tensor) -> Tensor:
    """relu(x - b) + b. A float32 bias promotes half precision; the cast is the next convolution's under autocast."""
    return official.srelu(x, bias.view(1, -1, 1, 1)).to(x.dtype)


def official_join(shortcut: Tensor, branch: Tensor, bias: Tensor, scale: Tensor | None = None) -> Tensor:
    total = shortcut + (branch if scale is None else branch * scale)
    return official.srelu(total, bias.view(1, -1, 1, 1)).to(shortcut.dtype)


def official_penalty_on_device(model: nn.Module) -> Tensor:
    """The official penalty, its identities built on the device: 108 to 234 MB less to copy at every step."""
    return official.official_penalty(model, next(model.parameters()).device)


def compiled(function: Callable, dry: bool, mode: str | None = None) -> Callable:
    """torch.compile for static shapes; a dry run proves that the whole function is one graph, and generates no code.

    The harness captures the result in a CUDA graph itself, so the modes to ask for are those without.
    """
    torch.compiler.reset()  # a recompilation limit shared by earlier shapes must not send this one to eager
    if dry:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def copy_bound(bytes: float, device: torch.device, calls: int = 1) -> Contender:
    """copy_ that reads and writes `bytes` altogether, through as many buffers as the providers rotate."""
    half = max(1, int(bytes) // 2)
    # random: zeros can be faster to move
    pairs = [[torch.randint(256, (half,), dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(calls)]

    def run() -> None:
        for source, target in pairs:
            target.copy_(source)

    return Contender("copy", run, calls=calls, bytes=bytes)


def matmul_bound(flops: float, dtype: torch.dtype, device: torch.device) -> Contender:
    """One product of these FLOPs, as near to a cube as multiples of 64 allow."""
    side = max(64, round((flops / 2) ** (1 / 3) / 64) * 64)
    depth = max(64, round(flops / 2 / side**2 / 64) * 64)
    a = torch.randn(side, depth, dtype=dtype, device=device)
    b = torch.randn(depth, side, dtype=dtype, device=device)
    out = torch.empty(side, side, dtype=dtype, device=device)
    return Contender("matmul", lambda: torch.mm(a, b, out=out), flops=2.0 * side**2 * depth)


class OfficialRepo:
    """The authors' own code, from a clone of github.com/HaozhiQi/ISONet. It configures itself through one global."""

    def __init__(self, path: Path) -> None:
        if not (path / "isonet" / "models" / "isonet.py").exists():
            raise SystemExit(f"--official-repo {path}: give a clone of HaozhiQi/ISONet (isonet/models/isonet.py)")
        sys.path.insert(0, str(path))
        try:
            self.module: ModuleType = __import__("isonet.models.isonet", fromlist=["ISONet"])
        except ModuleNotFoundError as missing:
            raise SystemExit(f"--official-repo: its code needs the package {missing.name}") from missing
        self.path = path
        self.config: Any = self.module.C
        self.defaults = self.config.clone()

    def network(self, name: str, like: nn.Module) -> nn.Module:
        """The official network `isonet50`, `risonet50`, ... with the weights, dtype and device of `like`.

        Its forward pass reads the global configuration: use one network at a time.
        """
        residual, depth = name.startswith("r"), name.removeprefix("r").removeprefix("isonet")
        self.config.merge_from_other_cfg(self.defaults)
        self.config.merge_from_file(str(self.path / "configs" / f"IN1k-{'R' if residual else ''}ISO{depth}.yaml"))
        self.config.ISON.DROPOUT = False  # as in `build`
        network = self.module.ISONet()
        network.load_state_dict(like.state_dict())
        parameter = next(like.parameters())
        return network.to(parameter.device, parameter.dtype)

    def penalty(self, network: Any) -> Tensor:
        """ISONet.ortho(), whose device is fixed to CUDA; the same sum over its layers elsewhere."""
        device = next(network.parameters()).device
        if device.type == "cuda":
            return network.ortho()
        layers = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        kept = [m for m in layers if m.kernel_size != (7, 7) and m.weight.shape[1] != 3]
        return sum((network.ortho_conv(m, device) for m in kept), torch.zeros((), device=device))


def build(name: str) -> nn.Module:
    """A network by its name: isonet50, risonet50, cifar32 (isonet_cifar of depth 32), cifar32x4 (4 times as wide),
    kernel5 (5x5 convolutions of 64, 128 and 256 channels).

    Without dropout: its noise would hide errors.
    """
    if name.startswith("kernel"):
        size = int(name.removeprefix("kernel"))
        channels = (64, 64, 64, 128, 128, 256, 256)
        return nn.Sequential(*(OrthoConv2d(i, o, size, padding=size // 2) for i, o in itertools.pairwise(channels)))
    if not name.startswith("cifar"):
        return getattr(models, name)(dropout=0.0)
    depth, _, width = name.removeprefix("cifar").partition("x")
    return models.isonet_cifar(int(depth), width=16 * int(width or 1))


def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Away from the delta initialisation, where the penalty and its gradient are exactly 0 and prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("shared_scalar.scale"):
                parameter.fill_(0.1)
            elif parameter.dim() == 4 and parameter.shape[0] > 1:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1 / parameter[0].numel() ** 0.5
                parameter += noise.to(parameter)
    return model
