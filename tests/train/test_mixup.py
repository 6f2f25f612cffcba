"""Mixup: its formula, its distribution, and that a resumed run draws the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from isonet_fast.train.config import Config
from isonet_fast.train.interrupts import Interrupted
from isonet_fast.train.loop import Run
from isonet_fast.train.mixup import mixup
from isonet_fast.train.saving import checkpoint

from .test_loop import rows, same, stop_at


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    """Image n is full of n, so that a mixed one tells its partner."""
    return torch.arange(count).float().view(-1, 1, 1, 1).expand(-1, 3, 4, 4), torch.arange(count) % 5


def test_images_and_labels_are_mixed_alike() -> None:
    x, y = batch()
    mixed = mixup(x, y, 1.0, "a")
    partners = (mixed.images[:, 0, 0, 0] - mixed.share * x[:, 0, 0, 0]) / (1 - mixed.share)
    assert torch.equal(partners.round().sort().values, x[:, 0, 0, 0])  # a permutation
    assert torch.equal(mixed.partners, y[partners.round().long()]) and torch.equal(mixed.labels, y)
    logits = torch.randn(16, 5, dtype=torch.float64)
    targets = mixed.share * torch.eye(5)[mixed.labels] + (1 - mixed.share) * torch.eye(5)[mixed.partners]
    expected = -(targets * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(mixed.loss(logits), expected)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_the_share_is_of_the_beta_distribution(alpha: float) -> None:
    """Mean and variance of the larger of l and 1 - l: that of |l - 1/2|, whose square has the mean of l's variance."""
    x, y = batch(2)
    shares = torch.tensor([mixup(x, y, alpha, str(n)).share for n in range(4000)])
    assert shares.min() >= 0.5 and shares.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert (shares - 0.5).square().mean() == pytest.approx(variance, rel=0.05)


def test_nothing_is_mixed_at_zero() -> None:
    x, y = batch()
    mixed = mixup(x, y, 0.0, "a")
    assert mixed.images is x and mixed.share == 1
    logits = torch.randn(16, 5)
    assert torch.equal(mixed.loss(logits), torch.nn.functional.cross_entropy(logits, y))


def test_a_resumed_run_mixes_the_same(
    small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small("data.mixup=0.7", "accumulate=2")
    Run(config, tmp_path / "whole").fit()
    with monkeypatch.context() as patch:
        stop_at(2, patch)
        with pytest.raises(Interrupted):
            Run(config, tmp_path / "parts").fit()
    torch.manual_seed(99)
    Run(config, tmp_path / "parts", checkpoint.load_latest(tmp_path / "parts")[0]).fit()
    same(*(checkpoint.load(tmp_path / run / "latest.pt") for run in ("whole", "parts")))
    Run(small("accumulate=2"), tmp_path / "plain").fit()
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts") != rows(tmp_path / "plain")
