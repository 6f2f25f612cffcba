"""How isometric a network is: the spread of its singular values, and the gradient at its first and its last layer."""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...diagnostics import singular_values


class Isometry(NamedTuple):
    smallest: float  # singular value
    largest: float
    gradient: float


def isometry(model: nn.Module, images: Tensor, labels: Tensor) -> Isometry:
    """The singular values are those of every square 3x3 convolution at stride 1, on an 8x8 grid: a layer of another
    shape may not have an isometry within reach. gradient: see `gradient_ratio`."""
    layers = [
        module
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
        and module.in_channels == module.out_channels
        and (*module.stride, *module.kernel_size) == (1, 1, 3, 3)
    ]
    values = torch.cat([singular_values(layer, 8) for layer in layers])
    return Isometry(values.min().item(), values.max().item(), gradient_ratio(model, images, labels))


def gradient_ratio(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The norm of the loss's gradient with respect to the stem's output over that to the last block's output: 1 where
    the layers between, backwards, keep it. NaN where both are 0. On a copy in training mode: the model stays as it is.
    """
    model = copy.deepcopy(model).train()
    norms: dict[str, float] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            output.register_hook(lambda gradient: norms.update({name: gradient.norm().item()}))
            return output

        model.get_submodule(name).register_forward_hook(hook)

    last = [name for name, _ in model.named_children() if name != "head"][-1]
    watch("stem")
    watch(last)
    F.cross_entropy(model(images).float(), labels).backward()
    return norms["stem"] / norms[last] if norms[last] else math.nan
