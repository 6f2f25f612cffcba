"""What a run reports: sums over an epoch, a CSV row per epoch, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .distributed import Processes
from .files import replacing

COLUMNS = (
    "epoch", "step", "lr", "loss", "penalty", "top1", "top5", "val_loss", "val_top1", "val_top5", "images_per_second",
    "seconds", "corrupt_images",
)  # fmt: skip


class Sums:
    """Cross entropy, top-1 and top-5 over the examples seen, kept on the device: no synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, examples

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """loss: the mean over the batch."""
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        count = len(labels)
        self.totals += torch.stack([loss.double() * count, ranked[:, 0].sum(), ranked.sum(), loss.new_tensor(count)])

    def means(self) -> dict[str, float]:
        """Accuracies in percent; NaN where nothing was seen."""
        loss, top1, top5, count = self.totals.tolist()
        if not count:
            return dict.fromkeys(("loss", "top1", "top5"), float("nan"))
        return {"loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}

    def over(self, processes: Processes) -> Sums:
        """The sums of all processes together."""
        sums = Sums(self.totals.device)
        sums.totals = processes.sum(self.totals)
        return sums

    @property
    def examples(self) -> int:
        return int(self.totals[3].item())


@dataclass
class Log:
    """metrics.csv and TensorBoard's events in the run's directory."""

    directory: Path

    def __post_init__(self) -> None:
        self.path = self.directory / "metrics.csv"
        self.writer: Any = None

    def start(self, epoch: int) -> None:
        """Begin with `epoch`: rows of it and later ones, of a run that was killed after its checkpoint, are dropped."""
        rows = [row for row in self._rows() if int(row["epoch"]) < epoch]
        with replacing(self.path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # not installed
            return
        self.writer = SummaryWriter(str(self.directory / "tensorboard"), purge_step=epoch)

    def add(self, row: dict[str, float]) -> None:
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow(row)
        if self.writer is not None:
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self.writer.add_scalar(name, value, int(row["epoch"]))
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with open(self.path, newline="") as file:
            return [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdecimal()]


def progress(total: int, done: int, title: str, shown: bool) -> tqdm:
    """A bar on a terminal; in a log file a line every ten seconds."""
    refresh = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        total=total, initial=done, desc=title, unit="step", mininterval=refresh, dynamic_ncols=True, disable=not shown
    )
