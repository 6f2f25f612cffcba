"""The official learning-rate schedule, one value per epoch."""

from __future__ import annotations

import torch

from .config import Schedule


def factor(epoch: int, schedule: Schedule) -> float:
    """What multiplies the learning rate in `epoch`, counted from 1: epoch / warmup while epoch < warmup, then gamma to
    the number of milestones passed."""
    if epoch < schedule.warmup:
        return epoch / schedule.warmup
    return schedule.gamma ** sum(epoch > milestone for milestone in schedule.milestones)


def apply(optimizer: torch.optim.Optimizer, base: list[float], epoch: int, schedule: Schedule) -> None:
    """Set every group's learning rate from its `base` one, so that the groups keep their ratio."""
    for group, lr in zip(optimizer.param_groups, base, strict=True):
        group["lr"] = lr * factor(epoch, schedule)
