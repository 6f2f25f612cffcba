"""The loop: its gradient, its stops, and going on from any step with the same bits."""

from __future__ import annotations

import csv
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from isonet_fast.train import loop
from isonet_fast.train.config import Config
from isonet_fast.train.divergence import Diverged
from isonet_fast.train.interrupts import Interrupted
from isonet_fast.train.loop import Run
from isonet_fast.train.saving import checkpoint

from .several import Noisy


def same(a: Any, b: Any, path: str = "") -> None:
    """Bit for bit, through nested dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for n, pair in enumerate(zip(a, b)):
            same(*pair, f"{path}[{n}]")
    else:
        assert a == b, path


def rows(directory: Path) -> list[dict[str, str]]:
    """metrics.csv without its clock."""
    with open(directory / "metrics.csv", newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in ("images_per_second", "seconds")} for row in csv.DictReader(file)
        ]


@pytest.fixture
def noisy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.build_model
    monkeypatch.setattr(loop, "build_model", lambda *args: Noisy(real(*args)))


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGTERM while step `step` runs."""
    real = Run._train_step

    def train_step(self: Run, batch: Any) -> None:
        if self.step == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, batch)

    monkeypatch.setattr(Run, "_train_step", train_step)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("step", [1, 5, 6, 9])  # six steps an epoch: first, last but one, last, in the second epoch
def test_going_on_from_any_step_gives_the_same_bits(
    step: int,
    precision: str,
    small: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    noisy: None,
) -> None:
    config = small(f"precision={precision}", "penalty.interval=2", "optimizer.clip=1")
    Run(config, tmp_path / "whole").fit()
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted) as stop:
            Run(config, tmp_path / "parts").fit()
    assert stop.value.code == 143 and f"SIGTERM after step {step}" in str(stop.value)
    assert f"--resume {tmp_path / 'parts'}" in str(stop.value)
    torch.manual_seed(99)
    state, _ = checkpoint.load_latest(tmp_path / "parts")
    assert state["position"]["step"] == step
    Run(config, tmp_path / "parts", state).fit()
    for name in ("latest.pt", "best.pt"):
        same(*(checkpoint.load(tmp_path / run / name) for run in ("whole", "parts")))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts") and len(rows(tmp_path / "whole")) == 2


def test_the_gradient_is_cross_entropy_plus_penalty(small: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small("penalty.coeff=0.3", "optimizer.momentum=0", "optimizer.weight_decay=0"), tmp_path)
    for p in run.model.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    batch = next(run.train_loader.batches(1))
    loss = F.cross_entropy(run.model.train()(batch.images), batch.labels) + run.reg()
    expected = dict(zip(before, torch.autograd.grad(loss, list(run.model.parameters()))))
    run._train_step([batch])
    for group, base in zip(run.optimizer.param_groups, run.base_lr):
        assert group["lr"] == base
    for name, p in run.model.named_parameters():
        torch.testing.assert_close((before[name] - p) / 0.01, expected[name], rtol=1e-3, atol=2e-5)


def test_residual_networks_train_their_scales_at_a_tenth(small: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small("model.residual=true"), tmp_path)
    scales = {id(p) for n, p in run.model.named_parameters() if n.endswith(".scale")}
    for group in run.optimizer.param_groups:
        ids = {id(p) for p in group["params"]}
        assert group["lr"] == pytest.approx(0.001 if ids & scales else 0.01)
        assert not ids & scales or ids == scales


def test_clipping_comes_after_the_penalty(small: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small("optimizer.clip=0.001", "penalty.coeff=10"), tmp_path)
    run._train_step([next(run.train_loader.batches(1))])
    norm = torch.stack([p.grad.norm() for p in run.model.parameters()]).norm()
    assert norm <= 0.001 * 1.0001


