"""The data: order, augmentation and workers never change an example; files are read safely; corrupt ones are named."""

from __future__ import annotations

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from isonet_fast.train import transforms
from isonet_fast.train.config import Config, Data
from isonet_fast.train.datasets import Corrupt, ImageFolder, open_source
from isonet_fast.train.loader import Loader, WorkerDied

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
    assert len(loader(small("data.batch_size=10"))) == 4  # the rest is dropped


def test_a_started_epoch_goes_on_where_it_was(photographs: Path) -> None:
    """The same batches from position 2 on, with workers or without, with their random crops."""
    folder = ImageFolder(photographs / "train", 24)
    kinds = [Loader(folder, 4, workers, 7, True, False) for workers in (0, 2)]
    whole = list(kinds[0].batches(3))
    for part in (list(kinds[1].batches(3, 2)), list(kinds[0].batches(3, 2))):
        assert len(part) == len(whole) - 2 == 2
        for a, b in zip(whole[2:], part, strict=True):
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    following = [next(iter(list(kind.batches(4)))).images for kind in kinds]  # the workers live on
    assert torch.equal(*following) and not torch.equal(whole[0].images, following[0])


def test_loading_leaves_the_global_generator_alone(small: Callable[..., Config]) -> None:
    before = torch.get_rng_state()
    list(loader(small()).batches(1))
    assert torch.equal(before, torch.get_rng_state())


class Deadly(ImageFolder):
    def example(self, index: int, rng: random.Random | None) -> tuple[torch.Tensor, int]:
        os._exit(3)


