"""Training under torchrun: what several processes do together is what one does alone, and they stop and go on as one.

Everything runs in two starts of torchrun, on two ranks and on three; each test looks at what its runs have left.
"""

from __future__ import annotations

import csv
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from isonet_fast.train.commands import evaluate
from isonet_fast.train.commands.cli import main
from isonet_fast.train.data.loader import Order
from isonet_fast.train.saving import checkpoint, sharded_checkpoint

from .conftest import SMALL
from .several import Command, run, torchrun
from .test_loop import rows, same

# 40 images a global batch of 8: five steps an epoch. Of the 10 to validate, in batches of 2 x 7, rank 1 has 3.
BASE = ["data.source=synthetic:40", "data.image_size=8", "data.eval_batch_size=7", "schedule.epochs=2"]
BASE += [
    "schedule.warmup=0",
    "schedule.milestones=[1]",
    "penalty.coeff=0.1",
    "optimizer.clip=10",
    "model.residual=true",
]
ONE = ["data.batch_size=8", "optimizer.lr=0.04"]  # what the other two are on one process
TWO = ["data.batch_size=4", "optimizer.lr=0.02"]
HALF = ["precision=float16", "penalty.coeff=10"]
OFTEN = ["penalty.interval=2", "checkpoint.every_steps=3", "data.workers=1"]
HALVES = ["data.batch_size=2", "accumulate=2", "optimizer.lr=0.02"]


def words(directory: Path, *settings: str) -> list[str]:
    preset = directory.parent / "empty.yaml"
    preset.write_text("{}")
    sets = [word for setting in (*SMALL, *BASE, *settings) for word in ("--set", setting)]
    return ["train", "--config", str(preset), "--output", str(directory), *sets]


def resume(directory: Path, *settings: str) -> list[str]:
    return ["train", "--resume", str(directory), *(word for setting in settings for word in ("--set", setting))]


def table(directory: Path) -> list[str]:
    """One row at three learning rates."""
    settings = (*SMALL, *BASE, "data.batch_size=4", "schedule.epochs=1")
    sets = [word for setting in settings for word in ("--set", setting)]
    return ["table", "3", "--only", "b = -1, learned", "--seeds", "1", "--output", str(directory), *sets]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """One process, whole; and one that is stopped, to be gone on with by two."""
    assert run(words(folder / "one", *ONE), None, 0) == 0
    assert run(words(folder / "one-to-two", *ONE), ["SIGTERM", 0, 7], 0) == 143
    shutil.copytree(folder / "one-to-two", folder / "one-to-sharded")
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path, one: Path) -> Any:
    """The runs on two ranks, beside each other in `folder`; gives what they said, and each command's exit code."""
    photographs(folder / "images")
    new = lambda name, *settings: words(folder / name, *settings)
    stop = ["SIGTERM", 1, 7]
    pictures = [
        f"data.source=imagefolder:{folder / 'images'}",
        "data.image_size=16",
        "data.batch_size=1",
        "data.workers=1",
    ]
    return start(
        2,
        folder,
        {
            "two": (new("two", *TWO), None),
            "halves": (new("halves", *HALVES), None),
            "sharded": (new("sharded", *TWO, "fsdp=true"), None),
            "sharded halves": (new("sharded-halves", *HALVES, "fsdp=true"), None),
            "3 to validate": (new("batch3", *TWO, "data.eval_batch_size=3"), None),
            "10 to validate": (new("batch10", *TWO, "data.eval_batch_size=10"), None),
            "10 to validate, sharded": (new("sharded10", *TWO, "data.eval_batch_size=10", "fsdp=true"), None),
            "float16": (new("float16", *TWO, *HALF), None),
            "noisy": (new("noisy", *TWO, *OFTEN), ["noisy", 0, 0]),
            "noisy, stopped": (new("noisy-parts", *TWO, *OFTEN), ["noisy SIGTERM", 1, 7]),
            "noisy, on": (resume(folder / "noisy-parts"), ["noisy", 0, 0]),
            "noisy, sharded": (new("noisy-sharded", *TWO, "fsdp=true"), ["noisy", 0, 0]),
            "noisy, sharded, stopped": (new("noisy-sharded-parts", *TWO, "fsdp=true"), ["noisy SIGTERM", 0, 3]),
            "noisy, sharded, on": (resume(folder / "noisy-sharded-parts"), ["noisy", 0, 0]),
            "stopped": (new("two-to-one", *TWO), stop),
            "stopped, sharded": (new("sharded-to-one", *TWO, "fsdp=true"), stop),
            "stopped, then three": (new("sharded-to-three", *TWO, "fsdp=true"), stop),
            "from one": (resume(folder / "one-to-two", *TWO), None),
            "to sharded": (resume(folder / "one-to-sharded", *TWO, "fsdp=true"), None),
            "diverged": (new("diverged", *TWO), ["NaN", 1, 4]),
            "diverged, sharded": (new("diverged-sharded", *HALVES, "fsdp=true"), ["NaN", 1, 4]),
            "pictures": (new("pictures", *pictures), None),
            "another's": (new("one", *TWO), None),
            "table": (table(folder / "table"), None),
            "table, diverged": (table(folder / "table-diverged"), ["NaN", 1, 2]),
        },
    )


