"""The commands as a user types them: train, resume, evaluate, and what they say when something is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from isonet_fast import models
from isonet_fast.train.build import NETWORKS
from isonet_fast.train.commands import evaluate
from isonet_fast.train.commands.cli import main
from isonet_fast.train.saving import checkpoint, lock

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


def test_strict_training_ends_at_a_corrupt_image(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train", "--config", "isonet_digits", "--data", f"imagefolder:{photographs}", "--strict"]
    assert main([*arguments, "--output", str(tmp_path / "run"), *words(*FOLDER)]) == 1
    assert f"corrupt image: {photographs}/train/dog/4.jpg (" in capsys.readouterr().err


def test_resume_extends_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic = ["--data", "synthetic:16", *words("data.image_size=8", "data.batch_size=8", "schedule.epochs=1")]
    start = ["train", "--config", "isonet_digits", "--output", str(tmp_path), *synthetic]
    assert main(start) == 0
    assert main(start) == 1
    assert f"holds a run already: go on with isonet-fast train --resume {tmp_path}" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 0
    assert "at the end of its 1 epochs" in capsys.readouterr().out
    assert main(["train", "--resume", str(tmp_path), "--set", "schedule.epochs=2"]) == 0
    assert checkpoint.load(tmp_path / "latest.pt")["position"] == {**POSITION, "best": pytest.approx(50, abs=50)}


NEW = ["train", "--config", "isonet_digits", *words("schedule.epochs=1", "data.batch_size=512")]


@pytest.mark.parametrize("name", ["best.pt", "metrics.csv", ".best-0123abcd.tmp.pt.orig", "notes.txt", "epoch-3.pt"])
def test_a_directory_that_is_not_empty_is_left_alone(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text("theirs")
    assert main([*NEW, "--output", str(tmp_path)]) == 1
    assert f"{tmp_path} is not empty: it holds {name}; choose another --output" in capsys.readouterr().err
    assert main(["train", "--resume", str(tmp_path)]) == 1
    assert f"no checkpoint in {tmp_path}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "theirs"


def test_a_start_that_was_killed_is_no_hindrance(tmp_path: Path) -> None:
    """A killed process leaves its lock's file and the temporary file of its first checkpoint."""
    for name in (lock.NAME, ".latest-0123abcd.tmp.pt"):
        (tmp_path / name).write_text("")
    assert main([*NEW, "--output", str(tmp_path)]) == 0
    assert {"latest.pt", "best.pt", "metrics.csv"} <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