def test_a_worker_that_dies_is_reported(photographs: Path) -> None:
    loaded = Loader(Deadly(photographs / "val", 16), 2, 1, 0, False, False)
    with pytest.raises(WorkerDied, match=r"DataLoader worker .* exited unexpectedly.*fewer data\.workers"):
        list(loaded.batches())


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
        ("imagefolder:/nowhere", "val is no directory; an imagefolder holds train/CLASS/ and val/CLASS/"),
        ("cifar10:/nowhere", r"no cifar10 in .*expected cifar-10-batches-py/.*nothing is downloaded"),
    ],
)
def test_sources_that_are_none(source: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(Data(source=source), 0)


# -- images ---------------------------------------------------------------


def test_corrupt_images_are_named(photographs: Path) -> None:
    (photographs / "train" / "cat" / "0.jpg").write_bytes(b"not an image")
    loaded = Loader(ImageFolder(photographs / "train", 16), 18, 0, 0, True, False)
    (batch,) = loaded.batches(1)
    assert len(batch.images) == len(batch.labels) == 16
    assert sorted(os.path.relpath(c.path, photographs) for c in batch.corrupt) == ["train/cat/0.jpg", "train/dog/4.jpg"]
    assert any("truncated" in c.reason for c in batch.corrupt)
    assert str(pickle.loads(pickle.dumps(batch.corrupt[0]))) == str(batch.corrupt[0])


def test_trouble_of_the_disk_is_not_taken_for_a_corrupt_image(photographs: Path) -> None:
    folder = ImageFolder(photographs / "train", 16)
    (photographs / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        folder.example(0, None)


def test_a_class_without_images(photographs: Path) -> None:
    (photographs / "val" / "emu").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in .*emu"):
        ImageFolder(photographs / "val", 16)


def test_train_and_val_of_other_classes(photographs: Path) -> None:
    (photographs / "val" / "cat").rename(photographs / "val" / "cow")
    with pytest.raises(ValueError, match="train and val differ in their classes: cat, cow"):
        open_source(Data(source=f"imagefolder:{photographs}"), 0)


def test_random_crops_have_the_prescribed_area_and_aspect() -> None:
    rng = random.Random(0)
    areas = []
    for _ in range(2000):
        left, top, right, bottom = transforms.random_crop(500, 375, rng)
        assert 0 <= left < right <= 500 and 0 <= top < bottom <= 375
        width, height = right - left, bottom - top
        assert 0.74 < width / height < 1.35
        areas.append(width * height / (500 * 375))
    assert min(areas) < 0.09 and max(areas) > 0.9 and all(0.079 < a < 1.01 for a in areas)
    # an image no crop of allowed aspect fits: the largest central one
    assert transforms.random_crop(1000, 10, rng) == (493, 0, 506, 10)


@pytest.mark.parametrize(("size", "expected"), [((100, 50), (64, 32)), ((50, 99), (32, 63)), ((7, 7), (32, 32))])
def test_shorter_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    from PIL import Image

    assert transforms.resize_shorter(Image.new("RGB", size), 32).size == expected


def test_evaluation_is_the_centre_of_the_resized_image() -> None:
    """224 of 256, normalised by ImageNet's mean and deviation."""
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8)
    got = transforms.eval_image(Image.fromarray(pixels), 224)
    mean, deviation = (np.array(values, np.float32) for values in transforms.IMAGENET)
    expected = ((pixels[16:240, 38:262] / np.float32(255) - mean) / deviation).transpose(2, 0, 1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_same_arithmetic_as_torchvision() -> None:
    try:
        from torchvision.transforms import functional as tv
    except (ImportError, RuntimeError) as error:  # its wheel may not fit this torch
        pytest.skip(f"no usable torchvision: {error}")
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (301, 417, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    expected = tv.normalize(tv.to_tensor(tv.center_crop(tv.resize(image, 256), 224)), *transforms.IMAGENET)
    assert torch.equal(transforms.eval_image(image, 224), expected)
    left, top, right, bottom = transforms.random_crop(417, 301, random.Random(5))
    crop = tv.resized_crop(image, top, left, bottom - top, right - left, [64, 64])
    expected = tv.normalize(tv.to_tensor(crop), *transforms.IMAGENET)
    got = transforms.train_image(image, 64, random.Random(5))
    assert torch.equal(got, expected) or torch.equal(got, expected.flip(-1))


def test_padded_crop() -> None:
    x = torch.arange(1, 3 * 36 + 1, dtype=torch.uint8).view(3, 6, 6)
    seen = {tuple(transforms.padded_crop(x, 2, random.Random(n)).flatten().tolist()) for n in range(400)}
    assert len(seen) == 50  # 5 x 5 positions, flipped or not
    assert tuple(x.flatten().tolist()) in seen


# -- CIFAR ---------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path) -> tuple[Path, np.ndarray, np.ndarray]:
    """Both versions of both data sets, four images per file."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, 24)
    ten = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]
    for directory in (
        "py/cifar-10-batches-py",
        "bin/cifar-10-batches-bin",
        "py/cifar-100-python",
        "bin/cifar-100-binary",
    ):
        (tmp_path / directory).mkdir(parents=True)
    for n, name in enumerate(ten):
        part = slice(4 * n, 4 * n + 4)
        batch = {b"data": images[part], b"labels": labels[part].tolist(), b"batch_label": b"x"}
        (tmp_path / "py/cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch, protocol=2))
        rows = np.concatenate([labels[part, None].astype(np.uint8), images[part]], axis=1)
        (tmp_path / "bin/cifar-10-batches-bin" / f"{name}.bin").write_bytes(rows.tobytes())
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 24))):
        batch = {b"data": images[part], b"fine_labels": (labels[part] + 90).tolist(), b"coarse_labels": [0] * 20}
        (tmp_path / "py/cifar-100-python" / name).write_bytes(pickle.dumps(batch, protocol=2))
        fine = (labels[part, None] + 90).astype(np.uint8)
        rows = np.concatenate([np.zeros_like(fine), fine, images[part]], axis=1)
        (tmp_path / "bin/cifar-100-binary" / f"{name}.bin").write_bytes(rows.tobytes())
    return tmp_path, images, labels


@pytest.mark.parametrize("version", ["py", "bin"])
@pytest.mark.parametrize(("name", "offset", "classes"), [("cifar10", 0, 10), ("cifar100", 90, 100)])
def test_cifar(cifar: tuple, version: str, name: str, offset: int, classes: int) -> None:
    root, images, labels = cifar
    source = open_source(Data(source=f"{name}:{root / version}"), 0)
    assert (len(source.train), len(source.val), source.num_classes, source.channels) == (20, 4, classes, 3)
    image, label = source.val.example(1, None)
    mean, deviation = (np.array(v, np.float32)[:, None, None] for v in transforms.CIFAR)
    expected = (images[21].reshape(3, 32, 32) / np.float32(255) - mean) / deviation
    np.testing.assert_allclose(image.numpy(), expected, rtol=1e-5, atol=1e-6)
    assert label == labels[21] + offset
    augmented = [source.train.example(0, random.Random(n))[0] for n in (1, 1, 2)]
    assert torch.equal(augmented[0], augmented[1]) and not torch.equal(augmented[0], augmented[2])


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_a_malicious_cifar_batch_runs_nothing(cifar: tuple) -> None:
    root = cifar[0]
    payload = pickle.dumps({b"data": Malicious(str(root / "owned"))})
    (root / "py/cifar-10-batches-py/test_batch").write_bytes(payload)
    with pytest.raises(ValueError, match=r"test_batch is refused: it asks for .*\.mkdir; only arrays"):
        open_source(Data(source=f"cifar10:{root / 'py'}"), 0)
    assert not (root / "owned").exists()


@pytest.mark.parametrize(
    ("version", "name"), [("py/cifar-10-batches-py", "test_batch"), ("bin/cifar-10-batches-bin", "test_batch.bin")]
)
def test_a_cut_cifar_batch(cifar: tuple, version: str, name: str) -> None:
    path = cifar[0] / version / name
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        open_source(Data(source=f"cifar10:{path.parent}"), 0)


def test_corrupt_reads_well() -> None:
    assert str(Corrupt("a/b.jpg", "image file is truncated")) == "a/b.jpg (image file is truncated)"
