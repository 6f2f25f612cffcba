"""The commands as a user types them: train, resume, evaluate, and what they say when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isonet_fast import models
from isonet_fast.train import checkpoint, evaluate
from isonet_fast.train.build import NETWORKS
from isonet_fast.train.cli import main

from .conftest import SMALL


def words(*settings: str) -> list[str]:
    return [word for setting in (*SMALL, *settings) for word in ("--set", setting)]


FOLDER = ["data.image_size=24", "data.batch_size=4", "schedule.epochs=1", "data.eval_batch_size=4"]


def test_images_from_end_to_end(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real JPEG files, worker processes, one corrupt file: an epoch, its report, and its checkpoint evaluated."""
    run = tmp_path / "run"
    common = ["--data", f"imagefolder:{photographs}", *words(*FOLDER, "data.workers=2")]
    assert main(["train", "--config", "isonet_digits", "--output", str(run), *common]) == 0
    out = capsys.readouterr().out
    assert f"skipped a corrupt image, the 1st: {photographs}/train/dog/4.jpg (" in out
    assert checkpoint.load(run / "latest.pt")["corrupt"].keys() == {f"{photographs}/train/dog/4.jpg"}
    assert (run / "metrics.csv").read_text().splitlines()[1].endswith(",1")
    assert main(["evaluate", str(run)]) == 0
    assert "(6 images)" in capsys.readouterr().out
    assert main(["report", str(run), "--size", "24"]) == 0
    assert "s1.b1.f.a" in capsys.readouterr().out
    assert main(["report", str(run), "--size", "2"]) == 1
    assert "--size must be at least 8, got 2" in capsys.readouterr().err

    (photographs / "val" / "cat" / "1.jpg").write_bytes(b"x")
    assert main(["evaluate", str(run / "best.pt"), "--data", f"imagefolder:{photographs}"]) == 0
    out = capsys.readouterr().out
    assert "(5 images, 1 corrupt skipped)" in out and "skipped a corrupt image" in out
    assert main(["evaluate", str(run), "--strict"]) == 1
    assert "val/cat/1.jpg" in capsys.readouterr().err


def test_strict(photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "--config", "isonet_digits", "--data", f"imagefolder:{photographs}", "--strict"]
    assert main([*arguments, "--output", str(tmp_path / "run"), *words(*FOLDER)]) == 1
    assert f"corrupt image: {photographs}/train/dog/4.jpg (" in capsys.readouterr().err


def test_resume_extends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic = ["--data", "synthetic:16", *words("data.image_size=8", "data.batch_size=8", "schedule.epochs=1")]
    start = ["train", "--config", "isonet_digits", "--output", str(tmp_path), *synthetic]
    assert main(start) == 0
    assert main(start) == 1
    assert f"holds a run already: go on with --resume {tmp_path}" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert "at the end of its 1 epochs" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path), "--set", "schedule.epochs=2"]) == 0
    assert checkpoint.load(tmp_path / "latest.pt")["position"] == {**POSITION, "best": pytest.approx(50, abs=50)}


POSITION = {"epoch": 3, "examples": 0, "step": 4}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "say what to train with --config: isonet101"),
        (["train", "--config", "isonet50"], "no data set given; use --data imagefolder:DIR"),
        (["train", "--config", "isonet50", "--set", "lr=1"], "unknown key lr"),
        (["train", "--resume", "{tmp}"], "no checkpoint in {tmp}"),
        (["train", "--resume", "{tmp}", "--output", "x"], "leave --output out"),
        (
            ["train", "--config", "isonet50", "--data", "digits", "--set", "device=gpu"],
            "device must be auto, cpu, cuda",
        ),
        (["evaluate", "{tmp}/none.pt"], "none.pt"),
        (["evaluate", "{tmp}/text.pt"], "text.pt is"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.pt").write_text("hello")
    assert main([a.format(tmp=tmp_path) for a in arguments]) == 1
    err = capsys.readouterr().err
    assert message.format(tmp=tmp_path) in err and err.startswith("isonet-fast: ") and "Traceback" not in err


# -- official checkpoints ---------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "isonet_cifar"])
def test_official_checkpoints_are_recognised(name: str) -> None:
    with torch.device("meta"):
        state = getattr(models, name)(num_classes=7).state_dict()
    assert evaluate.recognise(state, Path("x.pt")).name == name


def test_an_official_checkpoint_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.isonet18(num_classes=10)
    torch.nn.init.zeros_(model.head.fc.weight)
    torch.nn.init.zeros_(model.head.fc.bias)
    with torch.no_grad():
        model.head.fc.bias[3] = 5.0
    path = tmp_path / "official.pt"
    torch.save({"net": {f"module.{n}": v for n, v in model.state_dict().items()}, "epoch": 1}, path)
    common = ["--set", "data.image_size=32", "--set", "data.workers=0", "--set", "device=cpu"]
    assert main(["evaluate", str(path), "--data", "synthetic:40", *common]) == 0
    assert "top-1 10.00 %" in capsys.readouterr().out  # it always says class 3
    assert main(["evaluate", str(path), "--data", "digits", *common]) == 1
    assert "tells 10 classes apart in images of 3 channels; digits has 10 classes and 1" in capsys.readouterr().err


def test_weights_of_no_published_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pt"
    torch.save({"net": {"module.a": torch.ones(1)}}, path)
    assert main(["evaluate", str(path), "--data", "digits"]) == 1
    assert "holds none of the published networks (1 weights, the first 'a'); say which one" in capsys.readouterr().err
