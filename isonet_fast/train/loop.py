"""The training loop: what one run is, step by step, and how it stops and goes on.

Everything that a step depends on is in `Run.state()`: weights, optimizer, loss scale, random generators, and the
position (epoch, batches done). The data follow from the seed and the position (`loader`), the learning rate from the
epoch (`schedule`). So a run resumed from any step goes on with the same bits on a CPU.
"""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..regularizer import OrthoRegularizer, param_groups
from . import checkpoint, schedule
from .build import autocast, build_model, choose_device
from .config import Config
from .datasets import Corrupt, open_source
from .divergence import Diverged, first_nonfinite
from .files import sweep
from .loader import Batch, Loader, WorkerDied
from .metrics import Log, Sums, progress


class Interrupted(Exception):
    """Stopped by a signal, with everything saved; `code` is the exit code that a shell expects."""

    def __init__(self, number: int, step: int, directory: Path) -> None:
        self.code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step}, everything saved; "
            f"go on with: isonet-fast train --resume {directory}"
        )


class Run:
    """One training run in one directory. `fit()` trains it to its end."""

    def __init__(self, config: Config, directory: Path, state: dict[str, Any] | None = None) -> None:
        self.config, self.directory = config, directory
        sweep(directory)
        self.device = choose_device(config.device)
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
        torch.manual_seed(config.seed)
        self.source = open_source(config.data, config.seed)
        self.model = build_model(config.model, self.source.num_classes, self.source.channels).to(self.device)
        if config.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = param_groups(self.model, config.optimizer.lr, config.optimizer.weight_decay)
        self.base_lr = [group["lr"] for group in groups]
        self.optimizer = torch.optim.SGD(groups, config.optimizer.lr, config.optimizer.momentum)
        self.reg = OrthoRegularizer(
            self.model, config.penalty.coeff, config.penalty.kind, interval=config.penalty.interval
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "float16")
        self.forward: nn.Module = torch.compile(self.model) if config.compile else self.model  # type: ignore[assignment]
        data, pin = config.data, self.device.type == "cuda"
        self.train_loader = Loader(self.source.train, data.batch_size, data.workers, config.seed, True, pin)
        self.val_loader = Loader(self.source.val, data.eval_batch_size, data.workers, config.seed, False, pin)
        self.log = Log(directory)
        self.sums = Sums(self.device)
        self.epoch, self.batch, self.step, self.best = 1, 0, 0, -1.0  # batch: batches of the epoch done
        self.penalty = torch.tensor(float("nan"))  # of the last step, unweighted, wherever it was computed
        self.corrupt: dict[str, str] = {}
        self._signal: int | None = None
        self._saved_step = 0
        if state is not None:
            self._restore(state)

    # -- what a checkpoint holds ------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "config": self.config.as_dict(),
            "classes": [self.source.num_classes, self.source.channels],
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "regularizer": self.reg.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "position": {"epoch": self.epoch, "batch": self.batch, "step": self.step, "best": self.best},
            "sums": self.sums.totals.cpu(),
            "penalty": self.penalty.cpu(),
            "corrupt": dict(self.corrupt),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        if state["classes"] != [self.source.num_classes, self.source.channels]:
            raise ValueError(
                f"the checkpoint is of a run on data with {state['classes'][0]} classes and {state['classes'][1]} "
                f"channels; {self.config.data.source} has {self.source.num_classes} and {self.source.channels}"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.reg.load_state_dict(state["regularizer"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        position = state["position"]
        self.epoch, self.batch, self.step = position["epoch"], position["batch"], position["step"]
        self.best = position["best"]
        self.sums.totals.copy_(state["sums"])
        self.penalty = state["penalty"]
        self.corrupt.update(state["corrupt"])
        self._saved_step = self.step

    def save(self) -> None:
        checkpoint.save_latest(self.state(), self.directory)
        self._saved_step = self.step

    # -- training ---------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, float]:
        """Train to the last epoch; returns the last row of metrics.csv. Raises Diverged, Interrupted, WorkerDied."""
        row: dict[str, float] = {}
        self.log.start(self.epoch)
        if not self.step:
            self.save()  # so that a divergence in the first epoch has a checkpoint to name
        with self._listening():
            try:
                while self.epoch <= self.config.schedule.epochs:
                    row = self._train_epoch()
            except WorkerDied as error:
                raise WorkerDied(
                    f"{error}; the last checkpoint is {self.directory / 'latest.pt'} (step {self._saved_step}), "
                    f"go on with: isonet-fast train --resume {self.directory}"
                ) from error
            finally:
                self.log.close()
        return row

    def _train_epoch(self) -> dict[str, float]:
        schedule.apply(self.optimizer, self.base_lr, self.epoch, self.config.schedule)
        start, before = time.perf_counter(), self.sums.examples
        self.model.train()
        title = f"epoch {self.epoch}/{self.config.schedule.epochs}"
        with progress(len(self.train_loader), self.batch, title) as bar:
            for batch in self.train_loader.batches(self.epoch, self.batch):
                self._train_step(batch)
                self.batch += 1
                bar.update()
                if self.batch % 20 == 0:
                    rate = (self.sums.examples - before) / (time.perf_counter() - start)
                    loss, penalty = self.sums.means()["loss"], self.penalty.item()
                    bar.set_postfix_str(f"{rate:.0f} images/s, loss {loss:.3f}, penalty {penalty:.4g}", refresh=False)
                self._after_step()
        examples, seconds = self.sums.examples - before, time.perf_counter() - start
        return self._end_epoch(examples / seconds, seconds)

    def _train_step(self, batch: Batch) -> None:
        """Forward, cross entropy, backward, penalty, clipping, optimizer: in this order, for the loss is looked at
        while the device computes the gradients, and nothing has changed yet if it is not finite."""
        self._note(batch.corrupt)
        self.step += 1
        if batch.images is None:
            return
        x, y = self._to_device(batch)
        self.optimizer.zero_grad()
        with autocast(self.config.precision, self.device):
            logits = self.forward(x)
        loss = F.cross_entropy(logits.float(), y)
        on_host = _HostValue(loss)
        self.scaler.scale(loss).backward()
        if not math.isfinite(on_host.get()):
            self._diverged(x)
        self.scaler.unscale_(self.optimizer)
        self.reg.accumulate_grad_()
        if self.reg.last is not None:  # None until the first one of `interval` calls
            self.penalty = self.reg.last
        if self.config.optimizer.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums.add(logits.detach(), y, loss.detach())

    def _after_step(self) -> None:
        every = self.config.checkpoint.every_steps
        if self._signal is not None:
            self.save()
            raise Interrupted(self._signal, self.step, self.directory)
        if every and self.step % every == 0:
            self.save()

    def _end_epoch(self, rate: float, seconds: float) -> dict[str, float]:
        """Validate, write the row, move on to the next epoch, save."""
        row: dict[str, float] = {
            "epoch": self.epoch,
            "step": self.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            **self.sums.means(),
            "penalty": self.penalty.item(),
            "images_per_second": rate,
            "seconds": seconds,
        }
        sums, corrupt = validate(self.model, self.val_loader, self.config, self.device)
        self._note(corrupt)
        row |= {f"val_{name}": value for name, value in sums.means().items()}
        row["corrupt_images"] = len(self.corrupt)
        self.log.add(row)
        print(
            f"epoch {self.epoch}: loss {row['loss']:.4f}, penalty {row['penalty']:.4g}, top-1 {row['top1']:.2f} %; "
            f"validation loss {row['val_loss']:.4f}, top-1 {row['val_top1']:.2f} %, top-5 {row['val_top5']:.2f} %; "
            f"{rate:.0f} images/s",
            flush=True,
        )
        best, done = row["val_top1"] > self.best, self.epoch
        self.best = max(self.best, row["val_top1"])
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.totals.zero_()
        if best:
            checkpoint.save(self.state(), self.directory / "best.pt")
        keep = self.config.checkpoint.keep_every_epochs
        if keep and done % keep == 0:
            checkpoint.save(self.state(), self.directory / f"epoch-{done}.pt")
        self.save()
        if self._signal is not None and self.epoch <= self.config.schedule.epochs:
            raise Interrupted(self._signal, self.step, self.directory)
        return row

    # -- what can go wrong ------------------------------------------------------------------------------------------

    def _diverged(self, x: Tensor) -> None:
        with autocast(self.config.precision, self.device):
            layer = first_nonfinite(self.model, x)
        raise Diverged(
            self.step,
            layer,
            f" The weights are still those of step {self.step - 1}; the last good checkpoint is "
            f"{self.directory / 'latest.pt'} (step {self._saved_step}).",
        )

    def _note(self, corrupt: list[Corrupt]) -> None:
        for image in corrupt:
            if self.config.data.strict:
                raise ValueError(f"corrupt image: {image}; without --strict it would be skipped")
            if image.path not in self.corrupt:
                self.corrupt[image.path] = image.reason
                print(f"skipped a corrupt image, the {_ordinal(len(self.corrupt))}: {image}", flush=True)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the step; a second one at once."""
        previous: dict[signal.Signals, Any] = {}

        def ask(number: int, frame: FrameType | None) -> None:
            self._signal = number
            for listened, handler in previous.items():
                signal.signal(listened, handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: the owner of the process listens
                previous[number] = signal.signal(number, ask)
        try:
            yield
        finally:
            for listened, handler in previous.items():
                signal.signal(listened, handler)

    def _to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.images is not None
        return to_device(batch.images, batch.labels, self.config, self.device)


def to_device(images: Tensor, labels: Tensor, config: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return images.to(device, non_blocking=True, memory_format=layout), labels.to(device, non_blocking=True)


@torch.no_grad()
def validate(model: nn.Module, loader: Loader, config: Config, device: torch.device) -> tuple[Sums, list[Corrupt]]:
    """Loss and accuracies over the whole loader, in eval mode, and the images that could not be read."""
    model.eval()
    sums = Sums(device)
    corrupt: list[Corrupt] = []
    for batch in loader.batches():
        corrupt += batch.corrupt
        if batch.images is None:
            continue
        x, y = to_device(batch.images, batch.labels, config, device)
        with autocast(config.precision, device):
            logits = model(x)
        sums.add(logits, y, F.cross_entropy(logits.float(), y))
    return sums, corrupt


class _HostValue:
    """A loss on its way to the host: `get` waits for the forward pass alone, not for what was launched after it."""

    def __init__(self, value: Tensor) -> None:
        self.value, self.event = value.detach(), None
        if value.is_cuda:
            self.value = torch.empty((), dtype=value.dtype, pin_memory=True)
            self.value.copy_(value.detach(), non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def get(self) -> float:
        if self.event is not None:
            self.event.synchronize()
        return self.value.item()


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
