"""Batches in an order that follows from (seed, epoch) alone, from any position of the epoch on.

An item is asked for as (epoch, index), so that its augmentation follows from (seed, epoch, index): neither the number
of workers nor what was loaded before changes a batch, and resuming needs two integers.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .datasets import Corrupt, Examples


class WorkerDied(RuntimeError):
    """A process that loads data was killed."""


Key = tuple[int, int]  # epoch (0 when evaluating), index
Item = tuple[Tensor, int] | Corrupt


class Batch(NamedTuple):
    """Examples, and those that could not be read; `images` is None when none could."""

    images: Tensor | None
    labels: Tensor
    corrupt: list[Corrupt]


class Order:
    """The batches of an epoch as lists of keys; a last batch that is not full is dropped when training."""

    def __init__(self, count: int, batch_size: int, seed: int, train: bool) -> None:
        self.count, self.batch_size, self.seed, self.train = count, batch_size, seed, train
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return self.count // self.batch_size if self.train else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        if self.train:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = list(range(self.count))
        for n in range(self.start, len(self)):
            yield [(self.epoch, index) for index in order[n * self.batch_size : (n + 1) * self.batch_size]]


class _Items(Dataset):
    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __getitem__(self, key: Key) -> Item:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # dropout draws from the same generator, and must not notice
            # of the CPU alone: torch.manual_seed would seed those of the GPUs too
            torch.default_generator.manual_seed(random.Random(f"{self.seed}/{epoch}/{index}").getrandbits(32))
            try:
                image, label = self.examples[index]
            except Corrupt as corrupt:
                return corrupt
        return image, int(label)


class Loader:
    """Iterate `batches(epoch, start)`; epochs count from 1. workers: loading processes, at most one a core."""

    def __init__(self, examples: Examples, batch_size: int, workers: int, seed: int, train: bool, pin: bool) -> None:
        if train and len(examples) < batch_size:
            raise ValueError(f"data.batch_size {batch_size} is more than the {len(examples)} training images")
        workers = min(workers, os.cpu_count() or 1)
        self.order = Order(len(examples), batch_size, seed, train)
        self.loader: DataLoader = DataLoader(
            _Items(examples, seed),
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=train and workers > 0,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),  # its own: it must not draw from the generator that dropout uses
        )

    def __len__(self) -> int:
        return len(self.order)

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        self.order.epoch, self.order.start = epoch, start
        try:
            yield from self.loader
        except RuntimeError as error:
            if "DataLoader worker" in str(error):
                raise WorkerDied(f"{error}. Out of memory? Try fewer data.workers") from error
            raise


def _collate(items: list[Item]) -> Batch:
    good = [item for item in items if not isinstance(item, Corrupt)]
    corrupt = [item for item in items if isinstance(item, Corrupt)]
    images = torch.stack([image for image, _ in good]) if good else None
    return Batch(images, torch.tensor([label for _, label in good], dtype=torch.long), corrupt)


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one saves and ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
