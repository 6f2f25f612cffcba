"""`cifar10:DIR` and `cifar100:DIR`: the authors' archives, unpacked by you. Nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from .source import Source
from .transforms import cifar_evaluation, cifar_training  # first, because it calls import_torchvision

# isort: split
from torchvision import datasets
from torchvision.datasets.utils import check_integrity


# A name in this module, so that a worker process that unpickles one calls import_torchvision first.
class CIFAR10(datasets.CIFAR10):
    pass


class CIFAR100(datasets.CIFAR100):
    pass


def cifar(kind: str, directory: Path, evaluating: bool) -> Source:
    """cifar10 or cifar100 from its unpacked archive, which is `directory` or lies in it.

    The files are pickles, and a pickle can run anything: torchvision compares the MD5 sum of every file with that of
    the authors' archive and reads none that differs.
    """
    data_set: type[datasets.CIFAR10] = CIFAR10 if kind == "cifar10" else CIFAR100
    directory = directory.resolve()
    root = directory.parent if directory.name == data_set.base_folder else directory
    try:
        val = data_set(root, train=False, transform=cifar_evaluation())
        train = val if evaluating else data_set(root, train=True, transform=cifar_training())
    except RuntimeError as error:  # about an MD5 sum; torchvision's message offers a download
        raise FileNotFoundError(
            f"no {kind} in {directory}: {_differing(data_set, root)} is missing or not that of the authors; expected "
            f"{data_set.base_folder}/ there as the archive {data_set.url} unpacks it (nothing is downloaded for you)"
        ) from error
    return Source(train, val, len(val.classes), 3)


def _differing(data_set: type[datasets.CIFAR10], root: Path) -> str:
    """The first file that is missing or does not have its MD5 sum."""
    sums = [*data_set.train_list, *data_set.test_list, (data_set.meta["filename"], data_set.meta["md5"])]
    directory = root / data_set.base_folder
    return next((name for name, md5 in sums if not check_integrity(directory / name, md5)), "a file")
