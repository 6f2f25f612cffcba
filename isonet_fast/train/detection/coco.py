"""`coco:DIR`: images with boxes and masks, as COCO lays them out.

DIR/annotations/instances_train2017.json, instances_val2017.json
DIR/train2017/IMAGE, DIR/val2017/IMAGE
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...import_torchvision import import_torchvision
from ...safe_load import few
from ..data.source import Corrupt, Source
from ..paths import user_path
from .annotations import Annotations, folder, read


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
