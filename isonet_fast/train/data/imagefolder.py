"""`imagefolder:DIR`: DIR/train/CLASS/**/IMAGE and DIR/val/CLASS/**/IMAGE, of the same classes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..terminal import printable
from .images import EXTENSIONS, read_image
from .source import Source
from .transforms import evaluation, training

Images = dict[str, list[str]]  # paths by class


def imagefolder(directory: Path, size: int, evaluating: bool) -> Source:
    """When evaluating, the training images are not looked for.

    Names that begin with a dot are passed over. A folder without images is a class if the other part has it too.
    """
    parts = [directory / "val"] if evaluating else [directory / "val", directory / "train"]
    found = [images_of(part) for part in parts]
    names = [set(images) for images in found]
    if evaluating and (directory / "train").is_dir():
        names.append(set(class_folders(directory / "train")))
    common = set.intersection(*names)
    classes = [sorted(name for name in images if images[name] or name in common) for images in found]
    if classes[0] != classes[-1]:
        different = sorted(set(classes[0]) ^ set(classes[-1]))
        raise ValueError(f"{directory}: train and val differ in their classes: {', '.join(different[:5])}")
    val = ImageFolder(found[0], classes[0], evaluation(size))
    train = val if evaluating else ImageFolder(found[1], classes[0], training(size))
    empty = [str(part / name) for part, images in zip(parts, found, strict=True) for name in images if not images[name]]
    return Source(train, val, len(classes[0]), 3, _note(empty))


class ImageFolder:
    """Images and the positions of their classes in `classes`."""

    classes: Sequence[str]
    transform: Any
    samples: list[tuple[str, int]]  # paths and labels

    def __init__(self, images: Images, classes: Sequence[str], transform: Any) -> None:
        self.classes, self.transform = classes, transform
        self.samples = [(path, label) for label, name in enumerate(classes) for path in images.get(name, [])]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_image(path)), label


def images_of(part: Path) -> Images:
    """The images of each class folder; FileNotFoundError where there are none at all."""
    images = {name: list(images_in(part / name)) for name in class_folders(part)}
    if not any(images.values()):
        raise FileNotFoundError(f"no images in {part}; an imagefolder holds train/CLASS/ and val/CLASS/ with images")
    return images


def class_folders(part: Path) -> list[str]:
    """The names of the class folders, sorted: the order of the labels."""
    try:
        with os.scandir(part) as entries:
            inside = [entry for entry in entries if not entry.name.startswith(".")]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{error}; an imagefolder holds train/CLASS/ and val/CLASS/") from error
    above = _with_parents(part)
    return sorted(entry.name for entry in inside if _is_folder(entry) and os.path.realpath(entry.path) not in above)


def images_in(directory: Path) -> Iterable[str]:
    """Paths of the files under `directory` that are named like images, in the order of folders, then of names.

    Links are followed, but every folder is entered once, and none that `directory` lies in.
    """
    found: list[tuple[str, str]] = []
    entered = _with_parents(directory.parent) | _with_parents(directory.resolve().parent)
    pending = [str(directory)]
    while pending:
        folder = pending.pop()
        if (place := os.path.realpath(folder)) in entered:
            continue
        entered.add(place)
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    pending.append(entry.path)
                elif entry.name.lower().endswith(EXTENSIONS):
                    found.append((folder, entry.name))
    return (os.path.join(folder, name) for folder, name in sorted(found))


def _with_parents(directory: Path) -> set[str]:
    place = directory.resolve()
    return {str(place), *map(str, place.parents)}


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """False for a link that leads to itself, too."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _note(empty: list[str]) -> list[str]:
    if not empty:
        return []
    more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
    return [printable(f"no images in {', '.join(empty[:5])}{more}")]
