"""The configuration of a detection run: that of classifiers, and a section for the detector. It counts in steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..config import Checkpoint, Model, Optimizer, Penalty, check
from ..saving import resuming
from ..saving.resuming import ChangeRule


@dataclass
class Detector:
    masks: bool = True  # Mask R-CNN, else Faster R-CNN
    weights_backbone: str | None = None  # a checkpoint of the classifier
    trainable_backbone_layers: int | None = None  # counted from the last stage; null: 3 with weights_backbone, else all
    norm: str = "live"  # frozen or live BatchNorm, if the backbone has any
    channels: int = 256  # of the pyramid and of the heads
    min_size: int = 800  # of the images as the network sees them: the shorter side,
    max_size: int = 1333  # and the longer one at most
    proposals: int = 2000  # per image; half as many in evaluation
    rois: int = 512  # boxes among the proposals that train, per image


@dataclass
class Data:
    source: str = ""  # coco:DIR
    batch_size: int = 16  # of all processes together
    eval_batch_size: int = 1  # of each process
    workers: int = 4
    strict: bool = False  # a corrupt image is an error instead of being skipped


@dataclass
class Steps:
    steps: int = 90_000
    warmup: int = 500  # steps, lr * step / warmup
    milestones: list[int] = field(default_factory=lambda: [60_000, 80_000])  # x gamma after each
    gamma: float = 0.1


@dataclass
class DetectionConfig:
    PRESETS: ClassVar[str] = "configs/detection"
    fsdp: ClassVar[bool] = False  # switches of the loop that detectors do not have
    channels_last: ClassVar[bool] = False
    compile: ClassVar[bool] = False

    model: Model = field(
        default_factory=lambda: Model("risonet50")
    )  # or a ResNet of torchvision; its head is taken off
    detector: Detector = field(default_factory=Detector)
    data: Data = field(default_factory=Data)
    optimizer: Optimizer = field(default_factory=lambda: Optimizer(lr=0.02))  # the rate of the whole batch
    schedule: Steps = field(default_factory=Steps)
    penalty: Penalty = field(default_factory=Penalty)
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every_steps=1000))
    accumulate: int = 1  # parts that each process cuts its share of a batch into
    precision: str = "float32"  # of autocast
    seed: int = 0
    device: str = "auto"  # cuda where there is one

    def __post_init__(self) -> None:
        sizes = ("channels", "min_size", "max_size", "proposals", "rois")
        check(self, ("data.eval_batch_size", "schedule.steps", *(f"detector.{name}" for name in sizes)))
        if self.model.dropout is not None:
            raise ValueError(f"model.dropout must be null, got {self.model.dropout}: a backbone has no classifier")

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


_WEIGHTS = resuming.RULES["model.name"]
_RECIPE = resuming.RULES["optimizer.lr"]
_INITIAL = ChangeRule(False, "it was read when the run began")
_HERE = {
    "detector.masks": _WEIGHTS,
    "detector.weights_backbone": _INITIAL,
    "detector.trainable_backbone_layers": ChangeRule(False, "the optimizer in the checkpoint has the others' momentum"),
    "detector.norm": _WEIGHTS,
    "detector.channels": _WEIGHTS,
    "detector.min_size": _RECIPE,
    "detector.max_size": _RECIPE,
    "detector.proposals": _RECIPE,
    "detector.rois": _RECIPE,
    "schedule.steps": _RECIPE,
}
_KEYS = resuming.flat(DetectionConfig().as_dict())
RULES = {key: _HERE[key] if key in _HERE else resuming.RULES[key] for key in _KEYS}
