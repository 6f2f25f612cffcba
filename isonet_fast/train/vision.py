"""`imagefolder:DIR`, `cifar10:DIR`, `cifar100:DIR`: torchvision's data sets, the transforms of its reference scripts.

Imported only where one of them is asked for: everything else works without torchvision. Nothing is downloaded.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .datasets import Corrupt, Source
from .import_torchvision import import_torchvision

import_torchvision()  # first, for it says what to install
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and deviation of the channels
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


def imagefolder(directory: Path, size: int, evaluating: bool) -> Source:
    """DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, of the same classes (evaluating: val alone is looked at)."""
    val = ImageFolder(directory / "val", evaluation(size))
    train = val if evaluating else ImageFolder(directory / "train", training(size))
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{directory}: train and val differ in their classes: {', '.join(different[:5])}")
    return Source(train, val, len(val.classes), 3)


def training(size: int) -> v2.Compose:
    """8 % to 100 % of the area, aspect 3/4 to 4/3, resized to size x size; flipped or not."""
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *_normalised(*IMAGENET)])


def evaluation(size: int) -> v2.Compose:
    """The shorter side to size * 256 / 224, the centre of it."""
    shorter = round(size * 256 / 224)
    return v2.Compose([v2.Resize(shorter, antialias=True), v2.CenterCrop(size), *_normalised(*IMAGENET)])


def _normalised(mean: tuple[float, ...], deviation: tuple[float, ...]) -> list[Any]:
    """Image -> float32 (3, H, W)."""
    return [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, deviation)]


class ImageFolder(datasets.ImageFolder):
    """torchvision's, with `Corrupt` for an image that cannot be read."""

    def __init__(self, directory: Path, transform: v2.Compose) -> None:
        try:
            super().__init__(directory, transform)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{error}; an imagefolder holds train/CLASS/ and val/CLASS/") from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, _ = self.samples[index]
        try:
            return super().__getitem__(index)
        except OSError as error:
            if error.errno is not None:  # the disk or the system, not the image: must not pass unseen
                raise
            raise Corrupt(path, str(error)) from None
        except (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise Corrupt(path, f"{type(error).__name__}: {error}") from None


# Of our own name, so that a worker process that unpickles one comes by import_torchvision.
class CIFAR10(datasets.CIFAR10):
    pass


class CIFAR100(datasets.CIFAR100):
    pass


def cifar(kind: str, directory: Path, evaluating: bool) -> Source:
    """cifar10 or cifar100 out of its unpacked archive, which lies in `directory` or is it.

    The files are pickles, and a pickle can run anything: torchvision compares the MD5 sum of every file with that of
    the authors' archive and reads none that differs.
    """
    data_set: type[datasets.CIFAR10] = CIFAR10 if kind == "cifar10" else CIFAR100
    directory = directory.resolve()
    root = directory.parent if directory.name == data_set.base_folder else directory
    augmented = v2.Compose([v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip(), *_normalised(*CIFAR)])
    try:
        val = data_set(root, train=False, transform=v2.Compose(_normalised(*CIFAR)))
        train = val if evaluating else data_set(root, train=True, transform=augmented)
    except RuntimeError as error:  # that of a sum, which offers a download
        raise FileNotFoundError(
            f"no {kind} in {directory}: {_differing(data_set, root)} is missing or not that of the authors; expected "
            f"{data_set.base_folder}/ there as the archive {data_set.url} unpacks it (nothing is downloaded for you)"
        ) from error
    return Source(train, val, len(val.classes), 3)


def _differing(data_set: type[datasets.CIFAR10], root: Path) -> str:
    """The first file that is not there or does not have its MD5 sum."""
    sums = [*data_set.train_list, *data_set.test_list, (data_set.meta["filename"], data_set.meta["md5"])]
    directory = root / data_set.base_folder
    return next((name for name, md5 in sums if not check_integrity(directory / name, md5)), "a file")
