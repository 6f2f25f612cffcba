"""The data: order, augmentation and workers never change an example; CIFAR is read safely."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from isonet_fast.train.config import Config, Data
from isonet_fast.train.data.datasets import Synthetic, open_source
from isonet_fast.train.data.loader import Loader, WorkerDied, naming_dead_workers

from .conftest import folder

# torchvision is imported where it is needed: a GPU machine without it collects this file, and runs none of these tests.


@pytest.fixture
def transforms() -> ModuleType:
    from isonet_fast.train.data import transforms

    return transforms


# -- order ---------------------------------------------------------------


def loader(config: Config, workers: int = 0) -> Loader:
    source = open_source(config.data, config.seed)
    return Loader(source.train, config.data.batch_size, workers, config.seed, True, False)


def test_an_epoch_sees_every_image_once_and_the_next_in_another_order(small: Callable[..., Config]) -> None:
    order = loader(small()).order
    epochs = []
    for epoch in (1, 2):
        order.epoch = epoch
        epochs.append([index for batch in order for _, index in batch])
        assert sorted(epochs[-1]) == list(range(48))
    assert epochs[0] != epochs[1]
    assert len(loader(small("data.batch_size=10")).order) == 4  # the rest is dropped


def test_a_started_epoch_goes_on_where_it_was(photographs: Path, transforms: ModuleType) -> None:
    """The same batches from position 2 on, with workers or without, with their random crops."""
    images = folder(photographs / "train", transforms.training(24))
    kinds = [Loader(images, 4, workers, 7, True, False) for workers in (0, 1, 2)]
    whole = list(kinds[0].batches(3))
    for kind in kinds:
        part = list(kind.batches(3, 8))
        assert len(part) == len(whole) - 2 == 2
        for a, b in zip(whole[2:], part, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    following = [next(iter(list(kind.batches(4)))).images for kind in kinds]  # the workers live on
    assert torch.equal(following[0], following[1]) and torch.equal(following[0], following[2])


def test_an_augmentation_follows_from_seed_epoch_and_index(photographs: Path, transforms: ModuleType) -> None:
    images = folder(photographs / "train", transforms.training(24))

    def first(seed: int, epoch: int) -> Tensor:
        return Loader(images, 4, 0, seed, True, False).loader.dataset[epoch, 0][0]

    assert torch.equal(first(7, 3), first(7, 3))
    assert not torch.equal(first(7, 3), first(7, 4)) and not torch.equal(first(7, 3), first(8, 3))


@pytest.mark.parametrize("train", [True, False])
def test_loading_leaves_every_generator_alone(
    train: bool, photographs: Path, transforms: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout draws from torch's: a run that resumes within an epoch must find it as it was."""
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the GPUs' generators were seeded"))

    def states() -> tuple:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    transform = transforms.training(16) if train else transforms.evaluation(16)
    before = states()
    batches = list(Loader(folder(photographs / "train", transform), 4, 0, 0, train, False).batches(1))
    assert any(batch.corrupt for batch in batches)  # that way out, too
    assert states() == before


class Deadly(Synthetic):
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        os._exit(3)


def test_a_worker_that_dies_is_reported() -> None:
    loaded = Loader(Deadly(4, 8, 0), 2, 1, 0, False, False)
    with pytest.raises(WorkerDied, match=r"DataLoader worker .* exited unexpectedly.*fewer data\.workers"):
        list(loaded.batches())


def test_what_else_breaks_a_connection_is_no_dead_worker() -> None:
    for workers, error in ((0, ConnectionResetError), (2, BrokenPipeError), (2, RuntimeError), (0, EOFError)):
        with pytest.raises(error), naming_dead_workers(workers):
            raise error("something else")
    with pytest.raises(WorkerDied, match=r"A DataLoader worker is gone \(reset\)"), naming_dead_workers(2):
        raise ConnectionResetError("reset")


