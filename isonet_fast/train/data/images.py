"""One image file, read as data: only from a regular file, and by decoders that run no program."""

from __future__ import annotations

import errno
import os
import stat
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .source import Corrupt

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
# Formats by what a file holds, whatever its name says. Pillow has more decoders: that of EPS starts Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# The system's errors that concern one file, not its disk.
_OF_ONE_FILE = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENXIO)


def read_image(path: str) -> Image.Image:
    """The image in RGB. Raises Corrupt where the file is at fault, OSError where its disk or the system is."""
    with _opened(path) as file:
        try:
            with Image.open(file, formats=FORMATS) as image:
                return _eight_bits(image, path).convert("RGB")
        except UnidentifiedImageError:
            raise Corrupt(path, f"it holds none of {', '.join(FORMATS)}") from None
        except OSError as error:
            if error.errno is not None:
                raise
            raise Corrupt(path, str(error)) from None
        except (Corrupt, MemoryError):
            raise
        except Exception as error:  # damaged content makes a decoder raise anything
            raise Corrupt(path, f"{type(error).__name__}: {error}") from None


def _eight_bits(image: Image.Image, path: str) -> Image.Image:
    """Pillow's own conversion cuts off above 255: an image of 16 bits would be white, one of fractions black."""
    if image.mode == "F":
        raise Corrupt(path, "its pixels are floating-point numbers, of which nothing says how bright they are")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image, np.float32) / 257
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _opened(path: str) -> BinaryIO:
    try:
        file = open(path, "rb", opener=_without_waiting)
    except OSError as error:
        if error.errno not in _OF_ONE_FILE or not os.path.isdir(os.path.dirname(path)):
            raise
        dangling = error.errno == errno.ENOENT and os.path.islink(path)
        raise Corrupt(path, "a link to a file that is not there" if dangling else str(error.strerror)) from None
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise Corrupt(path, "not a regular file")
    return file


def _without_waiting(path: Any, flags: int) -> int:
    """Open without blocking: a named pipe without a writer would be waited for."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
