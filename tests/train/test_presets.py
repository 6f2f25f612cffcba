"""Every preset builds its network and takes one training step, on small synthetic images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isonet_fast.train import config
from isonet_fast.train.loop import Run

SMALL = ["data.source=synthetic:4", "data.image_size=32", "data.batch_size=2", "data.workers=0", "device=cpu"]


@pytest.mark.parametrize("name", config.presets())
def test_every_preset_makes_a_training_step(name: str, tmp_path: Path) -> None:
    run = Run(config.load(name, SMALL), tmp_path)
    run.model.train()
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if "head" in n or "scale" in n}
    run._train_step([next(run.train_loader.batches(1))])
    assert run.step == 1 and run.sums.examples == 2
    assert all(not torch.equal(p, before[n]) for n, p in run.model.named_parameters() if n in before)
    assert run.reg.last is not None and run.reg.last.isfinite()
