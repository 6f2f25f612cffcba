"""Paths and names as people have them: an option that is a path takes it literally, and every name can be printed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from isonet_fast.train.commands.cli import main, parser
from isonet_fast.train.paths import to_resume
from isonet_fast.train.saving import checkpoint
from isonet_fast.train.terminal import printable

from .test_commands import FOLDER, words

ODD = 'a #1: "it\'s" [*&] $HOME ~ü\n'


BRIEF = ["data.source=synthetic:8", "data.image_size=8", "data.batch_size=8", "schedule.epochs=1"]


def test_every_option_that_is_a_path(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Spaces, #, colons, quotes, brackets, a newline at the end: data, configuration, run, checkpoint and export."""
    odd = tmp_path / ODD
    odd.mkdir()
    photographs.rename(odd / "images")
    (tmp_path / "a ").mkdir()  # what YAML would make of the name
    (odd / f"{ODD}.yaml").write_text("penalty: {coeff: 0.5}\n")
    monkeypatch.chdir(odd)
    train = ["train", "--config", f"{ODD}.yaml", "--data", "imagefolder:images"]
    assert main([*train, *words(*FOLDER)]) == 0
    run = odd / "runs" / ODD
    assert (run / "latest.pt").exists() and {p.name for p in odd.iterdir()} == {"images", f"{ODD}.yaml", "runs"}
    monkeypatch.chdir(tmp_path)
    data = ["--data", f"imagefolder:{odd}/images"]
    assert main(["train", "--resume", str(run), *data, "--set", "schedule.epochs=2"]) == 0
    assert main(["evaluate", str(run), *data]) == 0
    assert main(["evaluate", str(run), "--set", f"data.source=imagefolder:{odd}/images"]) == 0
    assert main(["export", str(run / "best.pt"), str(odd / f"{ODD}.pt")]) == 0
    out = capsys.readouterr().out
    assert f"checkpoints and metrics.csv in runs/{printable(ODD)}\n" in out
    assert main(["report", str(odd / f"{ODD}.pt"), "--config", str(odd / f"{ODD}.yaml"), "--size", "24"]) == 0
    assert main(["evaluate", str(odd / "none")]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_tilde_is_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`~` where no shell has looked, as in --output=~/x; the name of no user stays what it is, as in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["train", "--config=~/a.yaml", "--output=~/run", "--data=imagefolder:~/images"]
    args = parser().parse_args(words)
    assert args.output == tmp_path / "run"
    assert main(words) == 1
    assert f"No such file or directory: '{tmp_path}/a.yaml'" in capsys.readouterr().err
    for source in ("~", "~nosuchuser"):
        assert main(["train", "--config", "isonet_digits", "--output=~/run", f"--data=imagefolder:{source}"]) == 1
        expected = (
            f"No such file or directory: '{source.replace('~', str(tmp_path)) if source == '~' else source}/train'"
        )
        assert expected.replace("/train", "/val") in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["train", "--output", ""], ["train", "--resume", ""], ["evaluate", ""], ["report", ""]]
)
def test_an_empty_path_is_not_the_current_directory(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert "expected a path, got ''" in capsys.readouterr().err


def test_the_command_that_goes_on_can_be_pasted(tmp_path: Path) -> None:
    command = to_resume(tmp_path / ODD)
    said = subprocess.run(["sh", "-c", f'set -- {command}; printf %s "$4"'], capture_output=True, text=True)
    assert said.stdout == str(tmp_path / ODD)
    assert to_resume(Path("runs/x")) == "isonet-fast train --resume runs/x"


def test_names_are_printed_on_one_line() -> None:
    assert printable("naïve \n\x1b[2J\udcff") == r"naïve \n\x1b[2J\udcff"


def test_a_command_runs_without_any_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`>&-` leaves Python without a stream."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["train", "--config", "nothing"]) == 1
    assert main(["train", "--config", "isonet_digits", "--output", str(tmp_path / "run"), *words(*BRIEF)]) == 0
    assert sys.stdout is None


def test_names_that_the_output_cannot_encode(photographs: Path, tmp_path: Path) -> None:
    """A run in an ASCII terminal names a file of Latin-1 bytes and goes on."""
    broken = os.fsencode(photographs / "train" / "dog") + b"/caf\xe9\n.jpg"
    with open(broken, "wb") as file:
        file.write(b"no image")
    words_ = ["train", "--config", "isonet_digits", "--output", "naïve", "--data", f"imagefolder:{photographs}"]
    arguments = [sys.executable, "-m", "isonet_fast", *words_, *words(*FOLDER)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    corrupt = checkpoint.load(tmp_path / "naïve" / "latest.pt")["corrupt"]
    assert os.fsdecode(broken) in corrupt
    assert r"/train/dog/caf\udce9\n.jpg (" in done.stdout and r"checkpoints and metrics.csv in na\xefve" in done.stdout
