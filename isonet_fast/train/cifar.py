"""CIFAR-10 and CIFAR-100 from the files of their authors, the Python or the binary version; nothing is downloaded."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Files(NamedTuple):
    """Where one of the data sets lies, and how."""

    python: str  # directory of the Python version
    binary: str
    train: list[str]
    test: list[str]
    key: bytes  # of the labels in the Python version
    label_bytes: int  # per record of the binary version; the last one counts
    classes: int


FILES = {
    "cifar10": Files(
        "cifar-10-batches-py", "cifar-10-batches-bin", [f"data_batch_{n}" for n in range(1, 6)], ["test_batch"],
        b"labels", 1, 10,
    ),
    "cifar100": Files("cifar-100-python", "cifar-100-binary", ["train"], ["test"], b"fine_labels", 2, 100),
}  # fmt: skip
_PIXELS = 3 * 32 * 32


def load(name: str, directory: Path, train: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and their labels; FileNotFoundError says what to put where."""
    files = FILES[name]
    parts = files.train if train else files.test
    for root in (directory, directory / files.python):
        if all((root / part).is_file() for part in parts):
            return _join([_python(root / part, files) for part in parts])
    for root in (directory, directory / files.binary):
        if all((root / f"{part}.bin").is_file() for part in parts):
            return _join([_binary(root / f"{part}.bin", files) for part in parts])
    raise FileNotFoundError(
        f"no {name} in {directory}: expected {files.python}/ or {files.binary}/ there, unpacked from the archive of "
        "https://www.cs.toronto.edu/~kriz/cifar.html (nothing is downloaded for you)"
    )


def _join(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


def _binary(path: Path, files: Files) -> tuple[Tensor, Tensor]:
    record = files.label_bytes + _PIXELS
    content = np.fromfile(path, dtype=np.uint8)
    if not content.size or content.size % record:
        raise ValueError(f"{path} is damaged: {content.size} bytes are no whole number of records of {record}")
    rows = content.reshape(-1, record)
    return _checked(rows[:, files.label_bytes :], rows[:, files.label_bytes - 1], path, files)


def _python(path: Path, files: Files) -> tuple[Tensor, Tensor]:
    with open(path, "rb") as file:
        try:
            content = _ArraysOnly(file, encoding="bytes").load()
        except _Refused as error:
            raise ValueError(f"{path} is refused: {error}") from error
        except (pickle.UnpicklingError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict) or not {b"data", files.key} <= set(content):
        raise ValueError(f"{path} is no {files.classes}-class CIFAR batch: no {files.key.decode()} in it")
    return _checked(content[b"data"], np.array(content[files.key]), path, files)


def _checked(images: Any, labels: Any, path: Path, files: Files) -> tuple[Tensor, Tensor]:
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.shape != (len(labels), _PIXELS):
        raise ValueError(f"{path} is damaged: {len(labels)} labels beside {images.dtype} images of {images.shape}")
    if labels.min() < 0 or labels.max() >= files.classes:
        raise ValueError(f"{path} is damaged: labels reach {labels.max()}, there are {files.classes} classes")
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), torch.from_numpy(labels.astype(np.int64))


class _Refused(Exception):
    """A pickle that asks for more than arrays."""


class _ArraysOnly(pickle.Unpickler):
    """Unpickles plain values and NumPy arrays, and nothing that could run code."""

    _ALLOWED = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise _Refused(f"it asks for {module}.{name}; only arrays and plain values are read")
        if name == "_reconstruct":
            module = np.ndarray.__reduce__(np.empty(0))[0].__module__  # where this NumPy keeps it
        return super().find_class(module, name)
