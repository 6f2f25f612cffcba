"""A detector trained by the loop of the classifiers: other data, losses and learning rates, and AP at the end.

Batch size and learning rate are those of all processes together, so a schedule in steps means the same on any number of
them. The position of a run and its checkpoints are as in `loop`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..build import NETWORKS, build_model
from ..data.loader import Batch, Loader
from ..data.source import Source
from ..distributed import ALONE, Processes
from ..divergence import first_nonfinite
from ..interrupts import Interrupted
from ..loop import Run
from ..metrics import Sums, progress
from ..paths import to_resume
from ..saving.files import disk_errors_naming, replacing
from .coco import open_coco
from .config import DetectionConfig, Steps
from .evaluation import average_precision, results

LOSSES = ("loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg")
_COLUMNS = ("epoch", "step", "lr", "loss", *LOSSES, "penalty", "images_per_second", "seconds", "corrupt_images")


def factor(step: int, schedule: Steps) -> float:
    """What multiplies the learning rate of `step`, counted from 1: step / warmup while step < warmup, then gamma to the
    number of milestones passed."""
    if step < schedule.warmup:
        return step / schedule.warmup
    return schedule.gamma ** sum(step > milestone for milestone in schedule.milestones)


class DetectionRun(Run):
    """`fit()` trains to the last step, evaluates and writes evaluation.json; `evaluation` holds the same numbers."""

    COMMAND: ClassVar[str] = "detect"

    config: DetectionConfig  # type: ignore[assignment]

    def __init__(
        self,
        config: DetectionConfig,
        directory: Path,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
        keep: bool = True,
    ) -> None:
        parts = processes.size * config.accumulate
        if config.data.batch_size % parts:
            raise ValueError(
                f"data.batch_size is that of all processes together: {config.data.batch_size} is no multiple of "
                f"{processes.size} processes x accumulate {config.accumulate}"
            )
        self.evaluation: dict[str, float] = {}
        super().__init__(config, directory, state, processes, keep)  # type: ignore[arg-type]
        torch.backends.cudnn.benchmark = False  # images have many sizes

    # -- what is trained -----------------------------------------------------------------------------------------------

    def _open_source(self) -> Source:
        return open_coco(self.config.data.source)

    def _build_model(self) -> nn.Module:
        from ...models import detection  # imports torchvision, which others do without

        model, chosen = self.config.model, self.config.detector
        if model.name not in (*NETWORKS, *detection.RESNETS):
            raise ValueError(
                f"model.name must be one of {', '.join((*NETWORKS, *detection.RESNETS))}, got {model.name!r}"
            )
        body = model.name if model.name in detection.RESNETS else build_model(model, 1, 3)
        n = chosen.proposals
        return (detection.maskrcnn if chosen.masks else detection.fasterrcnn)(
            body,
            num_classes=self.source.num_classes,
            weights_backbone=chosen.weights_backbone,
            trainable_backbone_layers=chosen.trainable_backbone_layers,
            norm=chosen.norm,  # type: ignore[arg-type]
            channels=chosen.channels,
            min_size=chosen.min_size,
            max_size=chosen.max_size,
            rpn_pre_nms_top_n_train=n,
            rpn_post_nms_top_n_train=n,
            rpn_pre_nms_top_n_test=max(1, n // 2),
            rpn_post_nms_top_n_test=max(1, n // 2),
            box_batch_size_per_image=chosen.rois,
        )

    def _lr(self) -> float:
        return self.config.optimizer.lr

    def batch_note(self) -> str:
        return "batch and learning rate stay as they are"

    def _loaders(self) -> tuple[Loader, Loader]:
        data, seed, pin = self.config.data, self.config.seed, False
        own = data.batch_size // (self.processes.size * self.config.accumulate)
        train = Loader(self.source.train, own, data.workers, seed, True, pin, self.processes, self.config.accumulate)
        return train, Loader(self.source.val, data.eval_batch_size, data.workers, seed, False, pin, self.processes)

    def _new_sums(self) -> Sums:
        return _LossSums(self.device)

    def _columns(self) -> Sequence[str]:
        return _COLUMNS

    @staticmethod
    def at_end(config: Any, position: dict[str, Any]) -> str:
        """Always empty: a run that has made its steps is evaluated again."""
        return ""

    @property
    def finished(self) -> bool:
        return self.step >= self.config.schedule.steps

    def _title(self) -> str:
        return f"epoch {self.epoch}, to step {self.config.schedule.steps}"

    def _announce(self) -> None:
        data, size = self.config.data, self.processes.size
        if size * self.config.accumulate > 1:
            own = data.batch_size // (size * self.config.accumulate)
            self.processes.say(f"{size} processes, batch {size} x {self.config.accumulate} x {own} = {data.batch_size}")

    def _train_step(self, batches: list[Batch]) -> None:
        self._set_rates()
        super()._train_step(batches)

    def _set_rates(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.base_lr, strict=True):
            group["lr"] = lr * factor(self.step + 1, self.config.schedule)

    def _loss(self, batch: Batch, n: int) -> tuple[Tensor, float, tuple[Any, ...]]:
        images, targets = self._with_targets(batch)
        with self._autocast():
            losses = self.forward(images, targets)
        total = torch.stack([value.float() for value in losses.values()]).sum()
        return total, float(batch.images is not None), (losses, len(images))

    def _first_nonfinite(self, batch: Batch, n: int) -> str | None:
        images, targets = self._with_targets(batch)
        with self._autocast():
            return first_nonfinite(_Called(self.model, targets), images)  # type: ignore[arg-type]

    def _with_targets(self, batch: Batch) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
        """The batch on the device; if no image could be read, a black one with nothing in it."""
        if batch.images is None:
            return [self._black()[0]], [_nothing(self.device)]
        images = [image.to(self.device) for image in batch.images]
        return images, [{name: value.to(self.device) for name, value in one.items()} for one in batch.labels]

    def _settle(self) -> None:
        self._loss(Batch(None, [], []), 1)[0].backward()
        self.optimizer.zero_grad(set_to_none=False)

    def _validate(self) -> dict[str, float]:
        """No columns: a detector is evaluated only at the end, see `fit`."""
        return {}

    def _line(self, row: dict[str, float]) -> str:
        return (
            f"epoch {self.epoch}, step {self.step}: lr {row['lr']:.4g}, loss {row['loss']:.4f}, "
            f"penalty {row['penalty']:.4g}; {row['images_per_second']:.1f} images/s"
        )

    # -- average precision ---------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train, evaluate, write evaluation.json; returns the average precisions. Raises as `Run.fit` does."""
        super().fit()
        with self._signals:
            self.evaluation = self._evaluate()
        if self.processes.main and self.keep:
            path = self.directory / "evaluation.json"
            with replacing(path) as temporary, disk_errors_naming(path):
                found = {name: None if math.isnan(value) else value for name, value in self.evaluation.items()}
                temporary.write_text(json.dumps({"step": self.step, **found}, indent=2) + "\n")  # JSON has no NaN
        return self.evaluation

    def outcome(self) -> str:
        kinds = ("box", "mask")[: 1 + self.config.detector.masks]
        return "; ".join(
            f"{kind} AP {self.evaluation[f'{kind}_AP']:.2f}, AP50 {self.evaluation[f'{kind}_AP50']:.2f}, "
            f"AP75 {self.evaluation[f'{kind}_AP75']:.2f}"
            for kind in kinds
        )

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """The average precisions; each process has its part of the images. A signal ends it between two batches."""
        self.model.eval()
        rows: list[dict[str, Any]] = []
        order = self.val_loader.order
        with progress(order.steps, 0, "evaluation", self.processes.main) as bar:
            for batch in self.val_loader.batches():
                self._note(batch.corrupt)
                images = [image.to(self.device) for image in batch.images or []]
                with self._autocast():
                    found = self.model(images) if images else []
                for about, one in zip(batch.labels, found, strict=True):
                    rows += results(about["image_id"], one)
                bar.update()
                received = torch.tensor(float(self._signals.received), device=self.device)
                if stop := int(self.processes.largest(received).get()):
                    raise Interrupted(stop, self.step, to_resume(self.directory, self.COMMAND))
        every = [row for part in self.processes.gather(rows) for row in part]
        annotations, masks = self.source.val.annotations, self.config.detector.masks  # type: ignore[attr-defined]
        return self.processes.from_main(lambda: average_precision(annotations, every, masks))


