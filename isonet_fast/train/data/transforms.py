"""What is done to an image before it is an example: the transforms of torchvision's reference scripts."""

from __future__ import annotations

from typing import Any

import torch

from ...import_torchvision import import_torchvision
from ...models.image_statistics import CIFAR, IMAGENET

import_torchvision()  # first, because it says what to install
from torchvision.transforms import v2


def training(size: int) -> v2.Compose:
    """8 % to 100 % of the area, aspect 3/4 to 4/3, resized to size x size; flipped or not."""
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *normalised(*IMAGENET)])


def evaluation(size: int) -> v2.Compose:
    """The shorter side to size * 256 / 224, the centre of it."""
    shorter = round(size * 256 / 224)
    resized = [v2.Lambda(no_strip), v2.Resize(shorter, antialias=True)]
    return v2.Compose([*resized, v2.CenterCrop(size), *normalised(*IMAGENET)])


def no_strip(image: Any) -> Any:
    """The middle of an image that is more than 64 times as long as wide: resized whole, one of 1 x 65,000 pixels would
    take 13 GB."""
    width, height = image.size
    longest = 64 * min(width, height)
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def normalised(mean: tuple[float, ...], deviation: tuple[float, ...]) -> list[Any]:
    """Image -> float32 (3, H, W)."""
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)]


def cifar_training() -> v2.Compose:
    """32 x 32 out of a margin of four black pixels; flipped or not."""
    return v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *normalised(*CIFAR)])


def cifar_evaluation() -> v2.Compose:
    return v2.Compose(normalised(*CIFAR))