@pytest.fixture(scope="module")
def three(folder: Path, two: Any) -> Any:
    """The runs on three ranks; the last one is stopped, so that torchrun itself must fail."""
    shutil.copytree(folder / "sharded-to-three", folder / "stopped-by-two")
    return start(
        3,
        folder,
        {
            "three": (words(folder / "three", *TWO), None),
            "from two": (resume(folder / "sharded-to-three"), None),
            "stopped": (words(folder / "three-stopped", *TWO), ["SIGTERM", 2, 2]),
        },
    )


def start(ranks: int, folder: Path, plan: dict[str, Command]) -> Any:
    done = torchrun(ranks, list(plan.values()), folder)
    said = done.stdout + done.stderr
    codes = {
        (int(rank), name): int(code)
        for n, name in enumerate(plan)
        for rank, code in re.findall(rf"rank (\d+), command {n}: (\d+)", done.stdout)
    }
    assert len(codes) == ranks * len(plan), said[-5000:]
    return SimpleNamespace(said=said, code=done.returncode, codes=codes)


def photographs(folder: Path) -> None:
    """Eight images to train on, of which one is cut off: then a rank has a batch of which it can read nothing."""
    from PIL import Image

    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            directory = folder / part / name
            directory.mkdir(parents=True)
            for n in range(count):
                pixels = np.random.default_rng(n).integers(0, 200, (20, 24, 3), dtype=np.uint8) + 55 * label
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{n}.jpg")
    broken = folder / "train" / "dog" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:300])


def latest(directory: Path) -> dict[str, Any]:
    return checkpoint.load_latest(directory)[0]


def alike(a: Path, b: Path) -> None:
    """Weights and momentum to 2e-6 of the largest (measured: 2e-7), means of a loss too, counts exactly."""
    one, other = latest(a), latest(b)
    assert one["position"] == other["position"]
    for name, weight in one["model"].items():
        close(other["model"][name], weight, name)
    moments, others = one["optimizer"]["state"], other["optimizer"]["state"]
    assert moments.keys() == others.keys() and len(moments) == len(one["model"])
    scale = max(moment["momentum_buffer"].abs().max().item() for moment in moments.values())
    for n, moment in moments.items():
        close(others[n]["momentum_buffer"], moment["momentum_buffer"], f"momentum {n}", scale)
    for row, expected in zip(rows(b), rows(a), strict=True):
        for key, value in row.items():
            tolerance = 1e-5 if key in ("loss", "penalty", "val_loss") else 1e-12
            assert float(value) == pytest.approx(float(expected[key]), rel=tolerance), key


def close(actual: torch.Tensor, expected: torch.Tensor, name: str, scale: float = 0) -> None:
    error = (actual - expected).abs().max().item() / max(scale, expected.abs().max().item(), 1e-30)
    assert error < 2e-6, (name, error)


@pytest.mark.parametrize("name", ["two", "halves", "sharded", "sharded-halves"])
def test_several_are_one_of_the_same_global_batch(name: str, folder: Path, two: Any) -> None:
    alike(folder / "one", folder / name)


