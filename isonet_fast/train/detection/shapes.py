"""A tiny COCO: `python -m isonet_fast.train.detection.shapes DIR` writes images of squares, circles and triangles with
their boxes and polygons, in COCO's layout. What it writes follows from the seed."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ("square", "circle", "triangle")  # categories 1, 2, 3
Polygon = list[tuple[float, float]]


def write(directory: Path, train: int = 200, val: int = 50, size: int = 64, seed: int = 0) -> None:
    """Write `train` and `val` images of size x size pixels."""
    (directory / "annotations").mkdir(parents=True, exist_ok=True)
    for number, (part, count) in enumerate({"train2017": train, "val2017": val}.items()):
        contents = _part(directory / part, count, size, np.random.default_rng([seed, number]))
        (directory / "annotations" / f"instances_{part}.json").write_text(json.dumps(contents))


def _part(folder: Path, count: int, size: int, random: np.random.Generator) -> dict[str, Any]:
    from PIL import Image, ImageDraw

    folder.mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number in range(1, count + 1):
        noise = random.integers(0, 60, (size, size, 3), dtype=np.uint8)
        image = Image.fromarray(noise)
        pen = ImageDraw.Draw(image)
        for category, polygon in _scene(size, random):
            pen.polygon(polygon, fill=tuple(random.integers(100, 256, 3).tolist()))
            objects.append(_object(len(objects) + 1, number, category, polygon))
        name = f"{number:06}.png"
        image.save(folder / name)
        images.append({"id": number, "file_name": name, "height": size, "width": size})
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPES, 1)]
    return {"images": images, "annotations": objects, "categories": categories}


def _scene(size: int, random: np.random.Generator) -> list[tuple[int, Polygon]]:
    """One to three shapes that do not touch."""
    placed: list[tuple[float, float, float]] = []
    scene = []
    for _ in range(random.integers(1, 4)):
        radius = random.uniform(size / 10, size / 5)
        x, y = random.uniform(radius + 1, size - radius - 1, 2)
        if all(max(abs(x - a), abs(y - b)) > radius + other + 1 for a, b, other in placed):
            placed.append((x, y, radius))
            category = int(random.integers(1, 4))
            scene.append((category, _polygon(category, x, y, radius)))
    return scene


def _polygon(category: int, x: float, y: float, radius: float) -> Polygon:
    corners, turn = {1: (4, math.pi / 4), 2: (24, 0.0), 3: (3, -math.pi / 2)}[category]
    angles = [turn + 2 * math.pi * n / corners for n in range(corners)]
    return [(round(x + radius * math.cos(a), 2), round(y + radius * math.sin(a), 2)) for a in angles]


def _object(number: int, image: int, category: int, polygon: Polygon) -> dict[str, Any]:
    xs, ys = zip(*polygon, strict=True)
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    following = [*polygon[1:], polygon[0]]
    area = abs(sum(a * d - b * c for (a, b), (c, d) in zip(polygon, following, strict=True))) / 2
    flat = [value for point in polygon for value in point]
    return {
        "id": number, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0,
        "segmentation": [flat],
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write a tiny COCO of squares, circles and triangles.")
    parser.add_argument("directory", type=Path)
    for option, default in {"train": 200, "val": 50, "size": 64, "seed": 0}.items():
        parser.add_argument(f"--{option}", type=int, default=default, help="default %(default)s")
    write(**vars(parser.parse_args()))
