"""Mixup (Zhang, Cisse, Dauphin, Lopez-Paz, ICLR 2018): training on weighted means of two images and of their labels."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Mixed(NamedTuple):
    """share * (image, label) + (1 - share) * (image, label) of the partner; share is at least a half."""

    images: Tensor
    labels: Tensor
    partners: Tensor  # their labels
    share: float

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy with the mixed labels."""
        own = F.cross_entropy(logits, self.labels)
        if self.share == 1:
            return own
        return self.share * own + (1 - self.share) * F.cross_entropy(logits, self.partners)


def mixup(images: Tensor, labels: Tensor, alpha: float, seed: str) -> Mixed:
    """x = l x_i + (1 - l) x_j, y = l y_i + (1 - l) y_j (equation 1) with l from Beta(alpha, alpha), one l a batch, and
    j from a random order of the batch. alpha = 0: l = 1, nothing is mixed.

    l and 1 - l are equally likely, and so are an order and its inverse. So the larger one is taken for l: then `labels`
    have the larger share, and training accuracy can be counted with them.
    """
    if alpha == 0:
        return Mixed(images, labels, labels, 1.0)
    drawn = random.Random(seed)
    share = drawn.betavariate(alpha, alpha)
    share = max(share, 1 - share)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(drawn.getrandbits(63)))
    order = order.to(labels.device)
    return Mixed(share * images + (1 - share) * images[order], labels, labels[order], share)
