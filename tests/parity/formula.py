"""Weights, images and projections by formula: the same float64 values on every machine, with no random generator.

Integers are hashed exactly, so that nothing depends on a library's sine or on its random stream.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

BATCH, SIZE = 2, 64  # the last stage still has 2x2 pixels, so that every tap of a 3x3 kernel counts


def uniform(shape: tuple[int, ...], stream: int) -> Tensor:
    """Values in [-1, 1), multiples of 2^-30, from a hash of (stream, position)."""
    values = torch.arange(math.prod(shape), dtype=torch.int64) + stream * 1_000_003
    for h in values.split(2**15):  # what the cache holds
        for multiplier in (0x45D9F3B, 0x119DE1F3):  # below 2^31 each: no overflow of int64
            h.bitwise_xor_(h >> 16).mul_(multiplier).bitwise_and_(0x7FFFFFFF)
        h.bitwise_xor_(h >> 15)
    return values.double().div_(2**30).sub_(1).view(shape)


@torch.no_grad()
def fill_(model: nn.Module) -> None:
    """Near an isometry, yet generic: delta plus noise, biases that block some of the units, branches that count."""
    for stream, (name, p) in enumerate(model.named_parameters()):
        noise = uniform(tuple(p.shape), stream)
        if name.endswith("srelu_bias"):
            p.copy_(-0.6 + 0.4 * noise)
        elif name.endswith("scale"):
            p.copy_(0.1 + 0.08 * noise)
        elif name.endswith("bn.weight"):
            p.copy_(1 + 0.3 * noise)
        elif p.dim() == 1:  # of the classifier, a convolution or a normalisation
            p.copy_(0.1 * noise)
        elif name in ("head.fc.weight", "stem.conv.weight"):
            p.copy_(noise * math.sqrt(3 / p[0].numel()))
        else:
            nn.init.dirac_(p)
            p.add_(0.15 * noise * math.sqrt(3 / p[0].numel()))


def images() -> Tensor:
    return math.sqrt(3) * uniform((BATCH, 3, SIZE, SIZE), 1_000)


def labels() -> Tensor:
    return torch.tensor([17, 901])


@functools.lru_cache(maxsize=1)
def direction(size: int, stream: int) -> tuple[Tensor, Tensor]:
    """Generic values, and their norm. Kept for the next call: a gradient is followed by that of the penalty."""
    values = uniform((size,), 10_000 + stream)
    return values, values.norm().clamp_min(1e-300)


def measure(tensor: Tensor, stream: int) -> list[float]:
    """Norm, and projection on a generic direction of unit norm (a norm alone would not see a permutation)."""
    values, (along, norm) = tensor.flatten(), direction(tensor.numel(), stream)
    return [values.norm().item(), (values @ along / norm).item()]
