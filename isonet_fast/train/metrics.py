"""What a run reports: sums over an epoch, a CSV row per epoch, TensorBoard, a progress bar."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..safe_load import few
from .distributed import Processes
from .saving.files import disk_errors_naming, replacing

COLUMNS = (
    "epoch", "step", "lr", "loss", "penalty", "top1", "top5", "val_loss", "val_top1", "val_top5", "images_per_second",
    "seconds", "corrupt_images",
)  # fmt: skip


class Sums:
    """Cross entropy, top-1 and top-5 over the examples seen, kept on the device: no synchronisation per step."""

    def __init__(self, device: torch.device) -> None:
        self.totals: Tensor = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, examples

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
    own: Sequence[str] = COLUMNS

    def __post_init__(self) -> None:
        self.path: Path = self.directory / "metrics.csv"
        self.events: Path = self.directory / "tensorboard"
        self.columns: list[str] = list(self.own)
        self.writer: Any = None

    def start(self, epoch: int) -> None:
        """Begin with `epoch`. Rows of this and later epochs, from a run killed after its checkpoint, are dropped.

        Columns that somebody has added stay, and are left empty in new rows. ValueError for a file that is no longer a
        table of ours.
        """
        rows = [row for row in self._read() if int(row["epoch"]) < epoch]
        with replacing(self.path) as temporary, disk_errors_naming(self.path):
            with open(temporary, "w", newline="") as file:
                writer = csv.DictWriter(file, self.columns)
                writer.writeheader()
                writer.writerows(rows)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:  # not installed
            return
        with disk_errors_naming(self.events):
            self.writer = SummaryWriter(str(self.events), purge_step=epoch)

    def add(self, row: dict[str, float]) -> None:
        with disk_errors_naming(self.path), open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.columns).writerow(row)
        if self.writer is None:
            return
        with disk_errors_naming(self.events):
            for name, value in row.items():
                if name not in ("epoch", "step"):
                    self.writer.add_scalar(name, value, int(row["epoch"]))
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            with suppress(OSError):  # metrics.csv has the same numbers; the error that ended the run matters more
                self.writer.close()

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        try:
            with open(self.path, newline="") as file:
                reader = csv.DictReader(file)
                header = list(reader.fieldnames or [])
                rows = [row for row in reader if (row.get("epoch") or "").isdecimal()]
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{self.path} is no CSV file: {error}; mend it, or move it away") from error
        if header and "epoch" not in header:
            raise ValueError(f"{self.path} is no table of a run: its columns are {few(header)}; move it away")
        self.columns = [*self.own, *(name for name in header if name not in self.own)]
        for row in rows:
            if None in row:
                raise ValueError(
                    f"{self.path} has more values than column names in the row of epoch {row['epoch']}; "
                    "name the column, or move the file away"
                )
        return rows


def progress(total: int, done: int, title: str, shown: bool) -> tqdm[Any]:
    """A bar on a terminal; in a log file a line every ten seconds."""
    refresh = 0.1 if sys.stderr.isatty() else 10
    return tqdm(
        total=total, initial=done, desc=title, unit="step", mininterval=refresh, dynamic_ncols=True, disable=not shown
    )
