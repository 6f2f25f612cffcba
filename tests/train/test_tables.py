"""The tables of the paper: what their rows are, that each run is made once, and that a killed table ends as another."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from isonet_fast import OrthoConv2d
from isonet_fast.train import build
from isonet_fast.train.commands.cli import main
from isonet_fast.train.loop import Run
from isonet_fast.train.saving import lock
from isonet_fast.train.tables import making, measure, plan, running, writing

from .conftest import SMALL
from .test_loop import stop_at

DOCS = Path(__file__).parents[2] / "docs" / "tables"
TINY = [*SMALL, "data.source=synthetic:24", "data.image_size=8", "data.batch_size=8", "data.eval_batch_size=6"]
TINY += ["schedule.epochs=2", "schedule.warmup=0"]


def words(output: Path, *more: str, number: int = 3, settings: tuple[str, ...] = ()) -> list[str]:
    """Two rows of table 3, by its other rows being cut off (`few_rows`)."""
    sets = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    return ["table", str(number), "--output", str(output), *sets, *more]


@pytest.fixture
def few_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, two learning rates, two seeds: six runs of six steps; and no picture, which takes longer than they."""
    pytest.importorskip("matplotlib", reason="a table is drawn with matplotlib: pip install 'isonet_fast[demo]'")
    real = plan.table

    def table(number: int, scale: str) -> plan.Table:
        whole = real(number, scale)
        return plan.Table(number, scale, whole.title, whole.rows[:2], (0.01, 0.1), 2)

    monkeypatch.setattr(plan, "table", table)
    if "picture" not in request.node.name:
        monkeypatch.setattr(writing, "picture", lambda *args: None)


