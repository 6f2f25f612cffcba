"""A network's loss and accuracies over images that it was not trained on."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .build import autocast
from .config import Config
from .data.loader import Loader
from .data.source import Corrupt
from .metrics import Sums


def to_device(images: Tensor, labels: Tensor, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)


@torch.no_grad()
def validate(
    model: nn.Module, loader: Loader, config: Config, device: torch.device, stand_in: Tensor | None = None
) -> tuple[Sums, list[Corrupt]]:
    """Loss and accuracies over this process's part of the loader, in eval mode, and the images that could not be read.

    stand_in: images for a process that has none of its own, where the weights are sharded, because every forward pass
    needs all processes.
    """
    model.eval()
    sums = Sums(device)
    corrupt: list[Corrupt] = []
    for batch in loader.batches():
        corrupt += batch.corrupt
        if batch.images is None:
            if stand_in is not None:
                model(stand_in)
            continue
        x, y = to_device(batch.images, batch.labels, config, device)
        with nullcontext() if stand_in is not None else autocast(config.precision, device):
            logits = model(x)
        sums.add(logits, y, F.cross_entropy(logits.float(), y))
    return sums, corrupt
