"""`coco:DIR`: images with boxes and masks, as COCO lays them out.

    DIR/annotations/instances_train2017.json, instances_val2017.json
    DIR/train2017/IMAGE, DIR/val2017/IMAGE

An annotation file is read as a whole and checked before anything starts. An error is one line that names the file, the
image or annotation, and what is expected.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...import_torchvision import import_torchvision
from ...safe_load import few
from ..data.source import Corrupt, Source
from ..paths import user_path


@dataclass
class Annotations:
    """An annotation file that has been checked."""

    path: Path
    images: list[dict[str, Any]]
    objects: dict[int, list[dict[str, Any]]]  # by image
    categories: dict[int, str]

    @property
    def num_classes(self) -> int:
        """The number of classes, with the background (0). Labels are numbers of categories, so gaps count too."""
        return max(self.categories) + 1


def open_coco(source: str) -> Source:
    """The training and the validation part; ValueError or FileNotFoundError say what is wrong with a file."""
    kind, _, directory = source.partition(":")
    if kind != "coco" or not directory:
        raise ValueError(f"detectors train on --data coco:DIR, got {source!r}")
    import_pycocotools()
    import_torchvision()
    train, val = (read(user_path(directory), part) for part in ("train2017", "val2017"))
    if train.categories != val.categories:
        differing = sorted({*train.categories.items()} ^ {*val.categories.items()})
        raise ValueError(f"{directory}: train and val differ in their categories: {few([*map(str, differing)])}")
    return Source(Coco(train, training=True), Coco(val, training=False), train.num_classes, 3)


class Coco:
    """Images in [0, 1] of their own size, and what is in them: boxes, labels, masks, image_id.

    training: crowds are left out, and images without objects; images are mirrored at random, with their objects.
    """

    def __init__(self, annotations: Annotations, training: bool) -> None:
        self.annotations, self.training = annotations, training
        self.folder = folder(annotations.path)
        self.images = [image for image in annotations.images if not training or self._objects(image)]
        if not self.images:
            raise ValueError(f"{annotations.path} has no image to train on: none has an object with an area")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        from ..data.images import read_image  # Pillow, which the other commands do without

        about = self.images[index]
        path = str(self.folder / about["file_name"])
        image = torch.from_numpy(np.array(read_image(path))).permute(2, 0, 1).float() / 255
        size = about["height"], about["width"]
        if tuple(image.shape[1:]) != size:
            raise Corrupt(path, f"it is {image.shape[2]} x {image.shape[1]}, annotated as {size[1]} x {size[0]}")
        if not self.training:
            return image, {"image_id": about["id"]}
        target = _target(self._objects(about), *size)
        if torch.rand(()) < 0.5:
            image, target = _mirrored(image, target)
        return image.contiguous(), target

    def _objects(self, about: Mapping[str, Any]) -> list[dict[str, Any]]:
        found = self.annotations.objects.get(about["id"], [])
        return [one for one in found if not one.get("iscrowd") and _corners(one, about["height"], about["width"])]


def _corners(one: Mapping[str, Any], height: int, width: int) -> tuple[float, float, float, float] | None:
    """x1, y1, x2, y2 within the image; None where nothing is left."""
    x, y, w, h = one["bbox"]
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    return (x1, y1, x2, y2) if x2 > x1 and y2 > y1 else None


def _target(objects: list[dict[str, Any]], height: int, width: int) -> dict[str, Any]:
    masks = [torch.from_numpy(mask(one["segmentation"], height, width)) for one in objects]
    return {
        "boxes": torch.tensor([_corners(one, height, width) for one in objects], dtype=torch.float32),
        "labels": torch.tensor([one["category_id"] for one in objects]),
        "masks": torch.stack(masks),
    }


def _mirrored(image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    x1, y1, x2, y2 = target["boxes"].unbind(1)
    width = image.shape[2]
    boxes = torch.stack([width - x2, y1, width - x1, y2], 1)
    return image.flip(2), {**target, "boxes": boxes, "masks": target["masks"].flip(2)}


def mask(segmentation: Any, height: int, width: int) -> Any:
    """uint8 (height, width) of polygons or of a run-length code."""
    from pycocotools import mask as codes

    if isinstance(segmentation, list):
        code = codes.merge(codes.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = codes.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    return codes.decode(code)


def import_pycocotools() -> None:
    try:
        importlib.import_module("pycocotools.mask")  # its compiled part
    except ImportError as error:
        raise ModuleNotFoundError(
            f"masks and AP of COCO are computed by pycocotools ({error}): pip install pycocotools"
        ) from error


def folder(path: Path) -> Path:
    """The folder of the images of an annotation file."""
    return path.parents[1] / path.stem.removeprefix("instances_")


# -- the annotation file -----------------------------------------------------------------------------------------------


def read(directory: Path, part: str) -> Annotations:
    """DIR/annotations/instances_PART.json, checked against DIR/PART."""
    path = directory / "annotations" / f"instances_{part}.json"
    contents = _json(path)
    try:
        return _checked(contents, path)
    except (KeyError, TypeError, AttributeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no annotation file of COCO: {what} where one is expected") from error


def _json(path: Path) -> Any:
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is not there; coco:DIR needs DIR/annotations/instances_train2017.json, DIR/train2017/ and val2017"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        where = f"line {error.lineno}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "it"
        raise ValueError(f"{path} is cut off or no JSON: {where}: {getattr(error, 'msg', error)}") from error


def _checked(contents: Any, path: Path) -> Annotations:
    categories = {_integer(one["id"], path, "a category's id"): str(one["name"]) for one in contents["categories"]}
    if not categories or min(categories) < 1:
        raise ValueError(
            f"{path}: categories must have ids from 1 on (0 is the background), got {few([*map(str, categories)])}"
        )
    images = contents["images"]
    there = _names(folder(path))
    for one in images:
        for key in ("id", "height", "width"):
            _integer(one[key], path, f"{key} of image {one['id']}")
        name = one["file_name"]
        if name not in there and (os.path.dirname(name) == "" or not (folder(path) / name).is_file()):
            raise ValueError(f"{path}: image {one['id']} is {name!r}, which is not in {folder(path)}")
    sizes = {one["id"]: (one["height"], one["width"]) for one in images}
    if len(sizes) < len(images):
        raise ValueError(f"{path}: {len(images) - len(sizes)} images have an id that another has")
    objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for one in contents["annotations"]:
        fault = _fault(one, sizes, categories)
        if fault:
            raise ValueError(f"{path}: annotation {one.get('id')} of image {one.get('image_id')}: {fault}")
        objects[one["image_id"]].append(one)
    return Annotations(path, images, dict(objects), categories)


def _integer(value: Any, path: Path, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{path}: {what} must be a whole number from 0 on, got {value!r}")
    return value


def _names(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError as error:
        raise FileNotFoundError(f"no folder of images {directory} ({error.strerror})") from error


def _fault(one: dict[str, Any], sizes: Mapping[int, Any], categories: Mapping[int, str]) -> str:
    """What is wrong with an annotation; empty if nothing is."""
    if one["image_id"] not in sizes:
        return "there is no such image"
    if one["category_id"] not in categories:
        return f"category {one['category_id']} is none of {few([*map(str, sorted(categories))])}"
    box = one["bbox"]
    if not (isinstance(box, list) and len(box) == 4 and all(map(_finite, box))):
        return f"bbox must be four numbers [x, y, width, height], got {box!r}"
    segmentation = one["segmentation"]
    if isinstance(segmentation, dict):
        if list(segmentation.get("size", [])) != list(sizes[one["image_id"]]):
            return f"a run-length code of size {segmentation.get('size')} where the image has {sizes[one['image_id']]}"
        return "" if isinstance(segmentation.get("counts"), (list, str)) else "a run-length code without counts"
    if not isinstance(segmentation, list) or not segmentation:
        return f"segmentation must be polygons or a run-length code, got {segmentation!r}"
    for polygon in segmentation:
        if not (isinstance(polygon, list) and len(polygon) % 2 == 0 and all(map(_finite, polygon))):
            return "a polygon must be a list of numbers, x and y in turn"
        if len(polygon) < 6:
            return f"a polygon of {len(polygon) // 2} points; three is the least"
    return ""


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
