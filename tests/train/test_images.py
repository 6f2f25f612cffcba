"""Image folders as they are found: what is no image is named and skipped, a failing disk ends the run, nothing hangs
and nothing is executed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the images are read with Pillow")
from PIL import Image

from isonet_fast.train.config import Data
from isonet_fast.train.data.datasets import open_source
from isonet_fast.train.data.images import FORMATS, read_image
from isonet_fast.train.data.loader import Loader
from isonet_fast.train.data.source import Corrupt, Source

from .conftest import folder


def opened(root: Path, evaluating: bool = False) -> Source:
    return open_source(Data(source=f"imagefolder:{root}", image_size=16), 0, evaluating)


def pixels(path: Path, **save: object) -> bytes:
    """The bytes of an image of noise, written to `path` in the format of its name."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, **save)
    return path.read_bytes()


# -- one file ---------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(pixels(path)[:400])


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # a socket's path is short
        server.bind(path.name)


def postscript(path: Path) -> None:
    """Pillow's decoder of it starts Ghostscript."""
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")


CORRUPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut.jpg": (cut, "runcated"),
    "empty.jpg": (lambda path: path.write_bytes(b""), f"it holds none of {', '.join(FORMATS)}"),
    "page.jpg": (lambda path: path.write_bytes(b"<html>not found</html>"), "it holds none of"),
    "eps.png": (postscript, "it holds none of"),
    "fifo.png": (fifo, "not a regular file"),
    "device.png": (device, "not a regular file"),
    "socket.png": (listening, "No such device or address"),
    "dangling.jpg": (lambda path: path.symlink_to("nowhere.jpg"), "a link to a file that is not there"),
    "itself.jpg": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "lines\nof a name.jpg": (cut, "runcated"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_what_is_no_image_is_named_and_skipped(name: str, photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photographs)
    shutil.rmtree(photographs / "val" / "dog")
    path = photographs / "val" / "cat" / name
    make, reason = CORRUPT[name]
    make(path)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    (batch,) = Loader(folder(photographs / "val"), 9, 0, 0, False, False).batches()
    assert len(batch.images) == 3
    (corrupt,) = batch.corrupt
    assert corrupt.path == str(path) and reason in corrupt.reason and "\n" not in str(corrupt)
    assert str(pickle.loads(pickle.dumps(corrupt))) == str(corrupt)


def test_a_file_without_permission(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The permission is refused here: to root, as which tests may run, it never is."""
    images = folder(photographs / "val")
    failing(errno.EACCES, images.samples[0][0], monkeypatch)
    with pytest.raises(Corrupt, match=r"val/cat/0\.jpg \(Permission denied\)"):
        images[0]


def test_files_that_change_while_they_are_used(photographs: Path) -> None:
    images = folder(photographs / "val")
    replaced, removed = (Path(images.samples[n][0]) for n in (0, 1))
    replaced.write_bytes(b"something else")
    removed.unlink()
    for n, reason in ((0, "it holds none of"), (1, "No such file or directory")):
        with pytest.raises(Corrupt, match=reason):
            images[n]
    pixels(replaced)
    assert images[0][0].shape == (3, 16, 16)


def failing(number: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def fails(name: str, flags: int, *more: int) -> int:
        if name == path:
            raise OSError(number, os.strerror(number), name)
        return real(name, flags, *more)

    monkeypatch.setattr(os, "open", fails)


def test_a_failing_disk_is_no_corrupt_image(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = folder(photographs / "val")
    with monkeypatch.context() as patch:
        failing(errno.EIO, images.samples[0][0], patch)
        with pytest.raises(OSError, match="Input/output error"):
            images[0]
    shutil.rmtree(photographs / "val" / "cat")  # a folder, or a disk that was there
    for workers in (0, 1):
        with pytest.raises(
            FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: '[^'\n]*/val/cat/0\.jpg'$"
        ):
            list(Loader(images, 2, workers, 0, False, False).batches())


def test_a_disk_that_is_gone_behind_links_ends_the_run(photographs: Path) -> None:
    """A hundred unreadable images in a row are no accident of images."""
    for n in range(110):
        (photographs / "val" / "dog" / f"x{n}.jpg").symlink_to("/nowhere/image.jpg")
    batches = Loader(folder(photographs / "val"), 3, 0, 0, False, False).batches()
    with pytest.raises(OSError, match=r"10[0-2] images in a row.*dog/.*\.jpg \(a link to a file that is not there\)"):
        list(batches)


def test_a_decompression_bomb_is_corrupt(photographs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(Corrupt, match="DecompressionBombError"):
        folder(photographs / "val")[0]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff", "bmp", "ppm", "gif"])
def test_damaged_files_of_every_format(kind: str, tmp_path: Path) -> None:
    """Bits flipped anywhere: an image or Corrupt, whatever the decoder raises."""
    rng = np.random.default_rng(1)
    content = np.frombuffer(pixels(tmp_path / f"a.{kind}"), np.uint8)
    for n in range(40):
        damaged = content.copy()
        places = rng.integers(0, len(content) if n % 2 else min(len(content), 200), 3)
        damaged[places] ^= rng.integers(1, 256, 3, dtype=np.uint8)
        (tmp_path / "b.png").write_bytes(damaged.tobytes())
        try:
            assert read_image(str(tmp_path / "b.png")).mode == "RGB"
        except Corrupt:
            pass


def test_pixels_without_a_range(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(Corrupt, match="floating-point"):
        read_image(str(tmp_path / "x.tiff"))


def test_the_images_of_every_kind_that_people_have(tmp_path: Path) -> None:
    """In RGB, whatever the name says."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    image, path = Image.fromarray(noise), tmp_path / "x.jpg"
    grey = noise.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    deep = Image.fromarray((grey * 257).astype(np.uint16))
    cases = {
        "CMYK": lambda: image.convert("CMYK").save(path, "JPEG", quality=95),
        "grey": lambda: image.convert("L").save(path, "PNG"),
        "16 bits": lambda: deep.save(path, "PNG"),
        "16 bits, Motorola": lambda: Image.fromarray((grey * 257).astype(">u2")).save(path, "TIFF"),
        "16 bits, portable": lambda: deep.convert("I").save(path, "PPM"),
        "transparent": lambda: image.convert("RGBA").save(path, "PNG"),
        "palette": lambda: image.quantize(256).save(path, "GIF"),
        "animated": lambda: image.save(path, "WEBP", save_all=True, append_images=[image.rotate(90)], lossless=True),
        "one pixel": lambda: image.crop((0, 0, 1, 1)).save(path, "BMP"),
        "large file": lambda: image.save(path, "TIFF", compression="tiff_lzw"),
    }
    for name, write in cases.items():
        write()
        got = np.asarray(read_image(str(path)), np.float32)
        expected = np.repeat(np.round(grey)[..., None], 3, 2) if name == "grey" or "16" in name else noise
        assert np.abs(got - expected[: got.shape[0], : got.shape[1]]).mean() < (
            20 if name in ("CMYK", "palette") else 1
        ), name


# -- folders ---------------------------------------------------------------


def test_hidden_names_are_passed_over(photographs: Path) -> None:
    """Jupyter, macOS and version control make such names: of classes, within classes and of images."""
    before = opened(photographs)
    for part in ("train", "val"):
        for hidden in (".ipynb_checkpoints", "cat/.ipynb_checkpoints", ".git"):
            (photographs / part / hidden).mkdir()
            shutil.copy(photographs / part / "cat" / "0.jpg", photographs / part / hidden / "0.jpg")
        (photographs / part / "cat" / "._0.jpg").write_bytes(b"resource fork")
    after = opened(photographs)
    assert after.train.samples == before.train.samples and after.val.samples == before.val.samples
    assert after.num_classes == 2 and not after.notes


def test_empty_class_folders_are_named_once(photographs: Path) -> None:
    """A folder that is empty in one part is no class, unless it is in the other part too, empty or not."""
    (photographs / "train" / "New folder").mkdir()
    source = opened(photographs)
    assert source.num_classes == 2 and source.notes == [f"no images in {photographs}/train/New folder"]
    (photographs / "val" / "stale").mkdir()
    assert opened(photographs).num_classes == opened(photographs, evaluating=True).num_classes == 2
    for part in ("train", "val"):
        (photographs / part / "emu").mkdir()
    shutil.copy(photographs / "val" / "cat" / "0.jpg", photographs / "train" / "emu" / "0.jpg")
    source, evaluated = opened(photographs), opened(photographs, evaluating=True)
    assert source.num_classes == evaluated.num_classes == 3
    assert source.notes == [
        f"no images in {photographs}/val/emu, {photographs}/val/stale, {photographs}/train/New folder"
    ]
    assert [label for _, label in source.val.samples] == [0, 0, 0, 1, 1, 1]
    assert source.train.samples[-1] == (str(photographs / "train" / "emu" / "0.jpg"), 2)


def test_no_images_at_all(photographs: Path) -> None:
    for path in (photographs / "val").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no images in .*/val; an imagefolder holds train/CLASS/ and val/CLASS"
    ):
        opened(photographs)


def test_train_and_val_of_other_classes(photographs: Path) -> None:
    (photographs / "val" / "cat").rename(photographs / "val" / "cow")
    with pytest.raises(ValueError, match="train and val differ in their classes: cat, cow"):
        opened(photographs)


def test_links_that_lead_back(photographs: Path) -> None:
    """Every image once, whether a link leads to its folder, a folder above, the data set or each other's folder."""
    before = opened(photographs)
    train = photographs / "train"
    for link, target in (("cat/same", "."), ("cat/above", ".."), ("loop", "."), ("cat/all", "../.."), ("dog/x", "x")):
        (train / link).symlink_to(target)
    for name, other in (("one", "two"), ("two", "one")):
        (train / "dog" / name).mkdir()
        (train / "dog" / name / other).symlink_to(f"../{other}")
    after = opened(photographs)
    assert after.train.samples == before.train.samples and after.num_classes == 2


def test_links_to_images_elsewhere_are_followed(photographs: Path, tmp_path: Path) -> None:
    """A class, a folder and a file may be links."""
    before = opened(photographs)
    (photographs / "train" / "dog").rename(tmp_path / "dogs")
    (photographs / "train" / "dog").symlink_to(tmp_path / "dogs")
    (tmp_path / "more").mkdir()
    (tmp_path / "dogs" / "0.jpg").rename(tmp_path / "more" / "x.jpg")
    (tmp_path / "dogs" / "0.jpg").symlink_to(tmp_path / "more" / "x.jpg")
    (tmp_path / "dogs" / "more").symlink_to(tmp_path / "more")
    after = opened(photographs)
    more = (str(photographs / "train" / "dog" / "more" / "x.jpg"), 1)
    assert after.train.samples == [*before.train.samples, more]
    assert after.train[9][0].shape == (3, 16, 16)


def test_the_order_is_that_of_torchvision(photographs: Path) -> None:
    """Runs that older versions began go on with the same images."""
    from isonet_fast.import_torchvision import import_torchvision

    import_torchvision()
    from torchvision import datasets

    cat = photographs / "train" / "cat"
    for name in ("b", "a", "a b", "a/c", "B"):
        (cat / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(cat / "0.jpg", cat / name / "Z.JPEG")
    assert folder(photographs / "train").samples == datasets.ImageFolder(photographs / "train").samples
