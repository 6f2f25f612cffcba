"""Image transforms: the arithmetic of torchvision's reference scripts, with the randomness handed in.

torchvision's own transforms draw from global generators, so that an image's crop depends on every image before it and
on the worker that loads it; here it depends on a `random.Random` of its own, and a run can resume anywhere. It also
spares a dependency: torchvision exists for one exact torch each.
"""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the channels
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
_BILINEAR = 2  # PIL.Image.BILINEAR; Pillow is imported where images are read
Box = tuple[int, int, int, int]  # left, top, right, bottom


def train_image(image: Image, size: int, rng: random.Random) -> Tensor:
    """Random resized crop, horizontal flip, tensor, normalised: float32 (3, size, size)."""
    image = image.crop(random_crop(*image.size, rng)).resize((size, size), _BILINEAR)
    x = to_tensor(image)
    return normalise(x.flip(-1) if rng.random() < 0.5 else x, *IMAGENET)


def eval_image(image: Image, size: int) -> Tensor:
    """Shorter side to size * 256 / 224, central crop, tensor, normalised: float32 (3, size, size)."""
    image = resize_shorter(image, round(size * 256 / 224))
    left, top = (round((n - size) / 2) for n in image.size)
    return normalise(to_tensor(image.crop((left, top, left + size, top + size))), *IMAGENET)


def random_crop(width: int, height: int, rng: random.Random) -> Box:
    """8 % to 100 % of the area, aspect 3/4 to 4/3; after ten failures the largest central crop of allowed aspect."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < low:
        h = round(width / low)
    elif width / height > high:
        w = round(height * high)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resize_shorter(image: Image, size: int) -> Image:
    width, height = image.size
    if width <= height:
        return image.resize((size, int(size * height / width)), _BILINEAR)
    return image.resize((int(size * width / height), size), _BILINEAR)


def to_tensor(image: Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(x: Tensor, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """uint8 (C, H, W) -> float32, ((x / 255) - mean) / deviation."""
    m, d = (torch.tensor(values).view(-1, 1, 1) for values in (mean, deviation))
    return x.contiguous().float().div_(255).sub_(m).div_(d)


def padded_crop(x: Tensor, padding: int, rng: random.Random) -> Tensor:
    """A random crop of the image's own size out of the image with `padding` black pixels around it, and a flip."""
    height, width = x.shape[1:]
    x = torch.nn.functional.pad(x, (padding,) * 4)
    top, left = rng.randint(0, 2 * padding), rng.randint(0, 2 * padding)
    x = x[:, top : top + height, left : left + width]
    return x.flip(-1) if rng.random() < 0.5 else x
