"""Batches in an order that follows only from (seed, epoch), from any position of the epoch on, for any number of
processes.

An item is asked for as (epoch, index), so that its augmentation follows from (seed, epoch, index): neither the number
of workers nor what was loaded before changes a batch, and resuming needs two integers.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..distributed import ALONE, Processes
from ..interrupts import held_back, leave_group
from .source import Corrupt, Examples


class WorkerDied(RuntimeError):
    """A process that loads data was killed."""


_IN_A_ROW = 100  # this many unreadable images mean that their disk is gone

Key = tuple[int, int]  # epoch (0 when evaluating), index
Item = tuple[Any, Any] | Corrupt | OSError  # raised in a worker, an error would bring its traceback as its message


class Batch(NamedTuple):
    """Examples, and those that could not be read; `images` is None when none could."""

    images: Any  # a tensor; for detection a list of them
    labels: Any
    corrupt: list[Corrupt]


class Order:
    """This process's batches of an epoch, as lists of keys. It is rank `part[0]` of `part[1]`.

    Each step takes the next `step_size` examples of an order that all processes have in common; a process has its slice
    of them, in `accumulate` batches. When training, a last step that is not full is dropped; else its slices are
    uneven, and some may be empty.
    """

    count: int
    batch_size: int
    seed: int
    train: bool
    accumulate: int
    slice: int  # examples of one step, of this process
    rank: int
    step_size: int  # examples of one step, of all processes
    epoch: int
    start: int  # examples of the epoch that are done, of all processes

    def __init__(
        self, count: int, batch_size: int, seed: int, train: bool, part: tuple[int, int] = (0, 1), accumulate: int = 1
    ) -> None:
        self.count, self.batch_size, self.seed, self.train = count, batch_size, seed, train
        self.accumulate, self.slice = accumulate, batch_size * accumulate
        self.rank, self.step_size = part[0], batch_size * accumulate * part[1]
        self.epoch, self.start = 0, 0

    @property
    def steps(self) -> int:
        """The number of steps from `start` to the end of the epoch."""
        left = self.count - self.start
        return left // self.step_size if self.train else -(-left // self.step_size)

    def __len__(self) -> int:
        return self.steps * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        if self.train:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        else:
            order = list(range(self.count))
        first = self.start + self.rank * self.slice
        for step in range(self.steps):
            for n in range(self.accumulate):
                at = first + step * self.step_size + n * self.batch_size
                yield [(self.epoch, index) for index in order[at : at + self.batch_size]]


class _Items(Dataset):
    def __init__(self, examples: Examples, seed: int) -> None:
        self.examples, self.seed = examples, seed

    def __getitem__(self, key: Key) -> Item:
        epoch, index = key
        with torch.random.fork_rng(devices=[]):  # dropout draws from the same generator, and must not notice
            # only the CPU's generator: torch.manual_seed would seed those of the GPUs too
            torch.default_generator.manual_seed(random.Random(f"{self.seed}/{epoch}/{index}").getrandbits(32))
            try:
                image, label = self.examples[index]
            except (Corrupt, OSError) as error:
                return error
        return image, label


class Loader:
    """Iterate `batches(epoch, start)`; epochs count from 1. workers: loading processes, at most one per core of this
    process's share of its machine. `accumulate` batches make a step.

    Among several processes the workers are no forks of this one: a fork while a thread of the process group holds a
    lock hangs (seen with gloo; PyTorch warns of it for NCCL).
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        workers: int,
        seed: int,
        train: bool,
        pin: bool,
        processes: Processes = ALONE,
        accumulate: int = 1,
    ) -> None:
        self.order: Order = Order(len(examples), batch_size, seed, train, (processes.rank, processes.size), accumulate)
        if train and not self.order.steps:
            several = [f" on {processes.size} processes"] * (processes.size > 1)
            several += [f" accumulated {accumulate} times"] * (accumulate > 1)
            raise ValueError(
                f"data.batch_size {batch_size}{''.join(several)} is more than the {len(examples)} training images"
            )
        workers = min(workers, max(1, (os.cpu_count() or 1) // processes.local_size))
        self.loader: DataLoader[Any] = DataLoader(
            _Items(examples, seed),
            batch_sampler=self.order,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=pin,
            persistent_workers=train and workers > 0,
            worker_init_fn=_begin,
            multiprocessing_context=_forkserver() if workers and processes.size > 1 else None,
            generator=torch.Generator(),  # its own, because it must not draw from dropout's
        )

    def batches(self, epoch: int = 0, start: int = 0) -> Iterator[Batch]:
        """start: how many examples of the epoch are done, by all processes together. OSError if a disk is gone."""
        self.order.epoch, self.order.start = epoch, start
        unreadable = 0
        with naming_dead_workers(self.loader.num_workers):
            with held_back():
                batches = iter(self.loader)  # here the workers start
            for batch in batches:
                if isinstance(batch, OSError):
                    raise batch
                unreadable = unreadable + len(batch.corrupt) if batch.images is None else 0
                if unreadable >= _IN_A_ROW:
                    raise OSError(f"{unreadable} images in a row cannot be read, the last: {batch.corrupt[-1]}")
                yield batch


@contextmanager
def naming_dead_workers(workers: int) -> Iterator[None]:
    """Raise WorkerDied if one of `workers` dies. Mostly a signal reports it, so the error comes up wherever this
    process is just then. If the worker is handing over a batch, its connection breaks."""
    try:
        yield
    except WorkerDied:
        raise
    except (ConnectionError, EOFError, RuntimeError) as error:
        if not workers or isinstance(error, BrokenPipeError):  # the reader of our output is gone
            raise
        if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
            raise
        reason = str(error).strip(" .") if isinstance(error, RuntimeError) else f"A DataLoader worker is gone ({error})"
        raise WorkerDied(f"{reason}. Out of memory? Try fewer data.workers") from error


def _collate(items: list[Item]) -> Batch | OSError:
    failed = [item for item in items if isinstance(item, OSError)]
    if failed:
        return failed[0]
    corrupt = [item for item in items if isinstance(item, Corrupt)]
    good = [item for item in items if isinstance(item, tuple)]
    if not good or isinstance(good[0][1], dict):  # images of several sizes, with what is in them
        return Batch([image for image, _ in good] or None, [label for _, label in good], corrupt)
    labels = torch.tensor([int(label) for _, label in good], dtype=torch.long)
    return Batch(torch.stack([image for image, _ in good]), labels, corrupt)


def _forkserver() -> multiprocessing.context.BaseContext | None:
    """The context for workers forked by a process of its own that has imported what they need; None without fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _begin(worker: int) -> None:
    leave_group()