def test_more_batch_than_images(small: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size 64 is more than the 48 training images"):
        loader(small("data.batch_size=64"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "no data set given; use --data imagefolder:DIR"),
        ("imagenet", "unknown data set 'imagenet'; use --data"),
        ("imagefolder", "imagefolder needs a directory: --data imagefolder:DIR"),
        ("synthetic:0", "needs a positive number of images, got '0'"),
        ("imagefolder:/nowhere", "/nowhere/val'; an imagefolder holds train/CLASS/ and val/CLASS/"),
        ("cifar10:/nowhere", r"no cifar10 in /nowhere: data_batch_1 .*expected cifar-10-batches-py/.*not.* downloaded"),
        ("cifar100:/nowhere", r"no cifar100 in /nowhere: train .*expected cifar-100-python/"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(Data(source=source), 0)


# -- images ---------------------------------------------------------------


def test_evaluation_is_the_centre_of_the_resized_image(transforms: ModuleType) -> None:
    """224 of 256, normalised by ImageNet's mean and deviation."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    got = transforms.evaluation(224)(Image.fromarray(pixels))
    np.testing.assert_allclose(
        got.numpy(), normalised(pixels[16:240, 38:262], transforms.IMAGENET), rtol=1e-5, atol=1e-6
    )
    for width, height in ((500, 40), (1, 65000), (1, 1)):
        assert transforms.evaluation(32)(Image.new("RGB", (width, height))).shape == (3, 32, 32)
    for size, kept in (((1, 65000), (1, 64)), ((300, 2), (128, 2)), ((60, 50), (60, 50))):
        assert transforms.no_strip(Image.new("RGB", size)).size == kept


def normalised(pixels: np.ndarray, statistics: tuple) -> np.ndarray:
    """uint8 (H, W, 3) -> float32 (3, H, W)."""
    mean, deviation = (np.array(values, np.float32) for values in statistics)
    return ((pixels / np.float32(255) - mean) / deviation).transpose(2, 0, 1)


def test_training_crops_part_of_the_image_and_flips_it(transforms: ModuleType) -> None:
    """On an image whose red grows to the right and whose green grows downwards, a crop shows where it lay."""
    from PIL import Image

    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    pixels = np.stack([*np.broadcast_arrays(ramp[None, :], ramp[:, None]), np.zeros((200, 200), np.uint8)], axis=-1)
    image, transform = Image.fromarray(pixels), transforms.training(32)
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in transforms.IMAGENET)
    areas, flips = [], 0
    for _ in range(200):
        x = transform(image) * deviation + mean
        assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and -1e-5 < x.min() and x.max() < 1 + 1e-5
        width, height = x[0, 0, -1] - x[0, 0, 0], x[1, -1, 0] - x[1, 0, 0]
        flips += bool(width < 0)
        areas.append((width.abs() * height).item())
    assert 60 < flips < 140
    assert min(areas) < 0.2 and max(areas) > 0.75 and min(areas) > 0.05


# -- CIFAR ---------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, np.ndarray, np.ndarray]:
    """Both data sets as their archives unpack, four images a file (20 in CIFAR-100's train), with the sums to match."""
    from isonet_fast.train.data import cifar as archives

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, 24).tolist()
    for data_set, key in ((archives.CIFAR10, "labels"), (archives.CIFAR100, "fine_labels")):
        directory = tmp_path / data_set.base_folder
        directory.mkdir()
        at = 0
        for part in ("train_list", "test_list"):
            sums = []
            for name, _ in getattr(data_set, part):
                count = 20 if name == "train" else 4
                batch = {"data": images[at : at + count], key: labels[at : at + count]}
                sums.append([name, write(directory / name, batch)])
                at += count
            monkeypatch.setattr(data_set, part, sums)
        names = [f"class {n}" for n in range(100 if key == "fine_labels" else 10)]
        digest = write(directory / data_set.meta["filename"], {data_set.meta["key"]: names})
        monkeypatch.setattr(data_set, "meta", {**data_set.meta, "md5": digest})
    return tmp_path, images, np.array(labels)


def write(path: Path, content: object) -> str:
    path.write_bytes(pickle.dumps(content, protocol=2))
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.mark.parametrize(
    ("name", "inside", "classes"),
    [("cifar10", "", 10), ("cifar10", "cifar-10-batches-py", 10), ("cifar100", "", 100)],
)
def test_cifar_is_read_normalised_and_augmented(
    cifar: tuple, transforms: ModuleType, name: str, inside: str, classes: int
) -> None:
    root, images, labels = cifar
    source = open_source(Data(source=f"{name}:{root / inside}"), 0)
    assert (len(source.train), len(source.val), source.num_classes, source.channels) == (20, 4, classes, 3)
    image, label = source.val[1]
    expected = normalised(images[21].reshape(3, 32, 32).transpose(1, 2, 0), transforms.CIFAR)
    np.testing.assert_allclose(image.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert label == labels[21]
    items = Loader(source.train, 4, 0, 0, True, False).loader.dataset
    augmented = [items[epoch, 0][0] for epoch in (1, 1, 2)]
    assert torch.equal(augmented[0], augmented[1]) and not torch.equal(augmented[0], augmented[2])
    assert len(open_source(Data(source=f"{name}:{root}"), 0, evaluating=True).train) == 4


def test_cifar_crops_out_of_four_black_pixels_and_flips(cifar: tuple, transforms: ModuleType) -> None:
    root, images, _ = cifar
    train = open_source(Data(source=f"cifar10:{root}"), 0).train
    padded = np.pad(images[0].reshape(3, 32, 32), ((0, 0), (4, 4), (4, 4))).transpose(1, 2, 0)
    crops = [normalised(padded[y : y + 32, x : x + 32], transforms.CIFAR) for y in range(9) for x in range(9)]
    possible = np.stack([*crops, *(crop[:, :, ::-1] for crop in crops)])
    seen = set()
    for _ in range(60):
        far = np.abs(possible - train[0][0].numpy()).max(axis=(1, 2, 3))
        assert far.min() < 1e-5
        seen.add(int(far.argmin()))
    assert len(seen) > 30 and min(seen) < 81 <= max(seen)


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("name", ["data_batch_1", "test_batch", "batches.meta"])
def test_a_malicious_cifar_file_runs_nothing(cifar: tuple, name: str) -> None:
    root = cifar[0]
    payload = pickle.dumps({"data": Malicious(str(root / "owned"))})
    (root / "cifar-10-batches-py" / name).write_bytes(payload)
    with pytest.raises(FileNotFoundError, match=f"no cifar10 in {root}: {name} is missing or not that of the authors"):
        open_source(Data(source=f"cifar10:{root}"), 0)
    assert not (root / "owned").exists()
    pickle.loads(payload)
    assert (root / "owned").exists()  # it would have run


def test_a_cut_cifar_file(cifar: tuple) -> None:
    path = cifar[0] / "cifar-100-python" / "test"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(
        FileNotFoundError, match=r"test is missing or not that of the authors; expected cifar-100-python"
    ):
        open_source(Data(source=f"cifar100:{path.parent}"), 0)


def test_without_torchvision_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install, and without replacing the torch that is there."""
    from isonet_fast.import_torchvision import import_torchvision

    monkeypatch.setitem(sys.modules, "torchvision", None)
    version = torch.__version__.partition("+")[0]
    with pytest.raises(ModuleNotFoundError, match=rf"pip install 'isonet_fast\[vision\]' torch=={version} "):
        import_torchvision()
