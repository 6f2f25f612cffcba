"""The data sets: `imagefolder:DIR`, `cifar10:DIR`, `cifar100:DIR`, `digits[:SIZE]`, `synthetic[:IMAGES]`.

Each gives an example by its index. The augmentation draws from torch's generator, which the loader seeds anew for each
example. So it is the same image in whatever order, worker or run it is asked for.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from ...import_torchvision import import_torchvision
from ..config import Data
from ..paths import user_path
from .digits import digits
from .source import Source

KINDS = ("imagefolder", "cifar10", "cifar100", "digits", "synthetic")


def open_source(config: Data, seed: int, evaluating: bool = False) -> Source:
    """The data set of `config.source`; ValueError or FileNotFoundError say what is wrong with it.

    When evaluating, the training part is not looked for: `train` is `val` again.
    """
    kind, _, argument = config.source.partition(":")
    if kind not in KINDS:
        given = f"unknown data set {config.source!r}" if config.source else "no data set given"
        raise ValueError(
            f"{given}; use --data imagefolder:DIR, cifar10:DIR, cifar100:DIR, digits[:SIZE] or synthetic[:IMAGES]"
        )
    if kind in ("imagefolder", "cifar10", "cifar100") and not argument:
        raise ValueError(f"{kind} needs a directory: --data {kind}:DIR")
    if kind == "digits":
        images, labels, *test = digits(size=_positive("digits:SIZE needs a size in pixels", argument or "16"))
        return Source(TensorDataset(images, labels), TensorDataset(*test), 10, 1)
    if kind == "synthetic":
        return synthetic(argument, config.image_size, seed)
    import_torchvision()  # the others do without it; this says what to install
    from .cifar import cifar
    from .imagefolder import imagefolder

    directory = user_path(argument)
    if kind == "imagefolder":
        return imagefolder(directory, config.image_size, evaluating)
    return cifar(kind, directory, evaluating)


class Synthetic:
    """Noise around one pattern per class: learnable, of any size, for tests and benchmarks."""

    CLASSES = 10

    count: int
    size: int
    seed: int
    patterns: Tensor  # one for each class

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.patterns = torch.randn(self.CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed + index)
        label = index % self.CLASSES
        return self.patterns[label] + torch.randn(3, self.size, self.size, generator=generator), label


def _positive(what: str, text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"{what}, got {text!r}")
    return int(text)


def synthetic(argument: str, size: int, seed: int) -> Source:
    count = _positive("synthetic:IMAGES needs a positive number of images", argument or "1024")
    train = Synthetic(count, size, seed * 1_000_003)
    return Source(train, Synthetic(max(1, count // 4), size, seed * 1_000_003 + count), Synthetic.CLASSES, 3)
