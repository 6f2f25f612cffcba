"""Table 6: Mask R-CNN on COCO, box and mask AP. Its rows are ordinary runs of `isonet-fast detect`, each made once."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any

from .. import plain_yaml
from ..detection import shapes
from ..detection.config import DetectionConfig
from ..detection.evaluation import COLUMNS as AP
from ..distributed import Processes
from ..divergence import Diverged
from ..saving import checkpoint
from ..saving.files import discard, disk_errors_naming, replacing, temporary_beside
from . import plan
from .making import POLL
from .plan import TableRow
from .running import RESULT, commit, taken

SCALES = ("small", "imagenet")
MEASURES = tuple(f"{kind}_{name}" for kind in ("box", "mask") for name in AP)
COLUMNS = ("row", "published_box_AP", "published_mask_AP", *MEASURES, "box_deviation", "mask_deviation")
COLUMNS += ("seeds", "diverged", "seconds", "commit")


def rows(scale: str, only: str | None = None) -> tuple[TableRow, ...]:
    """The rows at one scale, or the one named `only`; ValueError for an unknown scale or row."""
    if scale not in SCALES:
        raise ValueError(f"table 6 has the scales {' and '.join(SCALES)} (which is COCO), got {scale}")
    return plan.only(only, [_row(one) for one in _read()[scale]], 6)


def _read() -> Any:
    path = resources.files(__package__) / "table6.yaml"
    return plain_yaml.parse(path.read_text(encoding="utf-8"), str(path))


def _row(one: dict[str, Any]) -> TableRow:
    return TableRow(one["name"], one["preset"], plan.words(one.get("set", {})), kind=DetectionConfig)


def generated(folder: Path, processes: Processes) -> list[str]:
    """The setting that names the tiny COCO in `folder`, which is written if it is not there."""
    path = folder / "coco"

    def write() -> None:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = temporary_beside(path)
            try:
                shapes.write(temporary)
                os.replace(temporary, path)
            finally:
                discard(temporary)

    processes.from_main(write)
    return [f"data.source=coco:{path}"]


def make(settled: DetectionConfig, folder: Path, processes: Processes) -> dict[str, Any] | None:
    """The result of the run in `folder`, which is begun or resumed if it has not ended yet. None if another process is
    at work on it. Raises as `Run.fit` does, and ValueError if the run there has other settings."""
    from ..detection.run import DetectionRun  # torchvision

    with ExitStack() as stack:
        if not processes.from_main(lambda: taken(folder, stack)):
            return None
        done = processes.from_main(lambda: _read_result(folder))
        if done is not None:
            _expect(settled, done["config"], folder)
            return done["result"]
        state = None
        if processes.from_main(lambda: bool(checkpoint.find(folder, "latest", "previous"))):
            state = checkpoint.load(processes.from_main(lambda: checkpoint.load_latest(folder)[1]))
            _expect(settled, state["config"], folder)
        diverged, found = None, dict.fromkeys(MEASURES, 0.0)
        try:
            found = DetectionRun(settled, folder, state, processes).fit()
        except Diverged as error:
            diverged = error.step
            processes.say(str(error))
        return processes.from_main(lambda: _conclude(settled, folder, found, diverged))


def _read_result(folder: Path) -> dict[str, Any] | None:
    """{"config": ..., "result": ...}; None where the run has no result yet."""
    path = folder / RESULT
    return json.loads(path.read_text()) if path.exists() else None


def _expect(settled: DetectionConfig, found: dict[str, Any], folder: Path) -> None:
    if found != settled.as_dict():
        raise ValueError(f"{folder} holds a run with other settings; choose another --output")


def _conclude(settled: DetectionConfig, folder: Path, found: dict[str, float], diverged: int | None) -> dict[str, Any]:
    with open(folder / "metrics.csv", newline="") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    values = {name: None if math.isnan(value) else value for name, value in found.items()}
    result = {**values, "diverged": diverged, "seconds": seconds, "commit": commit()}
    with replacing(folder / RESULT) as temporary, disk_errors_naming(folder / RESULT):
        temporary.write_text(json.dumps({"config": settled.as_dict(), "result": result}))
    return result


def complete(
    scale: str, only: str | None, seeds: int, settings: Sequence[str], folder: Path, processes: Processes
) -> None:
    """Make what is missing, and write the table after every row; wait for the runs of other processes."""
    chosen = rows(scale, only)
    if scale == "small" and not any(setting.startswith("data.source=") for setting in settings):
        settings = [*settings, *generated(folder, processes)]
    while True:
        complete = True
        for n, row in enumerate(chosen):
            for seed in range(seeds):
                run = n * seeds + seed + 1
                processes.say(f"table 6, run {run} of {len(chosen) * seeds}: {row.name}, seed {seed}")
                settled, own = row.config(seed, None, settings), folder / row.folder / f"seed-{seed}"
                complete &= make(settled, own, processes) is not None
            processes.from_main(lambda: _write(scale, seeds, folder))
        if complete:
            break
        time.sleep(POLL)
    processes.from_main(lambda: _picture(_write(scale, seeds, folder), folder))


def _write(scale: str, seeds: int, folder: Path) -> list[dict[str, str]]:
    """Write the results of all rows that are there, whatever their settings, because each row may have its own
    (`detector.weights_backbone`)."""
    lines = []
    for row in rows(scale):
        found = [_read_result(folder / row.folder / f"seed-{seed}") for seed in range(seeds)]
        lines.append(line(row.name, [one["result"] for one in found if one is not None]))
    path = folder / "table6.csv"
    with replacing(path) as temporary, disk_errors_naming(path):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    path = folder / "table6.md"
    with replacing(path) as temporary, disk_errors_naming(path):
        temporary.write_text(markdown(scale, lines), encoding="utf-8")
    return lines


def line(name: str, results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A line of the CSV file: means over the seeds that did not diverge."""
    values = {**dict.fromkeys(COLUMNS, ""), "row": name}
    good = [result for result in results if result["diverged"] is None]
    for measure in MEASURES:
        found = [result[measure] for result in good if result[measure] is not None]
        values[measure] = f"{statistics.mean(found):.1f}" if found else ""
    for kind in ("box", "mask"):
        found = [result[f"{kind}_AP"] for result in good]
        values[f"{kind}_deviation"] = f"{statistics.stdev(found):.1f}" if len(found) > 1 else ""
    if results:
        values["seeds"] = str(len(results))
        values["diverged"] = ", ".join(f"at step {r['diverged']}" for r in results if r["diverged"] is not None)
        values["seconds"] = f"{sum(result['seconds'] for result in results):.0f}"
        values["commit"] = ", ".join(sorted({result["commit"] for result in results}))
    return values