def read(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def lines(output: Path) -> list[dict[str, str]]:
    """The table without its clock."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read(output / "table3.csv")]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folder of every training step that is taken."""
    taken: list[Path] = []
    real = Run._train_step

    def train_step(self: Run, batches: Any) -> None:
        taken.append(self.directory)
        real(self, batches)

    monkeypatch.setattr(Run, "_train_step", train_step)
    return taken


# -- the published recipe ----------------------------------------------------------------------------------------------

RATES = {  # learning rate and batch per GPU
    "ISONet": {18: (0.01, 128), 34: (0.01, 128), 50: (0.0075, 96), 101: (0.005, 64)},
    "R-ISONet": {18: (0.05, 128), 34: (0.05, 128), 50: (0.025, 64), 101: (0.0125, 32)},
}
PUBLISHED = {
    "ISONet": {18: (67.94, 68.10), 34: (70.45, 70.90), 50: (70.73, 71.20), 101: (70.38, 71.01)},
    "R-ISONet": {18: (69.06, 69.17), 34: (72.17, 73.43), 50: (74.20, 76.18), 101: (75.44, 77.08)},
}
RELU = {"activation": "relu", "initialisation": "kaiming"}
BATCH = {**RELU, "normalisation": "batch", "branch_scale": None}
FIXUP = {**RELU, "fixup": True}
KINDS: dict[str, tuple[dict[str, Any], float, float, float]] = {  # switches, dropout, gamma, mixup
    "R-ISONet": ({}, 0.0, 1e-4, 0.0),
    "R-ISONet, dropout": ({}, 0.4, 1e-4, 0.0),
    "ResNet, BatchNorm": (BATCH, 0.0, 0.0, 0.0),
    "ResNet, BatchNorm, dropout": (BATCH, 0.4, 0.0, 0.0),
    "ResNet, Fixup": (FIXUP, 0.0, 0.0, 0.0),
    "ResNet, Fixup, mixup": (FIXUP, 0.0, 0.0, 0.2),
}


def published(number: int) -> dict[str, dict[str, Any]]:
    """Every row of the table as the recipe has it, key by key of what it names."""

    def row(
        kind: str, depth: int, switches: dict[str, Any], dropout: float, gamma: float, mixup: float = 0.0
    ) -> dict[str, Any]:
        lr, batch = RATES[kind][depth]
        name = f"{'r' if kind == 'R-ISONet' else ''}isonet{depth}"
        return {
            "model": {"name": name, "dropout": dropout, **switches},
            "optimizer": {"lr": lr, "momentum": 0.9, "weight_decay": 1e-4, "clip": None},
            "data": {"batch_size": batch, "mixup": mixup, "image_size": 224},
            "schedule": {"epochs": 100, "warmup": 5, "milestones": [30, 60, 90], "gamma": 0.1},
            "penalty": {"coeff": gamma, "kind": "isonet", "interval": 1},
            "": {"accumulate": 1, "seed": 0},
        }

    plain = lambda gamma=1e-4, **switches: row("ISONet", 34, switches, 0.0, gamma)
    kaiming = {"initialisation": "kaiming"}
    if number == 1:
        return {
            "SReLU, delta, penalty": plain(),
            "SReLU, delta": plain(0.0),
            "SReLU, Kaiming, penalty": plain(**kaiming),
            "SReLU, Kaiming": plain(0.0, **kaiming),
            "ReLU, delta, penalty": plain(activation="relu"),
            "ReLU, delta": plain(0.0, activation="relu"),
            "ReLU, Kaiming, penalty": plain(**RELU),
            "ReLU, Kaiming": plain(0.0, **RELU),
        }
    if number == 2:
        return {f"gamma {text}": plain(float(text)) for text in ("0", "1e-5", "1e-4", "1e-3", "1e-2", "1e-1")}
    if number == 3:
        return {
            f"b = {b:g}, {'learned' if learned else 'fixed'}": plain(bias_init=b, bias_learned=learned)
            for b, learned in ((-1.0, True), (-1.0, False), (-0.5, True), (-2.0, True), (0.0, True), (0.0, False))
        }
    if number == 4:
        return {
            f"ISONet{text}, {depth} layers": row("ISONet", depth, {}, rate, 3e-4 if depth == 101 else 1e-4)
            for depth in RATES["ISONet"]
            for text, rate in (("", 0.0), (", dropout", 0.1))
        }
    return {
        f"{name}, {depth} layers": row("R-ISONet", depth, *kind)
        for depth in (18, 34, 50, 101)
        for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_the_rows_on_imagenet_are_the_published_recipe(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(number), "--scale", "imagenet", "--dry-run", "--data", "imagefolder:there"]) == 0
    blocks = [block.split("\n", 1) for block in capsys.readouterr().out.split(f"# table {number}: ")[1:]]
    found = {title.partition(" (published")[0]: yaml.safe_load(text) for title, text in blocks}
    expected = published(number)
    assert list(found) == list(expected)
    switches = {"activation": "srelu", "bias_init": -1.0, "bias_learned": True, "initialisation": "delta"}
    switches |= {"normalisation": "none", "branch_scale": "published", "fixup": False}
    for name, sections in expected.items():
        sections["model"] = {**switches, **sections["model"]}
        for section, keys in sections.items():
            values = found[name][section] if section else found[name]
            assert {key: values[key] for key in keys} == keys, (name, section)
        assert found[name]["data"]["source"] == "imagefolder:there"
        with torch.device("meta"):  # it can be built
            build.build_model(plan.config.load(None, (), found[name]).model, 1000, 3)


def test_published_numbers_are_the_known_ones_alone() -> None:
    for row in plan.table(4, "imagenet").rows + plan.table(5, "imagenet").rows:
        kind, depth = row.name.split(",")[0], int(row.name.split()[-2])
        known = PUBLISHED.get(kind)
        assert row.published == (known and known[depth]["dropout" in row.name])
    for number, name in ((1, "SReLU, delta, penalty"), (2, "gamma 1e-4"), (3, "b = -1, learned")):
        rows = plan.table(number, "imagenet").rows
        assert {row.name: row.published for row in rows if row.published} == {name: 70.45}
    small = [row for number in plan.numbers() for row in plan.table(number, "small").rows]
    assert not any(row.published for row in small)


@pytest.mark.parametrize("scale", plan.SCALES)
def test_every_row_has_a_folder_of_its_own(scale: str) -> None:
    for number in plan.numbers():
        rows = plan.table(number, scale).rows
        assert len({row.folder for row in rows}) == len(rows) == len({row.name for row in rows})


# -- making a table ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_rows")
def test_killed_within_a_row_and_between_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(tmp_path / "whole")) == 0
    assert len(steps) == 36 and len(set(steps)) == 6
    steps.clear()
    parts = tmp_path / "parts"
    with monkeypatch.context() as patch:  # within the first row
        stop_at(4, patch)
        assert main(words(parts)) == 143
    assert "the same command goes on with the table" in capsys.readouterr().out
    real = running.make
    with monkeypatch.context() as patch:  # between the first row and the second

        def killed(settled: Any, folder: Path, processes: Any) -> Any:
            if folder.parent.name == "b-minus-1-fixed":
                raise KeyboardInterrupt
            return real(settled, folder, processes)

        patch.setattr(running, "make", killed)
        assert main(words(parts)) == 130
    assert [bool(row["top1"]) for row in lines(parts)] == [True, False]
    with monkeypatch.context() as patch:  # after the last step of a run, before its result is written
        patch.setattr(running, "isometry", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(words(parts)) == 130
    assert main(words(parts)) == 0
    assert len(steps) == 36 and len(set(steps)) == 6  # nothing twice
    assert lines(parts) == lines(tmp_path / "whole") and all(row["deviation"] for row in lines(parts))
    steps.clear()
    assert main(words(parts)) == 0
    assert not steps
    assert main(words(parts, settings=("optimizer.momentum=0.5",))) == 1
    assert "holds a run with other settings (optimizer.momentum 0.9 -> 0.5)" in capsys.readouterr().err


@pytest.mark.usefixtures("few_rows")
def test_one_row_and_then_the_others(tmp_path: Path, steps: list[Path]) -> None:
    assert main(words(tmp_path, "--only", "B = -1, fixed", "--seeds", "1")) == 0
    assert len(set(steps)) == 2
    assert [row["seeds"] for row in lines(tmp_path)] == ["", "1"]
    assert main(words(tmp_path, "--seeds", "1")) == 0
    assert len(steps) == 24 and len(set(steps)) == 4
    assert [row["seeds"] for row in lines(tmp_path)] == ["1", "1"]


@pytest.mark.usefixtures("few_rows")
def test_a_run_that_diverges_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Path]) -> None:
    real = Run._train_step

    def train_step(self: Run, batches: Any) -> None:
        if self.config.optimizer.lr == 0.1 or not self.config.model.bias_learned:
            if self.step == 4:
                batches[0].images.fill_(math.nan)
        real(self, batches)

    monkeypatch.setattr(Run, "_train_step", train_step)
    assert main(words(tmp_path)) == 0
    trained, lost = lines(tmp_path)
    assert trained["by_learning_rate"].endswith("; 0.1: diverged at step 5") and trained["learning_rate"] == "0.01"
    assert trained["largest_stable"] in ("0.01", "") and trained["seeds"] == "2"
    assert lost["top1"] == "" and lost["diverged"] == "at step 5" and lost["seeds"] == "1"
    text = (tmp_path / "table3.md").read_text()
    assert "| b = -1, fixed |  | diverged at step 5 | 0.01 |" in text
    count = len(steps)
    assert main(words(tmp_path)) == 0 and len(steps) == count


