"""Resuming with another configuration: what takes effect, what is refused, and what is said."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from isonet_fast.train import config, schedule
from isonet_fast.train.commands.cli import main
from isonet_fast.train.config import Config
from isonet_fast.train.interrupts import Interrupted
from isonet_fast.train.loop import Run
from isonet_fast.train.saving import checkpoint, resuming

from .test_loop import stop_at

KEYS = list(resuming.flat(Config().as_dict()))


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped within its first epoch of 6 steps."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(2, patch)
        assert main([*START, "--output", str(folder)]) == 143
    return folder


SMALL = (
    "model.name=isonet_cifar", "model.depth=8", "model.width=4", "data.source=synthetic:48", "data.image_size=8",
    "data.batch_size=8", "data.eval_batch_size=12", "data.workers=0", "schedule.epochs=3", "schedule.warmup=0",
    "schedule.milestones=[30]", "device=cpu",
)  # fmt: skip
START = ["train", "--config", "isonet_digits", *words(*SMALL)]


def test_every_key_is_decided() -> None:
    assert list(resuming.RULES) == KEYS
    assert all(rule.why for rule in resuming.RULES.values())


def test_the_document_has_the_table() -> None:
    """docs/training.md, one line per rule."""
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    for rule in dict.fromkeys(resuming.RULES.values()):
        keys = ", ".join(f"`{key}`" for key, its in resuming.RULES.items() if its == rule)
        line = f"| {keys} | {'takes effect' if rule.effective else 'refused'} | {rule.why} |"
        assert line in text.splitlines(), f"docs/training.md lacks the line\n{line}"


def groups(run: Run, name: str) -> set[float]:
    return {group[name] for group in run.optimizer.param_groups}


# for every key that may change: a new value, and where the resumed run shows it
EFFECTIVE: dict[str, tuple[str, Callable[[Run], Any], Any]] = {
    "model.dropout": ("0.5", lambda run: run.config.model.dropout, 0.5),
    "data.source": ("synthetic:48", lambda run: len(run.source.train), 48),
    "data.batch_size": ("4", lambda run: len(next(run.train_loader.batches(1, 16)).labels), 4),
    "data.eval_batch_size": ("7", lambda run: len(next(run.val_loader.batches()).labels), 7),
    "data.image_size": ("16", lambda run: run.source.train[0][0].shape[-1], 16),
    "data.workers": ("1", lambda run: run.train_loader.loader.num_workers, 1),
    "data.strict": ("true", lambda run: run.config.data.strict, True),
    "data.mixup": ("0.2", lambda run: run.config.data.mixup, 0.2),
    "optimizer.lr": ("0.03", lambda run: run.base_lr[0], 0.03),
    "optimizer.momentum": ("0.5", lambda run: groups(run, "momentum"), {0.5}),
    "optimizer.weight_decay": ("0.25", lambda run: groups(run, "weight_decay"), {0.25, 0.0}),
    "optimizer.clip": ("1.5", lambda run: run.config.optimizer.clip, 1.5),
    "schedule.epochs": ("5", lambda run: run.config.schedule.epochs, 5),
    "schedule.warmup": ("2", lambda run: schedule.factor(1, run.config.schedule), 0.5),
    "schedule.milestones": ("[1]", lambda run: schedule.factor(2, run.config.schedule), 0.1),
    "schedule.gamma": ("0.5", lambda run: schedule.factor(31, run.config.schedule), 0.5),
    "penalty.coeff": ("0.5", lambda run: run.reg().item() / run.reg.last.item(), 0.5),
    "penalty.kind": ("lorth", lambda run: {row.penalty for row in run.reg.summary()} - {None}, {"lorth"}),
    "penalty.interval": ("3", lambda run: [bool(run.reg().item()) for _ in range(4)].count(True) <= 2, True),
    "checkpoint.every_steps": ("2", lambda run: run.config.checkpoint.every_steps, 2),
    "checkpoint.keep_every_epochs": ("1", lambda run: run.config.checkpoint.keep_every_epochs, 1),
    "accumulate": ("2", lambda run: run.train_loader.order.step_size, 16),
    "fsdp": ("true", lambda run: run.config.fsdp, True),
    "precision": ("float16", lambda run: run.scaler.get_scale(), 65536.0),
    "channels_last": ("true", lambda run: channels_last(run), True),
    "compile": ("true", lambda run: run.forward is not run.model, True),
    "device": ("auto", lambda run: run.config.device, "auto"),
}


REFUSED = {
    "model.name": "isonet18",
    "model.residual": "true",
    "model.activation": "relu",
    "model.bias_learned": "false",
    "model.initialisation": "kaiming",
    "model.normalisation": "batch",
    "model.branch_scale": "1.0",
    "model.fixup": "true",
}


def channels_last(run: Run) -> bool:
    return run.model.s1.b1.f.a.weight.is_contiguous(memory_format=torch.channels_last)  # type: ignore[union-attr]


@pytest.mark.parametrize("key", KEYS)
def test_a_new_value_takes_effect_or_is_refused(
    key: str, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, _ = checkpoint.load_latest(stopped)
    former = config.load(None, (), state["config"])
    if not resuming.RULES[key].effective:
        value = REFUSED.get(key, "14")
        changed = config.load(None, [f"{key}={value}"], state["config"])
        with pytest.raises(ValueError, match=rf"{key} must stay \S+, got \S+ \(.+\)"):
            resuming.changes(former, changed)
        return
    value, shown, expected = EFFECTIVE[key]
    changed = config.load(None, [f"{key}={value}"], state["config"])
    if key != "data.source":
        (said,) = resuming.changes(former, changed)
        assert said.startswith(f"{key} ") and " -> " in said
    if key == "model.dropout":  # of a network that has dropout
        changed.model.dropout = None
    run = Run(changed, tmp_path, state)
    changed.model.dropout = 0.5 if key == "model.dropout" else None
    assert shown(run) == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert run.step == 2 and run.examples == 16


def test_a_run_goes_on_with_changes_and_says_them(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = copy(stopped, tmp_path)
    changed = (
        "precision=float16",
        "optimizer.momentum=0",
        "penalty.kind=lorth",
        "data.batch_size=16",
        "schedule.epochs=2",
    )
    assert main(["train", "--resume", str(run), *words(*changed)]) == 0
    said = capsys.readouterr().out
    assert (
        "from here on with data.batch_size 8 -> 16, optimizer.momentum 0.9 -> 0.0, schedule.epochs 3 -> 2, "
        "penalty.kind isonet -> lorth, precision float32 -> float16\n"
    ) in said
    state, _ = checkpoint.load_latest(run)
    assert {group["momentum"] for group in state["optimizer"]["param_groups"]} == {0.0}
    assert state["position"]["step"] == 2 + 2 + 3  # of the first epoch 32 of 48 images were left
    assert main(["train", "--resume", str(run), *words("precision=bfloat16", "schedule.epochs=3")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.depth=14"], "model.depth must stay 8, got 14 (the weights in the checkpoint are of that"),
        (["--set", "model.width=8"], "model.width must stay 4, got 8"),
        (["--config", "isonet18"], "model.name must stay 'isonet_cifar', got 'isonet18'"),
        (["--set", "seed=1"], "seed must stay 0, got 1 (the order of the data"),
        (["--data", "digits"], "10 classes and 3 channels; digits has 10 and 1"),
        (["--data", "synthetic:64"], "within epoch 1 of 48 training images, synthetic:64 has 64: end that epoch with"),
    ],
)
def test_another_network_seed_or_data_is_refused(
    arguments: list[str], message: str, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    assert main(["train", "--resume", str(stopped), *arguments]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    "step", [1, 3, 4, 5]
)  # within the warm-up's epochs 1 and 2; right before the milestone, and after
def test_the_schedule_goes_on_with_another_learning_rate(
    step: int, small: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = ["schedule.epochs=4", "schedule.warmup=3", "schedule.milestones=[2]", "data.batch_size=24"]
    recipe += ["model.residual=true"]
    with monkeypatch.context() as patch:
        stop_at(step, patch)
        with pytest.raises(Interrupted):
            Run(small(*recipe), tmp_path).fit()
    state, _ = checkpoint.load_latest(tmp_path)
    config = small(*recipe, "optimizer.lr=0.03")
    run = Run(config, tmp_path, state)
    used: list[tuple[int, list[float]]] = []
    real = Run._train_step

    def train_step(self: Run, batches: Any) -> None:
        used.append((self.epoch, [group["lr"] for group in self.optimizer.param_groups]))
        real(self, batches)

    monkeypatch.setattr(Run, "_train_step", train_step)
    run.fit()
    assert len(used) == 8 - step
    factors = {1: 1 / 3, 2: 2 / 3, 3: 0.1, 4: 0.1}
    for n, (epoch, rates) in enumerate(used):
        assert epoch == 1 + (step + n) // 2
        assert rates == pytest.approx([0.03 * factors[epoch], 0.03 * factors[epoch], 0.003 * factors[epoch]])


def test_a_column_of_ones_own_in_the_metrics_stays(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copy(stopped, tmp_path)
    assert main(["train", "--resume", str(run), "--set", "schedule.epochs=1"]) == 0
    head, row = (run / "metrics.csv").read_text().splitlines()
    (run / "metrics.csv").write_text(f"note,{head}\nmine,{row}\n")
    assert main(["train", "--resume", str(run), "--set", "schedule.epochs=2"]) == 0
    with open(run / "metrics.csv", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(line["epoch"], line["note"]) for line in table] == [("1", "mine"), ("2", "")]
    for content, message in {
        f"{head}\n{row},more\n": "metrics.csv has more values than column names in the row of epoch 1; name the column",
        "a,b\n1,2\n": "metrics.csv is no table of a run: its columns are a, b; move it away",
    }.items():
        (run / "metrics.csv").write_text(content)
        assert main(["train", "--resume", str(run), "--set", "schedule.epochs=3"]) == 1
        assert message in capsys.readouterr().err
        assert (run / "metrics.csv").read_text() == content
    (run / "metrics.csv").write_bytes(head.encode() + b"\n\xff\xfe")
    assert main(["train", "--resume", str(run), "--set", "schedule.epochs=3"]) == 1
    assert "metrics.csv is no CSV file: 'utf-8' codec" in capsys.readouterr().err


def test_a_checkpoint_without_a_run_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for contents, message in (
        ({"a": 1}, "latest.pt holds no run: expected 'config' and 'position' in it, found 'format', 'a'"),
        (
            {"config": {"data": {"source": "digits"}}, "position": {"epoch": 1, "examples": 0}},
            "is incomplete: it lacks classes, model",
        ),
    ):
        checkpoint.save(contents, tmp_path / "latest.pt")
        assert main(["train", "--resume", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def copy(run: Path, to: Path) -> Path:
    for path in run.iterdir():
        if path.is_file():
            (to / path.name).write_bytes(path.read_bytes())
    return to
