"""The training loop: one run, step by step, and how it stops and is resumed.

Everything that a step depends on is in a checkpoint (`snapshot`): weights, optimizer, loss scale, random generators and
the position (epoch, examples of it done). The data follow from the seed and the position (`loader`), the learning rate
from the epoch (`schedule`). So a run resumed from any step goes on with the same bits on a CPU.

Under torchrun every process runs this loop. All reach the lines that exchange something (`distributed`): the verdict on
each step, the sums at the end of an epoch, the state for a checkpoint. Rank 0 reports and writes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..geometry import Penalty
from ..param_groups import param_groups
from ..regularizer import OrthoRegularizer
from . import schedule, snapshot
from .build import autocast, build_model
from .config import Config
from .data.datasets import open_source
from .data.loader import Batch, Loader, WorkerDied, naming_dead_workers
from .data.source import Corrupt, Source
from .distributed import ALONE, OnHost, Processes, shard, synchronising, wrap
from .divergence import Diverged, first_nonfinite, first_nonfinite_weight
from .interrupts import Interrupted, Signals
from .metrics import COLUMNS, Log, Sums, progress
from .mixup import Mixed, mixup
from .paths import to_resume
from .saving import checkpoint
from .saving.files import sweep
from .validation import to_device, validate


class Run:
    """One training run in one directory. `fit()` trains it to its end.

    The methods under "what is trained" are those of classifiers; `detection.run` overrides them for detectors.

    keep: False for a run that leaves no files, prints no lines and answers no signals; it is there for its `rows` and
        its `model`.
    """

    COMMAND: ClassVar[str] = "train"  # the command that resumes such a run

    config: Config
    directory: Path
    processes: Processes
    keep: bool
    device: torch.device
    source: Source
    model: nn.Module
    wrapped: nn.Module  # for data parallelism
    sharded: bool
    optimizer: torch.optim.SGD
    base_lr: list[float]  # of each parameter group
    reg: OrthoRegularizer
    scaler: torch.amp.GradScaler
    train_loader: Loader
    val_loader: Loader
    log: Log | None
    sums: Sums
    epoch: int
    examples: int  # how many of the epoch all processes together have done
    step: int
    best: float
    penalty: Tensor  # of the last step, unweighted, this process's share of it

    def __init__(
        self,
        config: Config,
        directory: Path,
        state: dict[str, Any] | None = None,
        processes: Processes = ALONE,
        keep: bool = True,
    ) -> None:
        self.config, self.directory, self.processes, self.keep = config, directory, processes, keep
        if processes.main and keep:
            sweep(directory)
        self.device = processes.device(config.device)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        torch.manual_seed(config.seed)
        self.source = self._open_source()
        for note in self.source.notes:
            processes.say(note)
        self.model = self._build_model().to(self.device)
        self.sharded = config.fsdp and processes.size > 1
        if config.channels_last and not self.sharded:  # shards are contiguous; only images bring the format
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.sharded:
            shard(self.model, processes, self.device, config.precision)
        self.wrapped = self.model if self.sharded else wrap(self.model, processes, self.device)
        groups = param_groups(self.model, self._lr(), config.optimizer.weight_decay)
        self.base_lr = [group["lr"] for group in groups]
        self.optimizer = torch.optim.SGD(groups, self.base_lr[0], config.optimizer.momentum)
        self.reg = OrthoRegularizer(
            self.wrapped,
            config.penalty.coeff,
            cast(Penalty, config.penalty.kind),  # the configuration has checked it
            interval=config.penalty.interval,
            work_group=processes.group,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.forward: nn.Module = torch.compile(self.wrapped) if config.compile else self.wrapped  # type: ignore[assignment]
        self.train_loader, self.val_loader = self._loaders()
        self.sums = self._new_sums()
        self.log = Log(directory, self._columns()) if processes.main and keep else None
        self.rows: list[dict[str, float]] = []  # of the epochs that this process has seen end, as in metrics.csv
        self.epoch, self.examples, self.step, self.best = 1, 0, 0, -1.0
        self.penalty = torch.tensor(float("nan"), device=self.device)
        self.corrupt: dict[str, str] = {}
        self._signals = Signals(twice_ends=processes.size == 1)
        self._stop = 0  # the signal that all processes stop for
        self._saved_step: int | None = None  # of the last checkpoint, if there is one
        if self.wrapped is not self.model:
            self._settle()
        if state is None:
            self.seed()
        else:
            snapshot.restore(self, state)
            self._saved_step = self.step

    def _settle(self) -> None:
        """Make one backward pass without effect. After its first backward pass DDP puts the gradients in another order,
        in which three or more processes add with other roundings. A resumed run would have a first pass of its own, and
        so other bits."""
        self.wrapped(self._black()).sum().backward()
        self.optimizer.zero_grad(set_to_none=False)

    def seed(self) -> None:
        """Seed dropout, which each process draws for itself. The weights are the same everywhere and exist by now."""
        torch.manual_seed(random.Random(f"{self.config.seed}/{self.step}/{self.processes.rank}").getrandbits(63))

    # -- what is trained -----------------------------------------------------------------------------------------------

    def _open_source(self) -> Source:
        return open_source(self.config.data, self.config.seed)

    def _build_model(self) -> nn.Module:
        return build_model(self.config.model, self.source.num_classes, self.source.channels)

    def _lr(self) -> float:
        """The learning rate of all processes together: the configured one is per GPU, as the batch is."""
        return self.config.optimizer.lr * self.processes.size

    def batch_note(self) -> str:
        """What changes with the number of processes, for the message of a resumed run."""
        return f"the learning rate is that of {self.processes.size} x the batch"

    def _loaders(self) -> tuple[Loader, Loader]:
        data, seed, pin = self.config.data, self.config.seed, self.device.type == "cuda"
        train = Loader(
            self.source.train, data.batch_size, data.workers, seed, True, pin, self.processes, self.config.accumulate
        )
        return train, Loader(self.source.val, data.eval_batch_size, data.workers, seed, False, pin, self.processes)

    def _new_sums(self) -> Sums:
        return Sums(self.device)

    def _columns(self) -> Sequence[str]:
        return COLUMNS

    @staticmethod
    def at_end(config: Any, position: dict[str, Any]) -> str:
        """For a checkpoint that has nothing left to do, which setting to raise; else the empty string."""
        epochs = config.schedule.epochs
        return f"{epochs} epochs; raise schedule.epochs" if position["epoch"] > epochs else ""

    def outcome(self) -> str:
        return f"validation top-1 {self.rows[-1]['val_top1']:.2f} %"

    @property
    def finished(self) -> bool:
        return self.epoch > self.config.schedule.epochs

    def _title(self) -> str:
        return f"epoch {self.epoch}/{self.config.schedule.epochs}"

    def _set_rates(self) -> None:
        """The learning rates of the step that comes."""
        schedule.apply(self.optimizer, self.base_lr, self.epoch, self.config.schedule)

    def _loss(self, batch: Batch, n: int) -> tuple[Tensor, float, tuple[Any, ...]]:
        """The loss of the n-th batch of this step, the weight of this loss, and the arguments of `self.sums.add`."""
        mixed, weight = self._mixed(batch, n)
        with self._autocast():
            logits = self.forward(mixed.images)
        loss = mixed.loss(logits.float())
        return loss, weight, (logits.detach(), mixed.labels, loss.detach())

    def _first_nonfinite(self, batch: Batch, n: int) -> str | None:
        with self._autocast():
            return first_nonfinite(self.model, self._mixed(batch, n)[0].images)

    def _validate(self) -> dict[str, float]:
        """The validation columns of a row."""
        sums, corrupt = validate(
            self.model, self.val_loader, self.config, self.device, self._black() if self.sharded else None
        )
        self._note(corrupt)
        return {f"val_{name}": value for name, value in sums.over(self.processes).means().items()}

    def _line(self, row: dict[str, float]) -> str:
        return (
            f"epoch {self.epoch}: lr {row['lr']:.4g}, loss {row['loss']:.4f}, penalty {row['penalty']:.4g}, "
            f"top-1 {row['top1']:.2f} %; validation loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %, "
            f"top-5 {row['val_top5']:.2f} %; {row['images_per_second']:.0f} images/s"
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, name: str = "latest") -> None:
        state, path = snapshot.take(self), self._path(name)
        self._check(state["model"])
        if not self.keep:
            return
        if self.sharded:
            checkpoint.save_sharded(state, path, self.processes)
        else:
            self.processes.from_main(lambda: checkpoint.save(state, path))
        if name == "latest":
            self._saved_step = self.step

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.{'dcp' if self.sharded else 'pt'}"

    # -- training ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the last epoch; returns the last row of metrics.csv. Raises Diverged, Interrupted, WorkerDied, and
        OSError for a full disk or data that are gone; each says how to go on."""
        with self._signals if self.keep else nullcontext():
            try:
                if not self.step:
                    self.save()  # so that a divergence in the first epoch has a checkpoint to name
                if self.log is not None:
                    self.log.start(self.epoch)
                self._announce()
                with naming_dead_workers(self.train_loader.loader.num_workers):
                    while not self.finished:
                        self._train_epoch()
            except (OSError, WorkerDied) as error:
                kind = WorkerDied if isinstance(error, WorkerDied) else OSError
                how = "" if self._saved_step is None else f" Go on with: {to_resume(self.directory, self.COMMAND)}"
                raise kind(f"{error};{self._last_good()}{how}") from error
            finally:
                if self.log is not None:
                    self.log.close()
        return self.rows[-1] if self.rows else {}

    def _announce(self) -> None:
        """Print the total batch and learning rate: those of the recipe are per GPU."""
        size, accumulate, batch = self.processes.size, self.config.accumulate, self.config.data.batch_size
        if size * accumulate > 1:
            self.processes.say(
                f"{size} processes, batch {size} x {accumulate} x {batch} = {size * accumulate * batch}, "
                f"learning rate {size} x {self.config.optimizer.lr:g} = {self.base_lr[0]:g}"
            )

    def _train_epoch(self) -> None:
        self._set_rates()
        start, before = time.perf_counter(), self.sums.over(self.processes).examples
        self.model.train()
        order = self.train_loader.order
        order.start, done = self.examples, self.examples // order.step_size
        with progress(done + order.steps, done, self._title(), self.processes.main) as bar:
            batches: list[Batch] = []
            for batch in self.train_loader.batches(self.epoch, self.examples):
                batches.append(batch)
                if len(batches) < self.config.accumulate:
                    continue
                self._train_step(batches)
                batches = []
                self.examples += order.step_size
                bar.update()
                if self.step % 20 == 0:
                    sums, penalty = self.sums.over(self.processes), self.processes.sum(self.penalty).item()
                    rate, loss = (sums.examples - before) / (time.perf_counter() - start), sums.means()["loss"]
                    bar.set_postfix_str(f"{rate:.0f} images/s, loss {loss:.3f}, penalty {penalty:.4g}", refresh=False)
                self._after_step()
                if self.finished:
                    break
        sums, seconds = self.sums.over(self.processes), time.perf_counter() - start
        self._end_epoch(sums, (sums.examples - before) / seconds, seconds)

    def _train_step(self, batches: list[Batch]) -> None:
        """Forward, cross entropy, backward, penalty, clipping, optimizer. In this order the host looks at the loss
        while the device computes the gradients, and nothing has changed yet if the loss is not finite.

        Among several processes with whole weights (DDP) each adds its share of the penalty before the last backward,
        which averages the gradients. There the share is in the loss scaler's units.
        """
        self.step += 1
        for batch in batches:
            self._note(batch.corrupt)
        share_first = self.processes.size > 1 and not self.sharded
        # The loss scale, on its way to the host long before it is needed
        scale = OnHost(self.scaler.scale(torch.ones((), device=self.device))) if share_first else None
        self.optimizer.zero_grad(set_to_none=not share_first)  # DDP's buckets stay where they are
        seen: list[tuple[Tensor, tuple[Any, ...]]] = []
        for n, batch in enumerate(batches, 1):
            last = n == len(batches)
            with synchronising(self.wrapped, last):
                loss, weight, told = self._loss(batch, n)
                seen.append((loss.detach(), told))
                if last:
                    verdict = self._ask([loss for loss, _ in seen])
                    if scale is not None:
                        self.reg.accumulate_grad_(scale.get())
                self.scaler.scale(loss * (weight / len(batches))).backward()
        bad, self._stop = (int(value) for value in verdict.get())
        if bad:
            self._diverged(batches, self.processes.size - bad)
        self.scaler.unscale_(self.optimizer)
        if not share_first:
            self.reg.accumulate_grad_()
        if self.reg.computed:  # not before the first one of `interval` calls
            self.penalty = self.reg.last
        if self.config.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for batch, (_, told) in zip(batches, seen, strict=True):
            if batch.images is not None:
                self.sums.add(*told)

    def _ask(self, losses: list[Tensor]) -> OnHost:
        """Two numbers, the same on all processes: size - rank of the first process whose loss is not finite, else 0;
        and the signal that a process was sent, else 0."""
        bad = torch.stack(losses).isfinite().logical_not().any() * float(self.processes.size - self.processes.rank)
        return self.processes.largest(torch.stack([bad, torch.full_like(bad, self._signals.received)]))

    def _after_step(self) -> None:
        every = self.config.checkpoint.every_steps
        if self._stop:
            self.save()
            raise Interrupted(self._stop, self.step, to_resume(self.directory, self.COMMAND))
        if every and self.step % every == 0:
            self.save()

    def _end_epoch(self, trained: Sums, rate: float, seconds: float) -> None:
        """Validate, write the row, move on to the next epoch, save."""
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **trained.means(),
            "penalty": self.processes.sum(self.penalty).item(),
            "images_per_second": rate,
            "seconds": seconds,
        }
        row |= self._validate()
        row["corrupt_images"] = len(self.all_corrupt())
        self.rows.append(row)
        if self.log is not None:
            self.log.add(row)
            self.processes.say(self._line(row))
        score, done = row.get("val_top1", self.best), self.epoch
        best, self.best = score > self.best, max(self.best, score)
        self.epoch, self.examples = self.epoch + 1, 0
        self.sums.totals.zero_()
        if best:
            self.save("best")
        keep = self.config.checkpoint.keep_every_epochs
        if keep and done % keep == 0:
            self.save(f"epoch-{done}")
        self.save()
        self._stop = int(self.processes.largest(torch.tensor(float(self._signals.received), device=self.device)).get())
        if self._stop and not self.finished:
            raise Interrupted(self._stop, self.step, to_resume(self.directory, self.COMMAND))

    # -- what can go wrong ------------------------------------------------------------------------------------------

    def _diverged(self, batches: list[Batch], rank: int) -> None:
        """All processes look for the layer, because a sharded forward pass needs all of them; `rank` has the loss."""
        layers = [self._first_nonfinite(batch, n) for n, batch in enumerate(batches, 1)]
        found = next((layer for layer in layers if layer), None)
        raise Diverged(
            self.step,
            self.processes.gather(found)[rank],
            f" The weights are still those of step {self.step - 1};{self._last_good()}",
            rank if self.processes.size > 1 else None,
        )

    def _check(self, weights: dict[str, Tensor]) -> None:
        """Keep weights that are not finite out of every file. They come from a gradient that is not finite although the
        loss is. This is found here or by the next loss."""
        found = [name for name in self.processes.gather(first_nonfinite_weight(weights)) if name is not None]
        if found:
            raise Diverged(self.step, None, f" Nothing was saved;{self._last_good()}", weight=found[0])

    def _last_good(self) -> str:
        if self._saved_step is None:
            return " nothing has been saved yet."
        return f" the last good checkpoint is {self._path('latest')} (step {self._saved_step})."

    def _note(self, corrupt: list[Corrupt]) -> None:
        """Report corrupt images: the process that comes upon one says so."""
        who = f"rank {self.processes.rank}: " if self.processes.size > 1 else ""
        for image in corrupt:
            if self.config.data.strict:
                raise ValueError(f"corrupt image: {image}; without --strict it would be skipped")
            if image.path not in self.corrupt:
                self.corrupt[image.path] = image.reason
                print(f"{who}skipped a corrupt image, the {_ordinal(len(self.corrupt))}: {image}", flush=True)

    def all_corrupt(self) -> dict[str, str]:
        """The corrupt images that any process has come upon. From then on every process knows them."""
        for others in self.processes.gather(self.corrupt):
            self.corrupt.update(others)
        return dict(sorted(self.corrupt.items()))

    def _mixed(self, batch: Batch, n: int) -> tuple[Mixed, float]:
        """The n-th batch of this step as it is trained on, and the weight of its loss. What mixup draws follows from
        (seed, step, rank, n), so a resumed run draws the same."""
        x, y, weight = self._to_device(batch)
        seed = f"{self.config.seed}/{self.step}/{self.processes.rank}/{n}"
        return mixup(x, y, self.config.data.mixup, seed), weight

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor, float]:
        """Images, labels, and the weight of their loss. A batch of which nothing could be read becomes one black image
        of weight 0, because the other processes wait for this one's gradients."""
        if batch.images is None:
            return self._black(), torch.zeros(1, dtype=torch.long, device=self.device), 0.0
        return *to_device(batch.images, batch.labels, self.config, self.device), 1.0

    def _black(self) -> Tensor:
        """One black image. It is small, because the networks take every size."""
        return torch.zeros(1, self.source.channels, 32, 32, device=self.device)

    def _autocast(self) -> AbstractContextManager:
        """Autocast in the configured precision. Sharded weights need none: they come in this precision already."""
        return nullcontext() if self.sharded else autocast(self.config.precision, self.device)


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
