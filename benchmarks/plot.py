"""The figures, made only from the rows: `python -m benchmarks.plot` draws docs/speed-*.png and docs/scaling-*.png.

A folder of rows as an argument is drawn instead, into itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ROOT
from .rows import Row, group, ms, read
from .targets import cases, on

COLOURS = {
    "official": "#c44e52",
    "compile": "#dd8452",
    "isonet_fast": "#4c72b0",
    "bare": "#8c8c8c",
    "resnet": "#937860",
}
BOUNDS = {"copy": "#cccccc", "matmul": "#cccccc"}


def bars(axis: Any, rows: list[Row], workloads: list[dict[str, str]], title: str) -> None:
    """One group of bars per case: milliseconds of each provider, 20th to 80th percentile as whiskers."""
    colours = COLOURS | BOUNDS
    sides = [(f"{w['case']}\n{w['dtype']} {w['layout']}", group(rows, ("isonet_fast",), **w)) for w in workloads]
    sides = [(case, side) for case, side in sides if side]
    shown = [name for name in colours if any(name in side for _, side in sides)]
    width = 0.8 / max(1, len(shown))
    for n, name in enumerate(shown):
        at = [(i + n * width, side[name]) for i, (_, side) in enumerate(sides) if name in side]
        below = [ms(row) - float(row["p20_ms"]) for _, row in at]
        above = [float(row["p80_ms"]) - ms(row) for _, row in at]
        heights = [ms(row) for _, row in at]
        places = [place for place, _ in at]
        axis.bar(places, heights, width, yerr=[below, above], color=colours[name], label=name)
    axis.set_xticks(
        [i + 0.4 - width / 2 for i in range(len(sides))], [case for case, _ in sides], rotation=20, fontsize=7
    )
    drawn = [ms(row) for _, side in sides for name, row in side.items() if name in shown]
    # bars of like height start at zero: a logarithmic axis would make much of little
    axis.set(title=title, ylabel="ms", yscale="log" if drawn and max(drawn) > 20 * min(drawn) else "linear")
    axis.legend(fontsize=7)


def lines(axis: Any, rows: list[Row], name: str) -> None:
    """Cost against the number that varies, both logarithmic."""
    found: dict[str, dict[int, float]] = {}
    for workload in [c for c in cases(rows) if c["case"].startswith(f"{name} ") and "scaling" in c["op"]]:
        for provider, row in group(rows, **workload).items():
            found.setdefault(provider, {})[int(workload["case"].split()[1])] = ms(row)
    for provider, points in found.items():
        colour = (COLOURS | BOUNDS).get(provider)
        axis.plot(sorted(points), [points[x] for x in sorted(points)], "o-", color=colour, label=provider)
    axis.set(title=name, xlabel=name, ylabel="ms", xscale="log", yscale="log")
    if found:
        axis.legend(fontsize=7)


def draw(rows: list[Row], kind: str, folder: Path) -> list[Path]:
    """Two figures of one device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    speed, axes = plt.subplots(1, 3, figsize=(19, 4.5), width_ratios=(2, 2, 5), layout="constrained")
    bars(axes[0], rows, cases(rows, op="step"), "training step")
    penalties = [c for c in cases(rows, op="orthogonality") if "isonet" in c["case"] or "cifar" in c["case"]]
    modes = {c["mode"] for c in penalties}
    mode = "loss+gradient graph" if "loss+gradient graph" in modes else "loss+gradient"
    bars(axes[1], rows, [c for c in penalties if c["mode"] == mode], f"penalty, {mode}")
    elementwise = list(cases(rows, op="srelu", mode="forward+backward"))
    bars(axes[2], rows, elementwise[:8], "SReLU, forward+backward")
    scaling, axes = plt.subplots(1, 5, figsize=(22, 4), layout="constrained")
    for axis, name in zip(axes, ("depth", "width", "batch", "channels", "layers"), strict=True):
        lines(axis, rows, name)
    paths = []
    for figure, name in ((speed, "speed"), (scaling, "scaling")):
        figure.suptitle(rows[-1]["device"])
        paths.append(folder / f"{name}-{kind}.png")
        figure.savefig(paths[-1], dpi=110)
        plt.close(figure)
    return paths