@pytest.mark.parametrize("settings", [["precision=bfloat16"], ["precision=float16", "channels_last=true"]])
def test_half_precision_learns(settings: list[str], small: Callable[..., Config], tmp_path: Path) -> None:
    row = Run(small("optimizer.lr=0.02", "schedule.epochs=3", *settings), tmp_path).fit()
    assert row["loss"] < 2.31 and row["val_top5"] > 40
    assert (tmp_path / "best.pt").exists()


def test_compile_is_used_for_training(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager", fullgraph=True))
    run = Run(small("compile=true", "schedule.epochs=1"), tmp_path)
    run.fit()
    assert run.forward is not run.model
    assert not any("_orig_mod" in name for name in checkpoint.load(tmp_path / "latest.pt")["model"])


def test_metrics_and_kept_checkpoints(small: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small("schedule.epochs=4", "checkpoint.keep_every_epochs=2", "schedule.milestones=[2]"), tmp_path)
    row = run.fit()
    table = rows(tmp_path)
    assert [r["epoch"] for r in table] == ["1", "2", "3", "4"] and table[-1]["step"] == "24"
    assert [float(r["lr"]) for r in table] == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert float(table[-1]["val_top1"]) == row["val_top1"]
    assert sorted(p.name for p in tmp_path.glob("epoch-*.pt")) == ["epoch-2.pt", "epoch-4.pt"]
    best = checkpoint.load(tmp_path / "best.pt")["position"]["best"]
    assert best == max(float(r["val_top1"]) for r in table)
    pytest.importorskip("tensorboard")
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("where", ["s2.b1.f.a", "s3.b1.relu"])
def test_a_loss_that_is_not_finite(
    where: str, small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(small("checkpoint.every_steps=3"), tmp_path)
    real = Run._train_step

    def train_step(self: Run, batch: Any) -> None:
        if self.step == 4:
            module = self.model.get_submodule(where)
            next(module.parameters()).data.fill_(float("inf"))
        real(self, batch)

    monkeypatch.setattr(Run, "_train_step", train_step)
    with pytest.raises(Diverged) as error:
        run.fit()
    text = str(error.value)
    assert text.startswith(
        f"non-finite loss at step 5: layer '{where}' produced the first one. Halve the learning rate"
    )
    assert "latest.pt (step 3)" in text
    assert checkpoint.load(tmp_path / "latest.pt")["position"]["step"] == 3


def test_a_convolution_that_a_scale_is_folded_into_is_found(small: Callable[..., Config], tmp_path: Path) -> None:
    run = Run(small("model.residual=true"), tmp_path)
    run.model.get_submodule("s2.b1.f.b").weight.data.fill_(float("inf"))
    with pytest.raises(Diverged, match=r"layer 's2\.b1\.f\.b' produced the first one"):
        run._train_step([next(run.train_loader.batches(1))])


def test_divergence_in_the_first_epoch_still_has_a_checkpoint(small: Callable[..., Config], tmp_path: Path) -> None:
    with pytest.raises(Diverged, match=r"Halve the learning rate.*latest\.pt \(step 0\)"):
        Run(small("optimizer.lr=1e12"), tmp_path).fit()
    state = checkpoint.load(tmp_path / "latest.pt")
    assert all(value.isfinite().all() for value in state["model"].values())


def test_data_of_another_kind_is_refused_on_resuming(small: Callable[..., Config], tmp_path: Path) -> None:
    config = small("schedule.epochs=1")
    Run(config, tmp_path).fit()
    state, _ = checkpoint.load_latest(tmp_path)
    config.data.source = "digits"
    with pytest.raises(ValueError, match="10 classes and 3 channels; digits has 10 and 1"):
        Run(config, tmp_path, state)


def test_an_epoch_trains_on_the_device(small: Callable[..., Config], tmp_path: Path, device: torch.device) -> None:
    """An epoch on whatever device the suite runs on, with all that concerns it."""
    settings = [f"device={device}", "precision=bfloat16", "channels_last=true", "model.residual=true", "model.width=16"]
    row = Run(small(*settings), tmp_path).fit()
    assert row["loss"] < 3 and row["images_per_second"] > 0