@pytest.mark.usefixtures("few_rows")
def test_a_run_of_another_process_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[Path]
) -> None:
    other = lock.locked(tmp_path / "b-minus-1-learned" / "lr-0.01-seed-0")
    other.__enter__()
    before: list[set[Path]] = []

    def sleep(seconds: float) -> None:
        before.append(set(steps))
        other.__exit__(None, None, None)

    monkeypatch.setattr(making.time, "sleep", sleep)
    assert main(words(tmp_path)) == 0
    assert [len(folders) for folders in before] == [4] and len(set(steps)) == 6 and len(steps) == 36


@pytest.mark.usefixtures("few_rows")
def test_the_picture_of_a_table_is_drawn(tmp_path: Path) -> None:
    assert main(words(tmp_path, "--only", "b = -1, learned", "--seeds", "1")) == 0
    assert (tmp_path / "table3.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table", "7"], "the tables are 1, 2, 3, 4, 5 and 6, got 7"),
        (
            ["table", "3", "--only", "b"],
            "--only must be a row of table 3 at this scale (b = -1, learned; b = -1, fixed",
        ),
        (["table", "3", "--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["table", "3", "--set", "model.dept=8", "--dry-run"], "did you mean 'depth'?"),
    ],
)
def test_errors_name_the_argument(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "none")]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "none").exists()


# -- what is measured --------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.stem, self.s1 = OrthoConv2d(1, 4, 3, padding=1), OrthoConv2d(4, 4, 3, padding=1)
        self.s1.weight.data *= factor
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.s1(self.stem(x)))


@pytest.mark.parametrize("factor", [1.0, 0.5, 3.0])
def test_the_measures_of_a_scaled_identity_are_its_factor(factor: float) -> None:
    model, images = Chain(factor), torch.randn(2, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = measure.isometry(model, images, torch.tensor([0, 2]))
    assert found == pytest.approx((factor, factor, factor))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# -- the tables in docs/ -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [int(path.stem[5:]) for path in sorted(DOCS.glob("table[1-5].csv"))])
def test_the_committed_table_says_what_its_csv_file_says(number: int) -> None:
    table, rows = plan.table(number, "small"), read(DOCS / f"table{number}.csv")
    assert [row["row"] for row in rows] == [row.name for row in table.rows]
    assert (DOCS / f"table{number}.md").read_text() == writing.markdown(table, rows)
    assert (DOCS / f"table{number}.png").exists()
    text = (DOCS.parent / "tables.md").read_text()
    assert f"tables/table{number}.md" in text and f"tables/table{number}.png" in text