def test_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with lock.locked(run):
        assert main([*NEW, "--output", str(run)]) == 1
        assert f"{run} is in use by a run of process {os.getpid()} on " in capsys.readouterr().err
        assert [path.name for path in run.iterdir()] == [lock.NAME]
        checkpoint.save({"config": {}}, run / "latest.pt")
        assert main(["train", "--resume", str(run)]) == 1
        assert f"{run} is in use by" in capsys.readouterr().err
    assert main([*NEW, "--output", str(tmp_path / "next"), "--data", "imagefolder:absent"]) == 1
    assert not (tmp_path / "next").exists()  # a run that never began leaves nothing


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
        (
            ["train", "--config", "isonet50", "--data", "digits", "--set", "device=mps"],
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


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to ..."
        ),
    ],
    ids=["Python", "CUDA", "CPU"],
)
def test_out_of_memory_says_what_to_lower(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr("isonet_fast.train.loop.Run.fit", fails)
    assert main(["train", "--config", "isonet_digits", "--output", str(tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("isonet-fast: out of memory; try a smaller data.batch_size") and said.count("\n") == 1


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


def test_weights_of_no_network_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.pt"
    torch.save({"net": {"module.a": torch.ones(1)}}, path)
    assert main(["evaluate", str(path), "--data", "digits"]) == 1
    assert "holds no network of this package: expected stem.conv.weight with 4 dim" in capsys.readouterr().err
    torch.save({"stem.conv.weight": torch.ones(1, 1, 1, 1), "head.fc.weight": torch.ones(1, 1)}, path)
    assert main(["evaluate", str(path), "--data", "digits"]) == 1
    assert "holds none of the networks of this package (2 weights, the first 'stem.conv" in capsys.readouterr().err


# -- checkpoints of other layouts -------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return models.isonet_cifar(8, width=4, in_channels=1).state_dict()


@pytest.mark.parametrize(
    "layout",
    [
        lambda state: dict(state),
        lambda state: {"net": {f"module.{name}": value for name, value in state.items()}},
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "format": "theirs"},
    ],
)
def test_every_command_reads_every_layout(
    layout: Callable[..., dict], weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The network of the CIFAR form is recognised too."""
    path = tmp_path / "theirs.pt"
    torch.save(layout(weights), path)
    assert main(["evaluate", str(path), "--data", "digits", *words()]) == 0
    assert "(360 images)" in capsys.readouterr().out
    assert main(["report", str(path), "--size", "8"]) == 0
    assert "s3.b1.f.b" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "ours.pt")]) == 0
    exported = torch.load(tmp_path / "ours.pt", weights_only=True)
    assert exported.keys() == weights.keys() and all(torch.equal(exported[name], weights[name]) for name in weights)


OWN = """
from torch import nn
def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
def number():
    return 3
def failing():
    raise KeyError(3)
"""


def test_report_on_a_network_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "networks_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    state = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, "mine.pt")
    report = ["report", "mine.pt", "--size", "8", "--model"]
    assert main([*report, "networks_of_mine:network"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["layer", "0", "2"]
    for wrong, message in {
        "networks_of_mine": "--model must be module:function, for example networks:my_network, got 'networks_of_mine'",
        "absent:network": "--model absent:network cannot be built: ModuleNotFoundError: No module named 'absent'",
        "networks_of_mine:absent": "cannot be built: AttributeError: module 'networks_of_mine' has no attribute",
        "networks_of_mine:failing": "cannot be built: KeyError: 3",
        "networks_of_mine:number": "must return a torch.nn.Module, got int",
    }.items():
        assert main([*report, wrong]) == 1
        assert message in capsys.readouterr().err
    assert main([*report, "networks_of_mine:network", "--config", "isonet50"]) == 1
    assert "--model builds the network; leave --config out" in capsys.readouterr().err
    torch.save({"0.weight": torch.ones(4, 2, 3, 3)}, "mine.pt")
    assert main([*report, "networks_of_mine:network"]) == 1
    assert "mine.pt does not fit this Sequential: missing 0.bias, 2.weight, 2.bias" in capsys.readouterr().err


# -- what the machine does not give -----------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel refuses to write more into a file, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


def test_a_full_disk_at_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    with files_of_at_most(5000):
        assert main([*NEW, "--output", str(run)]) == 1
    err = capsys.readouterr().err
    assert err == f"isonet-fast: [Errno 27] File too large: '{run}/latest.pt'; nothing has been saved yet.\n"
    assert not run.exists()


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_export_to_a_place_that_does_not_take_it(
    kind: str, weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(kind) if kind == "safetensors" else None
    theirs = tmp_path / "theirs.pt"
    torch.save(weights, theirs)
    export = ["export", str(theirs)]
    with files_of_at_most(5000):
        assert main([*export, str(tmp_path / f"out.{kind}")]) == 1
    assert capsys.readouterr().err == f"isonet-fast: [Errno 27] File too large: '{tmp_path}/out.{kind}'\n"
    (tmp_path / "file").write_text("theirs")
    (tmp_path / f"directory.{kind}").mkdir()
    for out, reason in {
        f"file/out.{kind}": f"[Errno 20] Not a directory: '{tmp_path}/file'",
        f"directory.{kind}": f"[Errno 21] Is a directory: '{tmp_path}/directory.{kind}'",
        "file": f"the file to write must end in .pt, .safetensors, .onnx or .pt2, got {tmp_path}/file",
    }.items():
        assert main([*export, str(tmp_path / out)]) == 1
        assert capsys.readouterr().err == f"isonet-fast: {reason}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"directory.{kind}", "file", "theirs.pt"]


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_export_writes_over_its_own_files_only(
    kind: str, weights: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip(kind) if kind == "safetensors" else None
    theirs = tmp_path / "theirs.pt"
    torch.save(weights, theirs)
    out = tmp_path / f"out.{kind}"
    for _ in range(2):
        assert main(["export", str(theirs), str(out)]) == 0
    (tmp_path / "junk.pt").write_text("junk")
    for there in (theirs, tmp_path / "junk.pt"):
        before = there.read_bytes()
        assert main(["export", str(theirs), str(there)]) == 1
        assert f"{there} is there already and is no exported file" in capsys.readouterr().err
        assert there.read_bytes() == before


@pytest.mark.parametrize("rank", ["", "1", "x"])
def test_without_torchrun_RANK_means_nothing(
    rank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A diverged run of rank 1 leaves the message to rank 0."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*NEW, "--output", str(tmp_path), "--set", "optimizer.lr=1e12"]) == 1
    said = capsys.readouterr()
    assert "isonet-fast: non-finite loss at step 2" in said.err
    assert "torchrun did not start this process: it trains alone" in said.out


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_with_torchrun_the_numbers_must_be_there(
    variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv(variable, "")
    assert main([*NEW, "--output", str(tmp_path / "run")]) == 1
    assert (
        f"the environment variable {variable} must be a number as torchrun sets it, got ''" in capsys.readouterr().err
    )