class _LossSums(Sums):
    """The losses over the examples seen."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(len(LOSSES) + 1, dtype=torch.float64, device=device)  # the last: examples

    @torch.no_grad()
    def add(self, losses: Mapping[str, Tensor], count: int) -> None:  # type: ignore[override]
        """losses: the means over a batch of `count`."""
        nothing = self.totals.new_zeros(())
        means = torch.stack([losses.get(name, nothing).detach().double() for name in LOSSES])
        self.totals += torch.cat([means * count, self.totals.new_tensor([count])])

    def means(self) -> dict[str, float]:
        *sums, count = self.totals.tolist()
        means = [total / count if count else float("nan") for total in sums]
        return {"loss": sum(means), **dict(zip(LOSSES, means, strict=True))}

    def over(self, processes: Processes) -> Sums:
        sums = _LossSums(self.totals.device)
        sums.totals = processes.sum(self.totals)
        return sums

    @property
    def examples(self) -> int:
        return int(self.totals[-1].item())


class _Called(nn.Module):
    """A detector that is called only with its images."""

    def __init__(self, detector: nn.Module, targets: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.detector, self.targets = detector, targets

    def forward(self, images: list[Tensor]) -> dict[str, Tensor]:
        return self.detector(images, self.targets)


def _nothing(device: torch.device) -> dict[str, Tensor]:
    return {
        "boxes": torch.zeros(0, 4, device=device),
        "labels": torch.zeros(0, dtype=torch.long, device=device),
        "masks": torch.zeros(0, 32, 32, dtype=torch.uint8, device=device),
    }
