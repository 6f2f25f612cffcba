"""The runs of a table. Each is an ordinary training run, made once, in a folder of its own that keeps its result."""

from __future__ import annotations

import csv
import json
import subprocess
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..._version import __version__
from ...models.load_official import load_weights
from .. import config
from ..build import build_model, choose_device
from ..config import Config
from ..data.datasets import open_source
from ..data.loader import Loader
from ..distributed import Processes
from ..divergence import Diverged
from ..loop import Run
from ..saving import checkpoint, lock, resuming
from ..saving.files import disk_errors_naming, replacing
from ..validation import to_device
from .measure import isometry

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """What a run has come to. If it diverged, it has no accuracy; the rest is of its last good weights."""

    top1: float | None  # of the validation images after the last epoch, percent
    diverged: int | None  # the step
    classes: int
    seconds: float  # of training, all processes at once
    smallest: float  # singular values, after training
    largest: float
    gradient_before: float  # `measure.gradient_ratio` before and after training
    gradient: float
    commit: str


def read(settled: Config, folder: Path) -> Result | None:
    """The result of the run in `folder`; None if it has none yet. ValueError if that run had other settings."""
    path = folder / RESULT
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    _expect(settled, content["config"], folder)
    return Result(**content["result"])


def make(settled: Config, folder: Path, processes: Processes) -> Result | None:
    """The result of the run in `folder`, which is begun or resumed if it has not ended yet. None if another process is
    at work on it.

    Raises Interrupted as `Run.fit` does; ValueError if the folder has a run with other settings.
    """
    with ExitStack() as stack:
        done = processes.from_main(lambda: read(settled, folder))
        if done is not None or not processes.from_main(lambda: taken(folder, stack)):
            return done
        state = _state(settled, folder, processes)
        diverged = None
        try:
            if state is None or state["position"]["epoch"] <= settled.schedule.epochs:
                Run(settled, folder, state, processes).fit()
        except Diverged as error:
            diverged = error.step
            processes.say(str(error))
        return processes.from_main(lambda: _conclude(settled, folder, diverged))


def taken(folder: Path, stack: ExitStack) -> bool:
    """Whether this process has the run in `folder` until `stack` ends; if not, another process is at work on it."""
    try:
        stack.enter_context(lock.locked(folder))
    except BlockingIOError:
        return False
    return True


def _state(settled: Config, folder: Path, processes: Processes) -> dict[str, Any] | None:
    """The state in the checkpoint to go on from, if there is one."""
    if not processes.from_main(lambda: bool(checkpoint.find(folder, "latest", "previous"))):
        return None
    path = processes.from_main(lambda: checkpoint.load_latest(folder)[1])
    state = checkpoint.load(path)
    _expect(settled, state["config"], folder)
    return state


def _expect(settled: Config, found: dict[str, Any], folder: Path) -> None:
    changes = resuming.changes(config.load(None, (), found), settled)
    if changes:
        raise ValueError(f"{folder} holds a run with other settings ({', '.join(changes)}); choose another --output")


def _conclude(settled: Config, folder: Path, diverged: int | None) -> Result:
    rows = _metrics(folder / "metrics.csv")
    device = choose_device(settled.device)
    source = open_source(settled.data, settled.seed)
    loader = Loader(source.train, settled.data.batch_size, 0, settled.seed, True, False)
    batch = next(batch for batch in loader.batches() if batch.images is not None)
    assert batch.images is not None
    images, labels = to_device(batch.images, batch.labels, settled, device)
    torch.manual_seed(settled.seed)
    model = build_model(settled.model, source.num_classes, source.channels).to(device)
    before = isometry(model, images, labels)
    load_weights(model, checkpoint.load_latest(folder)[0]["model"], folder)
    after = isometry(model, images, labels)
    result = Result(
        None if diverged else float(rows[-1]["val_top1"]),
        diverged,
        source.num_classes,
        sum(float(row["seconds"]) for row in rows),
        after.smallest,
        after.largest,
        before.gradient,
        after.gradient,
        commit(),
    )
    with replacing(folder / RESULT) as temporary, disk_errors_naming(folder / RESULT):
        temporary.write_text(json.dumps({"config": settled.as_dict(), "result": asdict(result)}))
    return result


def _metrics(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    """The commit of the checkout that runs; without a checkout, the version."""
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    )
    return answer.stdout.strip() if answer.returncode == 0 else f"version {__version__}"
