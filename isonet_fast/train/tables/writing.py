"""A table's files: tableN.csv, tableN.md made of its lines, and tableN.png."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..saving.files import disk_errors_naming, replacing
from .plan import Table, TableRow
from .running import Result

COLUMNS = (
    "row", "published", "top1", "deviation", "seeds", "diverged", "learning_rate", "largest_stable", "by_learning_rate",
    "smallest_singular_value", "largest_singular_value", "gradient_before", "gradient_after", "seconds", "commit",
)  # fmt: skip


def line(
    table: Table, row: TableRow, first: dict[float | None, Result], lr: float, seeds: Sequence[Result]
) -> dict[str, str]:
    """A line of the CSV file. first: the first seed's results by learning rate; seeds: all seeds' at the best, `lr`."""
    values = dict.fromkeys(COLUMNS, "")
    values |= {"row": row.name, "published": "" if row.published is None else f"{row.published:.2f}"}
    if not first:
        return values
    trained = [result.top1 for result in seeds if result.top1 is not None]
    steps = [result.diverged for result in seeds if result.diverged is not None]
    if trained:
        values["top1"] = f"{statistics.mean(trained):.1f}"
        values["deviation"] = f"{statistics.stdev(trained):.1f}" if len(trained) > 1 else ""
    spread = seeds[0]
    return values | {
        "seeds": str(len(seeds)),
        "diverged": ", ".join(f"at step {step}" for step in steps),
        "learning_rate": f"{lr:g}",
        "largest_stable": _largest_stable(first),
        "by_learning_rate": "; ".join(f"{rate:g}: {_outcome(r)}" for rate, r in first.items() if rate is not None),
        "smallest_singular_value": f"{spread.smallest:.3f}",
        "largest_singular_value": f"{spread.largest:.3f}",
        "gradient_before": f"{spread.gradient_before:.2g}",
        "gradient_after": f"{spread.gradient:.2g}",
        "seconds": f"{sum(result.seconds for result in {id(r): r for r in [*first.values(), *seeds]}.values()):.0f}",
        "commit": ", ".join(sorted({result.commit for result in [*first.values(), *seeds]})),
    }


def _outcome(result: Result) -> str:
    return f"diverged at step {result.diverged}" if result.top1 is None else f"{result.top1:.1f}"


def _largest_stable(first: dict[float | None, Result]) -> str:
    """The largest learning rate whose accuracy is within ten points of the row's best; nothing where even the best is
    below three times what guessing gives."""
    reached = {lr: result.top1 for lr, result in first.items() if lr is not None and result.top1 is not None}
    if not reached or max(reached.values()) < 300 / next(iter(first.values())).classes:
        return ""
    return f"{max(lr for lr, top1 in reached.items() if top1 >= max(reached.values()) - 10):g}"


def files(table: Table, lines: list[dict[str, str]], folder: Path) -> None:
    csv_path, md_path = (folder / f"table{table.number}.{kind}" for kind in ("csv", "md"))
    with replacing(csv_path) as temporary, disk_errors_naming(csv_path):
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(lines)
    with replacing(md_path) as temporary, disk_errors_naming(md_path):
        temporary.write_text(markdown(table, lines), encoding="utf-8")


def markdown(table: Table, lines: list[dict[str, str]]) -> str:
    """The CSV file's lines as a table for readers."""
    heads = ("", "published", "top-1 (%)", "learning rate", "largest stable", "singular values", "gradient", "seconds")
    text = [f"# Table {table.number}, {table.scale}: {table.title}", "", _row(heads), _row(["---"] * len(heads))]
    for values in lines:
        spread = f"{values['smallest_singular_value']} to {values['largest_singular_value']}"
        gradient = f"{values['gradient_before']}, {values['gradient_after']}"
        cells = [values["row"], values["published"], _top1(values), values["learning_rate"], values["largest_stable"]]
        text.append(_row([*cells, *([spread, gradient] if values["seeds"] else ["", ""]), values["seconds"]]))
    if table.learning_rates:
        text += ["", "Top-1 of the first seed by learning rate:", ""]
        text += [f"- {values['row']}: {values['by_learning_rate']}" for values in lines]
    return "\n".join(text) + "\n"


def _top1(values: dict[str, str]) -> str:
    parts = [values["top1"] + (f" ± {values['deviation']}" if values["deviation"] else "")] * bool(values["top1"])
    return "; ".join(parts + [f"diverged {values['diverged']}"] * bool(values["diverged"]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def picture(table: Table, lines: list[dict[str, str]], folder: Path) -> None:
    """Accuracy, the range of the singular values, and the gradient's ratio before and after training, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    done = [values for values in lines if values["seeds"]]
    figure, axes = plt.subplots(
        1, 3, figsize=(12, 1.6 + 0.35 * len(done)), width_ratios=(2, 1, 1), sharey=True, layout="constrained"
    )
    for n, values in enumerate(done):
        axes[0].barh(n, float(values["top1"] or 0), xerr=float(values["deviation"] or 0), color="#4c72b0")
        end = float(values["top1"] or 0) + float(values["deviation"] or 0)
        axes[0].text(max(end, float(values["published"] or 0)) + 2, n, _top1(values), va="center", fontsize=8)
        if values["published"]:
            axes[0].plot(float(values["published"]), n, "D", color="#c44e52")
        ends = [max(1e-4, float(values[f"{end}_singular_value"])) for end in ("smallest", "largest")]
        axes[1].plot(ends, [n, n], "|-", color="#4c72b0")
        for moment, mark in (("before", "o"), ("after", "x")):
            axes[2].plot(float(values[f"gradient_{moment}"]), n, mark, color="#4c72b0", label=moment if not n else None)
    axes[0].set(title="top-1 (%); diamond: published", xlim=(0, 125), xticks=range(0, 101, 20))
    axes[0].set_yticks(range(len(done)), [values["row"] for values in done])
    axes[0].invert_yaxis()
    axes[1].set(title="singular values", xscale="log")
    axes[2].set(title="gradient, first / last layer", xscale="log")
    axes[2].legend(fontsize=8)
    for axis in axes[1:]:
        axis.axvline(1.0, color="#8c8c8c", linewidth=0.8)
        axis.minorticks_off()
    figure.suptitle(f"Table {table.number}, {table.scale}: {table.title}")
    path = folder / f"table{table.number}.png"
    with replacing(path) as temporary, disk_errors_naming(path):
        figure.savefig(temporary, dpi=110)
    plt.close(figure)
