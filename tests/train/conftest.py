"""A run small enough for a test: a network of 8 layers and width 4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isonet_fast.train import config
from isonet_fast.train.config import Config

SMALL = ["model.name=isonet_cifar", "model.depth=8", "model.width=4", "device=cpu", "data.workers=0"]


@pytest.fixture
def small() -> Callable[..., Config]:
    def build(*settings: str) -> Config:
        fast = ["data.source=synthetic:48", "data.image_size=8", "data.batch_size=8", "data.eval_batch_size=12"]
        return config.load(None, [*SMALL, *fast, "schedule.epochs=2", "schedule.warmup=0", *settings])

    return build


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Real photographs (see `photographs_in`), one of them cut off in the middle."""
    photographs_in(tmp_path / "images")
    broken = tmp_path / "images" / "train" / "dog" / "4.jpg"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) * 3 // 4])
    return tmp_path / "images"


def photographs_in(root: Path) -> None:
    """train/ and val/ of two classes, JPEG files of several sizes."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 9), ("val", 3)):
        for label, name in enumerate(("cat", "dog")):
            directory = root / part / name
            directory.mkdir(parents=True)
            for n in range(count):
                height, width = 30 + 7 * n, 60 - 4 * n
                pixels = torch.randint(0, 200, (height, width, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray((pixels + 55 * label).numpy()).save(directory / f"{n}.jpg")


def folder(part: Path, transform: Any = None) -> Any:
    """The images of DIR/train or DIR/val."""
    from isonet_fast.train.data.imagefolder import ImageFolder, class_folders, images_of
    from isonet_fast.train.data.transforms import evaluation

    return ImageFolder(images_of(part), class_folders(part), transform or evaluation(16))