def test_the_penalty_is_in_the_units_of_the_loss_scale(folder: Path, two: Any) -> None:
    """float16 leaves 1e-3 or so; without the penalty, or with it unscaled, the weights would be elsewhere."""
    weights = {}
    for name, settings in (("one", HALF), ("none", [*HALF, "penalty.coeff=0"])):
        assert run(words(folder / f"{name}-float16", *ONE, *settings), None, 0) == 0
        weights[name] = latest(folder / f"{name}-float16")["model"]
    weights["two"] = latest(folder / "float16")["model"]
    far = lambda a, b: max((weights[a][n] - weights[b][n]).abs().max().item() for n in weights["one"])
    assert far("one", "two") < far("one", "none") / 10


def test_a_table_is_made_by_all_together(folder: Path, two: Any) -> None:
    """Each run is that of one process with twice the batch; where a rank diverges, all go on to the next run."""
    for rank in (0, 1):
        assert two.codes[rank, "table"] == two.codes[rank, "table, diverged"] == 0
    with open(folder / "table" / "table3.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert row["by_learning_rate"].count(";") == 2 and float(row["top1"]) >= 0 and row["seeds"] == "1"
    results = [json.loads(path.read_text()) for path in (folder / "table-diverged").glob("*/*/result.json")]
    assert [result["result"]["diverged"] for result in results] == [2] * 3
    settings = ["data.batch_size=8", "optimizer.lr=0.012", "schedule.epochs=1"]
    assert run(words(folder / "table-one", *settings), None, 0) == 0
    alike(folder / "table-one", folder / "table" / "b-minus-1-learned" / "lr-0.006-seed-0")


def test_three_processes_train_like_one_with_the_whole_batch(folder: Path, three: Any) -> None:
    assert run(words(folder / "one-of-12", "data.batch_size=12", "optimizer.lr=0.06"), None, 0) == 0
    alike(folder / "one-of-12", folder / "three")


def test_the_learning_rate_and_the_batch_are_said(folder: Path, two: Any, three: Any) -> None:
    assert "2 processes, batch 2 x 2 x 2 = 8, learning rate 2 x 0.02 = 0.04" in two.said
    assert "3 processes, batch 3 x 1 x 4 = 12, learning rate 3 x 0.02 = 0.06" in three.said
    assert [float(row["lr"]) for row in rows(folder / "two")] == pytest.approx([0.04, 0.004])
    assert "epoch 2: lr 0.004, loss" in two.said


@pytest.mark.parametrize("name", ["batch3", "batch10", "sharded10"])
def test_every_example_is_validated_once(name: str, folder: Path, two: Any) -> None:
    """Ten examples: 3 + 3 + 3 + 1, 7 + 3, or 10 and nothing for rank 1."""
    for row, expected in zip(rows(folder / name), rows(folder / "one"), strict=True):
        assert float(row["val_loss"]) == pytest.approx(float(expected["val_loss"]), rel=1e-5)
        assert row["val_top1"] == expected["val_top1"] and row["val_top5"] == expected["val_top5"]


@pytest.mark.parametrize("kind", ["noisy", "noisy-sharded"])
def test_as_many_ranks_go_on_with_the_same_bits(kind: str, folder: Path, two: Any) -> None:
    same(latest(folder / kind), latest(folder / f"{kind}-parts"))
    assert rows(folder / kind) == rows(folder / f"{kind}-parts")
    ranks = latest(folder / kind)["ranks"]
    assert not torch.equal(*(rank["random"]["cpu"] for rank in ranks)), "each rank has drawn its own noise"


@pytest.mark.parametrize("name", ["two-to-one", "sharded-to-one"])
def test_one_process_resumes_a_run_of_two(
    name: str, folder: Path, two: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latest(folder / name)["position"] | {"best": 0} == {"epoch": 2, "examples": 16, "step": 7, "best": 0}
    assert run(resume(folder / name, *ONE), None, 0) == 0
    assert "the checkpoint is of 2 processes, this run has 1" in capsys.readouterr().out
    alike(folder / "one", folder / name)
    kept = [path.name for path in checkpoint.find(folder / name, "latest", "previous")]
    assert kept == ["latest.pt", f"previous.{'dcp' if 'sharded' in name else 'pt'}"], "one of each"


@pytest.mark.parametrize("name", ["one-to-two", "one-to-sharded"])
def test_two_processes_resume_a_run_of_one(name: str, folder: Path, two: Any) -> None:
    assert "the checkpoint is of one process, this run has 2" in two.said
    alike(folder / "one", folder / name)


def test_three_go_on_for_two_with_the_rest_of_the_epoch(folder: Path, three: Any) -> None:
    """24 of 40 images are left: two steps of three ranks. One process does the same from the same checkpoint."""
    assert latest(folder / "sharded-to-three")["position"]["step"] == 9
    assert len(latest(folder / "sharded-to-three")["ranks"]) == 3
    same_rate = ["data.batch_size=12", "optimizer.lr=0.06"]
    assert run(resume(folder / "stopped-by-two", *same_rate), None, 0) == 0
    alike(folder / "stopped-by-two", folder / "sharded-to-three")


def test_a_signal_to_one_rank_stops_all_after_the_same_step(folder: Path, two: Any, three: Any) -> None:
    for name in ("stopped", "stopped, sharded", "noisy, stopped"):
        assert [two.codes[rank, name] for rank in range(2)] == [143, 143]
    assert (
        f"SIGTERM after step 7, everything saved; go on with: isonet-fast train --resume {folder / 'two-to-one'}"
        in two.said
    )
    assert two.said.count(f"--resume {folder / 'noisy-parts'}") == 1, "one process says so"
    assert [three.codes[rank, "stopped"] for rank in range(3)] == [143] * 3 and three.code
    assert latest(folder / "three-stopped")["position"]["step"] == 2


@pytest.mark.parametrize("name", ["diverged", "diverged-sharded"])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(name: str, folder: Path, two: Any) -> None:
    last = folder / name / f"latest.{'dcp' if 'sharded' in name else 'pt'}"
    message = (
        "isonet-fast: non-finite loss at step 4 on rank 1: layer 'stem.conv' produced the first one. Halve the "
        f"learning rate. The weights are still those of step 3; the last good checkpoint is {last} (step 0)."
    )
    assert two.said.count(message) == 1
    assert [two.codes[rank, name.replace("-", ", ")] for rank in range(2)] == [1, 1]


def test_an_unreadable_image_of_one_rank(folder: Path, two: Any) -> None:
    """Four steps an epoch; one rank has nothing to compute in one of them and the others wait for no one."""
    assert [two.codes[rank, "pictures"] for rank in range(2)] == [0, 0]
    assert re.search(r"rank \d: skipped a corrupt image, the 1st: .*dog/2\.jpg", two.said)
    assert [(row["step"], row["corrupt_images"]) for row in rows(folder / "pictures")] == [("4", "1"), ("8", "1")]
    for row in rows(folder / "pictures"):
        assert math.isfinite(float(row["loss"]))
        right = float(row["top1"]) * 7 / 100  # of the seven that could be read
        assert right == pytest.approx(round(right), abs=1e-9)


def test_a_run_that_is_there_is_not_written_over(folder: Path, two: Any) -> None:
    assert two.said.count(f"{folder / 'one'} holds a run already: go on with isonet-fast train --resume") == 1
    assert [two.codes[rank, "another's"] for rank in range(2)] == [1, 1]


@pytest.mark.parametrize("out", ["weights.pt", "weights.safetensors"])
def test_a_sharded_checkpoint_exports_to_one_file(
    out: str, folder: Path, three: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint of three ranks in one file, which says which network it is."""
    directory = folder / "sharded-to-three"
    if out.endswith("safetensors"):
        pytest.importorskip("safetensors")
    assert main(["export", str(directory / "latest.dcp"), str(folder / out)]) == 0
    expected = latest(directory)
    if out.endswith(".pt"):
        same(dict(torch.load(folder / out, weights_only=True)), expected["model"])
    data = ["--data", expected["config"]["data"]["source"], "--set", "data.image_size=8", "--set", "device=cpu"]
    measured = evaluate.run(folder / out, data[1], ["data.image_size=8", "device=cpu", "data.workers=0"])
    last = rows(directory)[-1]
    assert measured["top1"] == float(last["val_top1"]) and measured["loss"] == pytest.approx(float(last["val_loss"]))
    assert main(["export", str(directory), str(folder / "weights.bin")]) == 1
    assert "must end in .pt, .safetensors, .onnx or .pt2, got" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["__1_0.distcp", ".metadata", "run.pt", "manifest.json"])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_directory_falls_back(file: str, damage: str, folder: Path, two: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / "sharded", tmp_path / "run")
    path = tmp_path / "run" / "latest.dcp" / file
    path.write_bytes(path.read_bytes().replace(b"o", b"p") + b"}")
    if damage == "missing":
        path.unlink()
    said: list[str] = []
    state, found = checkpoint.load_latest(tmp_path / "run", said.append)
    assert found.name == "previous.dcp" and state["position"]["step"] == 5
    assert len(said) == 1 and "latest.dcp is damaged" in said[0] and file in said[0]


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_a_directory_runs_nothing(folder: Path, two: Any, tmp_path: Path) -> None:
    shutil.copytree(folder / "sharded" / "latest.dcp", tmp_path / "bad.dcp")
    (tmp_path / "bad.dcp" / ".metadata").write_bytes(pickle.dumps(Malicious(str(tmp_path / "owned"))))
    digests = {
        f.name: sharded_checkpoint._digest(f) for f in (tmp_path / "bad.dcp").iterdir() if f.name != "manifest.json"
    }
    (tmp_path / "bad.dcp" / "manifest.json").write_text(json.dumps(digests))
    with pytest.raises(ValueError, match=r"refused, nothing in it was run: it asks for posix\.mkdir"):
        checkpoint.load(tmp_path / "bad.dcp")
    assert not (tmp_path / "owned").exists()


def test_torchrun_starts_a_run_again_where_it_was(
    one: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, by the same torchrun, after a failure; another torchrun's run is refused as ever."""
    for name, value in (("TORCHELASTIC_RUN_ID", "job-1"), ("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    again = words(folder / "again", *ONE)
    assert run(again, ["SIGTERM", 0, 7], 0) == 143
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-2")
    assert run(again, None, 0) == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-1")
    assert run(again, None, 0) == 0
    assert "latest.pt: epoch 2, 16 images of it done" in capsys.readouterr().out
    same(latest(folder / "again"), latest(one))


def keys(order: Order) -> list[list[int]]:
    return [[index for _, index in batch] for batch in order]


@pytest.mark.parametrize("ranks, accumulate", [(1, 1), (2, 1), (3, 1), (1, 3), (2, 3)])
def test_a_step_takes_the_same_examples_on_any_number_of_ranks(ranks: int, accumulate: int) -> None:
    """Step by step what one process takes in batches of 12, from the start and from the middle of an epoch."""
    for start in (0, 17):
        whole = Order(100, 12, 7, True)
        shares = [Order(100, 12 // ranks // accumulate, 7, True, (rank, ranks), accumulate) for rank in range(ranks)]
        for order in (whole, *shares):
            order.epoch, order.start = 3, start
        parts = [keys(order) for order in shares]
        assert all(len(part) == len(order) == accumulate * len(whole) for part, order in zip(parts, shares))
        steps = range(0, len(parts[0]), accumulate)
        taken = [[i for part in parts for batch in part[n : n + accumulate] for i in batch] for n in steps]
        assert taken == keys(whole)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_evaluation_takes_every_example_once(ranks: int) -> None:
    parts = [keys(Order(23, 3, 0, False, (rank, ranks))) for rank in range(ranks)]
    assert sorted(index for part in parts for batch in part for index in batch) == list(range(23))
    assert len({len(part) for part in parts}) == 1, "as many forward passes on every rank"


def test_a_batch_of_all_ranks_that_is_more_than_there_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder / "none", "data.batch_size=16", "accumulate=3")) == 1
    assert "data.batch_size 16 accumulated 3 times is more than the 40 training images" in capsys.readouterr().err


def test_sharding_has_no_float16(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(folder / "none", "precision=float16", "fsdp=true")) == 1
    assert "precision must be float32 or bfloat16 with fsdp, got 'float16'" in capsys.readouterr().err
