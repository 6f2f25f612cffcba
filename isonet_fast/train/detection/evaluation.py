"""Average precision as COCO defines it, by pycocotools: of boxes and of masks, over IoU 0.5 to 0.95, at 0.5 and 0.75,
of small, medium and large objects."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .annotations import Annotations

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")


def results(image_id: int, found: dict[str, Tensor], threshold: float = 0.5) -> list[dict[str, Any]]:
    """What a detector found in an image, for COCO: boxes as [x, y, width, height], masks as run-length codes."""
    from pycocotools import mask as codes

    boxes = found["boxes"].double().cpu()
    corners = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    rows: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": label, "bbox": box, "score": score}
        for box, label, score in zip(corners, found["labels"].tolist(), found["scores"].tolist(), strict=True)
    ]
    if "masks" in found:
        for row, mask in zip(rows, (found["masks"][:, 0] > threshold).cpu().numpy(), strict=True):
            row["segmentation"] = codes.encode(np.asfortranarray(mask.astype(np.uint8)))
    return rows


def average_precision(annotations: Annotations, rows: Sequence[dict[str, Any]], masks: bool) -> dict[str, float]:
    """{"box_AP": ..., "mask_AP50": ...} in percent; NaN where there are no such objects."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found: dict[str, float] = {}
    with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its tables
        truth = COCO()
        truth.dataset = _dataset(annotations)
        truth.createIndex()
        for name, kind in (("box", "bbox"), ("mask", "segm"))[: 1 + masks]:
            values = [0.0] * len(COLUMNS)
            if rows:
                evaluation = COCOeval(truth, truth.loadRes([dict(row) for row in rows]), kind)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
                values = evaluation.stats[: len(COLUMNS)].tolist()
            found |= {f"{name}_{c}": 100 * v if v >= 0 else float("nan") for c, v in zip(COLUMNS, values, strict=True)}
    return found


def _dataset(annotations: Annotations) -> dict[str, Any]:
    """The annotations as in the file, with the fields that COCO's own files have and others' may lack."""
    objects = [one for found in annotations.objects.values() for one in found]
    return {
        "info": {},
        "images": annotations.images,
        "categories": [{"id": number, "name": name} for number, name in annotations.categories.items()],
        "annotations": [
            {"area": one["bbox"][2] * one["bbox"][3], "iscrowd": 0, **one, "id": number}
            for number, one in enumerate(objects, 1)
        ],
    }