def markdown(scale: str, lines: Sequence[dict[str, str]]) -> str:
    """The CSV file's lines as a table for readers."""
    heads = ["", "published box, mask", "box AP", "AP50", "AP75", "mask AP", "AP50", "AP75", "diverged", "seconds"]
    text = [f"# Table 6, {scale}: {_read()['title']}", "", _cells(heads), _cells(["---"] * len(heads))]
    for values in lines:
        published = ", ".join(filter(None, (values["published_box_AP"], values["published_mask_AP"])))
        cells = [values["row"], published]
        for kind in ("box", "mask"):
            spread = f" ± {values[f'{kind}_deviation']}" if values[f"{kind}_deviation"] else ""
            cells += [values[f"{kind}_AP"] + spread, values[f"{kind}_AP50"], values[f"{kind}_AP75"]]
        text.append(_cells([*cells, values["diverged"], values["seconds"]]))
    return "\n".join(text) + "\n"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _picture(lines: Sequence[dict[str, str]], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 1.6 + 0.4 * len(lines)), sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("box", "mask"), strict=True):
        errors = [float(values[f"{kind}_deviation"] or 0) for values in lines]
        axis.barh(
            range(len(lines)), [float(values[f"{kind}_AP"] or 0) for values in lines], xerr=errors, color="#4c72b0"
        )
        axis.set(title=f"{kind} AP", xlim=(0, 100))
    axes[0].set_yticks(range(len(lines)), [values["row"] for values in lines])
    axes[0].invert_yaxis()
    path = folder / "table6.png"
    with replacing(path) as temporary, disk_errors_naming(path):
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