def step(rows: list[Row], folder: Path) -> list[Path]:
    """The README's picture: one measured training step, official, ours and bare."""
    from matplotlib import pyplot as plt

    device = [row["device"] for row in rows if row["op"] == "step"][-1]
    own = [row for row in rows if row["device"] == device]
    workload = cases(own, op="step")[0]
    side = group(own, ("official", "isonet_fast", "bare"), **workload)
    labels = {"official": "official arithmetic", "isonet_fast": "isonet_fast", "bare": "without SReLU and penalty"}
    figure, axis = plt.subplots(figsize=(8, 1.9), layout="constrained")
    drawn = axis.barh(list(labels.values()), [ms(side[p]) for p in labels], color=[COLOURS[p] for p in labels])
    axis.bar_label(drawn, [f" {ms(side[p]):.0f} ms" for p in labels])
    axis.invert_yaxis()
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    title = f"one training step: {workload['case']}, {workload['dtype']}, on {device.removeprefix('cpu: ')}"
    axis.set(xticks=[], title=title)
    axis.title.set_fontsize(9)
    path = folder / "step.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return [path]


def peers(rows: list[Row], folder: Path) -> list[Path]:
    """What each way of keeping a convolution orthogonal adds to a step, and the singular values that it reaches."""
    from matplotlib import pyplot as plt

    found = cases(rows, op="peers", mode="step")
    if not found:
        return []
    figure, axes = plt.subplots(2, len(found), figsize=(5 * len(found), 6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(row["provider"] for row in rows if row["op"] == "peers"))
    names.sort(key=lambda name: (name != "isonet_fast", name == "none"))
    for (above, below), workload in zip(axes.T, found, strict=True):
        steps = group(rows, ("none", "isonet_fast"), **workload)
        for at, name in enumerate(names):
            color = "#4c72b0" if name == "isonet_fast" else "#8c8c8c"
            if name in steps and name != "none":
                above.barh(at, ms(steps[name]) - ms(steps["none"]), color=color)
            ends = [group(rows, (name,), **{**workload, "mode": mode}) for mode in ("smallest", "largest")]
            if all(ends):
                span = [1 - float(ends[0][name]["error"]), 1 + float(ends[1][name]["error"])]
                below.plot(span, [at, at], "|-", color=color, markersize=10, linewidth=3)
        above.set(title=workload["case"], xlabel="ms added to the step", xscale="log")
        below.axvline(1.0, color="black", linewidth=0.8)
        below.set(xlabel="singular values, smallest to largest")
        for axis in (above, below):
            axis.set_yticks(range(len(names)), names if axis in axes[:, 0] else [])
            axis.set_ylim(len(names) - 0.5, -0.5)
            axis.grid(axis="x", alpha=0.3)
    figure.suptitle(rows[-1]["device"])
    path = folder / "peers.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return [path]


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    folder = Path(given[0]) if given else ROOT / "docs"
    everything = read(folder) if given else read()
    timed = [row for row in everything if row["p50_ms"]]
    for kind in ("CPU", "GPU"):
        rows = on(timed, kind)
        devices = [row["device"] for row in rows if row["op"] == "step"]
        if devices:  # the one that timed a training step last
            for path in draw([row for row in rows if row["device"] == devices[-1]], kind.lower(), folder):
                print(path)
    for path in step(on(timed, "GPU") or on(timed, "CPU"), folder):
        print(path)
    compared = [row for row in everything if row["op"] == "peers"]
    for path in peers([row for row in compared if row["device"] == compared[-1]["device"]], folder):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
