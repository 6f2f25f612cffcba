"""The data sets: `imagefolder:DIR`, `cifar10:DIR`, `cifar100:DIR`, `digits`, `synthetic[:IMAGES]`.

Each gives an example by its index and a `random.Random` of that example alone (None when evaluating): the same image in
whatever order, worker or run it is asked for.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from . import cifar, transforms
from .config import Data
from .digits import digits

KINDS = ("imagefolder", "cifar10", "cifar100", "digits", "synthetic")
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"}


class Corrupt(Exception):
    """An example that cannot be read; picklable, for it crosses from a worker."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} ({self.reason})"


class Examples(Protocol):
    def __len__(self) -> int: ...

    def example(self, index: int, rng: random.Random | None) -> tuple[Tensor, int]:
        """float32 (C, H, W) and its label; raises Corrupt."""


@dataclass
class Source:
    train: Examples
    val: Examples
    num_classes: int
    channels: int


def open_source(config: Data, seed: int, evaluating: bool = False) -> Source:
    """The data set of `config.source`; ValueError or FileNotFoundError say what is wrong with it.

    When evaluating, the training part is not looked for: `train` is `val` again.
    """
    kind, _, argument = config.source.partition(":")
    if kind not in KINDS:
        given = f"unknown data set {config.source!r}" if config.source else "no data set given"
        raise ValueError(
            f"{given}; use --data imagefolder:DIR, cifar10:DIR, cifar100:DIR, digits or synthetic[:IMAGES]"
        )
    if kind in ("imagefolder", "cifar10", "cifar100") and not argument:
        raise ValueError(f"{kind} needs a directory: --data {kind}:DIR")
    if kind == "digits":
        images, labels, *test = digits()
        return Source(Tensors(images, labels), Tensors(test[0], test[1]), 10, 1)
    if kind == "synthetic":
        return synthetic(argument, config.image_size, seed)
    directory = Path(argument).expanduser()
    if kind == "imagefolder":
        return _imagefolder(directory, config.image_size, evaluating)
    val = Tensors(*cifar.load(kind, directory, train=False), augmented=_cifar)
    train = val if evaluating else Tensors(*cifar.load(kind, directory, train=True), augmented=_cifar)
    return Source(train, val, cifar.FILES[kind].classes, 3)


def _imagefolder(directory: Path, size: int, evaluating: bool) -> Source:
    val = ImageFolder(directory / "val", size)
    train = val if evaluating else ImageFolder(directory / "train", size)
    if train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"{directory}: train and val differ in their classes: {', '.join(different[:5])}")
    return Source(train, val, len(val.classes), 3)


class Tensors:
    """Images in memory; `augmented(image, rng)` makes an example of one."""

    def __init__(
        self, images: Tensor, labels: Tensor, augmented: Callable[[Tensor, random.Random | None], Tensor] | None = None
    ) -> None:
        self.images, self.labels, self.augmented = images, labels.tolist(), augmented

    def __len__(self) -> int:
        return len(self.labels)

    def example(self, index: int, rng: random.Random | None) -> tuple[Tensor, int]:
        image = self.images[index]
        return (image if self.augmented is None else self.augmented(image, rng)), self.labels[index]


def _cifar(image: Tensor, rng: random.Random | None) -> Tensor:
    """Random crop with four pixels of padding and flip when training; normalised."""
    return transforms.normalise(image if rng is None else transforms.padded_crop(image, 4, rng), *transforms.CIFAR)


class ImageFolder:
    """DIR/CLASS/**/IMAGE, classes in alphabetical order; read with Pillow."""

    def __init__(self, directory: Path, size: int) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("images are read with Pillow: pip install 'isonet_fast[vision]'") from error
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory} is no directory; an imagefolder holds train/CLASS/ and val/CLASS/")
        self.size = size
        self.classes = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
        self.files = [
            (str(path), label)
            for label, name in enumerate(self.classes)
            for path in sorted((directory / name).rglob("*"))
            if path.suffix.lower() in _EXTENSIONS and path.is_file()
        ]
        empty = set(range(len(self.classes))) - {label for _, label in self.files}
        if not self.classes or empty:
            where = directory / self.classes[min(empty)] if self.classes else directory
            raise FileNotFoundError(f"no images in {where}; an imagefolder holds train/CLASS/ and val/CLASS/")

    def __len__(self) -> int:
        return len(self.files)

    def example(self, index: int, rng: random.Random | None) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
            if rng is None:
                return transforms.eval_image(image, self.size), label
            return transforms.train_image(image, self.size, rng), label
        except OSError as error:
            if error.errno is not None:  # the disk or the system, not the image: must not pass unseen
                raise
            raise Corrupt(path, str(error)) from None
        except (SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
            raise Corrupt(path, f"{type(error).__name__}: {error}") from None


class Synthetic:
    """Noise around one pattern per class: learnable, of any size, for tests and benchmarks."""

    CLASSES = 10

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.patterns = torch.randn(self.CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def example(self, index: int, rng: random.Random | None) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed + index)
        label = index % self.CLASSES
        return self.patterns[label] + torch.randn(3, self.size, self.size, generator=generator), label


def synthetic(argument: str, size: int, seed: int) -> Source:
    if argument and not (argument.isdecimal() and int(argument) > 0):
        raise ValueError(f"synthetic:IMAGES needs a positive number of images, got {argument!r}")
    count = int(argument or 1024)
    train = Synthetic(count, size, seed * 1_000_003)
    return Source(train, Synthetic(max(1, count // 4), size, seed * 1_000_003 + count), Synthetic.CLASSES, 3)
