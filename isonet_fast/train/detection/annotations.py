"""An annotation file of COCO. It is read as a whole and checked before anything starts.

An error is one line that names the file, the image or annotation, and what is expected.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...safe_load import few


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


def folder(path: Path) -> Path:
    """The folder of the images of an annotation file."""
    return path.parents[1] / path.stem.removeprefix("instances_")


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
