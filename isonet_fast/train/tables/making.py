"""Making a table: every run that is not there yet, row by row, then the table's files.

If there are several learning rates, each row is trained with the first seed at all of them, then with the other seeds
at the best one. Several processes may make one table: each takes the runs on which no other is at work.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..distributed import Processes
from . import running, writing
from .plan import Table, TableRow
from .running import Result

POLL = 5.0  # seconds between two looks at the runs of other processes


@dataclass(frozen=True)
class Making:
    """A table being made. settings: they override the rows'. folder: it holds the runs and the table's files."""

    table: Table
    folder: Path
    seeds: int
    settings: Sequence[str]
    processes: Processes

    def complete(self, rows: Sequence[TableRow]) -> None:
        """Make what is missing of these rows, and write the table, with what is there already of its other rows."""
        total = len(rows) * (len(self.table.rates) + self.seeds - 1)
        while True:
            done = [self._row(row, n * total // len(rows), total) for n, row in enumerate(rows)]
            if all(done):
                break
            time.sleep(POLL)
        self.processes.from_main(lambda: writing.picture(self.table, self._write(), self.folder))

    def _row(self, row: TableRow, before: int, total: int) -> bool:
        """Whether every run of the row has a result now."""
        found = []
        for n, lr in enumerate(self.table.rates):
            found.append(self._run(row, lr, 0, f"run {before + n + 1} of at most {total}"))
        first = {lr: result for lr, result in zip(self.table.rates, found, strict=True) if result is not None}
        complete = len(first) == len(found)
        lr = best(first)
        if complete and lr in first and first[lr].top1 is not None:
            for seed in range(1, self.seeds):
                n = before + len(found) + seed
                complete &= self._run(row, lr, seed, f"run {n} of at most {total}") is not None
        self.processes.from_main(self._write)
        return complete

    def _run(self, row: TableRow, lr: float | None, seed: int, where: str) -> Result | None:
        settled, folder = row.config(seed, lr, self.settings), self._folder(row, lr, seed)
        rate = f", learning rate {settled.optimizer.lr:g}"
        self.processes.say(f"table {self.table.number}, {where}: {row.name}{rate}, seed {seed}")
        return running.make(settled, folder, self.processes)

    def _folder(self, row: TableRow, lr: float | None, seed: int) -> Path:
        return self.folder / row.folder / (f"seed-{seed}" if lr is None else f"lr-{lr:g}-seed-{seed}")

    def _write(self) -> list[dict[str, str]]:
        lines = [self._line(row) for row in self.table.rows]
        writing.files(self.table, lines, self.folder)
        return lines

    def _line(self, row: TableRow) -> dict[str, str]:
        first = {lr: result for lr in self.table.rates if (result := self._read(row, lr, 0)) is not None}
        lr = best(first)
        seeds = [self._read(row, lr, seed) for seed in range(self.seeds)] if first else []
        used = row.config(0, lr, self.settings).optimizer.lr
        return writing.line(self.table, row, first, used, [result for result in seeds if result is not None])

    def _read(self, row: TableRow, lr: float | None, seed: int) -> Result | None:
        return running.read(row.config(seed, lr, self.settings), self._folder(row, lr, seed))


def best(results: dict[float | None, Result]) -> float | None:
    """The learning rate with the highest accuracy; if every run diverged, the smallest."""
    accuracies = {lr: -1.0 if result.top1 is None else result.top1 for lr, result in results.items()}
    return max(accuracies, key=lambda lr: accuracies[lr], default=None)
