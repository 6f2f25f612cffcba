"""The tables of the documentation, made from the rows: `python -m benchmarks.table` writes them, `--check` compares.

A table stands between `<!-- benchmark:NAME -->` and `<!-- /benchmark -->`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import ROOT
from .bench_interval import PROVIDERS
from .breakdown import PROFILER
from .rows import Row, group, ms, read
from .targets import SHOWN, cases, evaluate, on

PAGES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "training.md")
MARKED = re.compile(r"(<!-- benchmark:([a-z-]+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; numbers to the right, the first column to the left."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def targets_table(rows: list[Row]) -> str:
    """Every target, reached or not; what no GPU has measured says so."""
    body = []
    for target, outcome in evaluate(rows):
        measured = "not measured" if outcome is None else outcome.measured
        verdict = "" if outcome is None else "reached" if outcome.reached else "**not reached**"
        body.append([f"{target.device}: {target.what}", target.target, measured, verdict])
    return markdown(["", "target", "measured", ""], body)


def results_table(rows: list[Row]) -> str:
    """The README's four rows, of the device that timed a training step last: a GPU where one has."""
    devices = [row["device"] for row in on(rows, "GPU") or on(rows, "CPU") if row["op"] == "step"]
    own = [row for row in rows if devices and row["device"] == devices[-1]]
    modes = ("loss+gradient graph", "loss+gradient")
    shown = [("a training step", c) for c in cases(own, op="step")[:1]]
    for network in ("isonet18", "risonet50"):
        found = [c for mode in modes for c in cases(own, op="orthogonality", mode=mode, case=network)]
        shown += [("penalty and its gradient", c) for c in found[:1]]
    shown += [("SReLU, forward and backward", c) for c in cases(own, op="srelu", mode="forward+backward")[-1:]]
    body = []
    for what, workload in shown:
        if side := group(own, ("official", "isonet_fast"), **workload):
            official, ours = ms(side["official"]), ms(side["isonet_fast"])
            name = f"{what}: {workload['case']} {workload['dtype']}"
            body.append([name, f"{official:.4g}", f"{ours:.4g}", f"{official / ours:.2g}x"])
    device = devices[-1].removeprefix("cpu: ") if devices else "(not measured)"
    return markdown([f"ms on {device}", "official arithmetic", "isonet_fast", "faster"], body)


def step_table(rows: list[Row]) -> str:
    """Whole training steps: milliseconds, images per second, peak memory."""
    providers = ("official", "compile", "isonet_fast", "bare", "resnet")
    body = []
    for workload in cases(rows, op="step"):
        side = group(rows, ("official", "isonet_fast"), **workload)
        if not side:
            continue
        side = {**group(rows, ("compile",), **workload), **side}
        batch = int(workload["case"].split()[2])
        times = [f"{ms(side[p]):.4g}" if p in side else "" for p in providers]
        ours, official = side["isonet_fast"], side["official"]
        memory = f"{int(ours['peak_bytes']) / 2**20:,.0f} / {int(official['peak_bytes']) / 2**20:,.0f}"
        rate = f"{1e3 * batch / ms(ours):,.0f} / {1e3 * batch / ms(official):,.0f}"
        body.append([f"{workload['case']}, {workload['dtype']}", *times, rate, memory])
    head = ["step, ms", "official", "compiled", "ours", "bare", "ResNet, BatchNorm"]
    return markdown([*head, "images/s, ours / official", "peak MiB, ours / official"], body)


def lines_table(rows: list[Row]) -> str:
    """The work in our step that the bare step does not have, on a CPU; see breakdown.py."""
    case, body = "step", []
    for workload in cases(rows, op="step, lines")[-1:]:
        lines = group(rows, **workload)
        before = [row for row in rows if row["utc"] <= lines[PROFILER]["utc"]]  # the same run compared the steps first
        side = group(before, ("official", "isonet_fast", "bare"), **{**workload, "op": "step"})
        official, ours = (ms(side[p]) - ms(side["bare"]) for p in ("official", "isonet_fast"))
        times = {line: ms(row) for line, row in lines.items()}
        added = {PROFILER: times.pop(PROFILER)}
        kernels = sum(time for line, time in times.items() if line.endswith("kernel"))
        rest = ours - sum(times.values())
        times["the rest: ours - bare, measured without the profiler, minus these lines"] = rest
        times |= {"**ours - bare**": ours, "official - bare": official, "the kernels alone": kernels, **added}
        body = [[line, f"{time:.2f}", f"{time / official:.0%}"] for line, time in times.items()]
        case = workload["case"]
    return markdown([case, "ms", "share of official - bare"], body)


def penalty_table(rows: list[Row]) -> str:
    """Penalty and gradient of whole networks; on a GPU replayed as a CUDA graph."""
    body = []
    shown = [c for c in cases(rows, op="orthogonality") if c["mode"] in ("loss+gradient graph", "loss+gradient")]
    for network in SHOWN:
        for workload in (c for c in shown if c["case"] == network):
            side = group(rows, ("official", "isonet_fast", "matmul"), **workload)
            if not side:
                continue
            side = {**group(rows, ("compile",), **workload), **side}
            ours, official = side["isonet_fast"], side["official"]
            times = [
                f"{ms(side[p]):.4g}" if p in side else "" for p in ("official", "compile", "isonet_fast", "matmul")
            ]
            share = f"{float(ours['fraction_of_limit']):.0%}"
            graph = "graph" if workload["mode"].endswith("graph") else ""
            name = ", ".join(filter(None, (network, workload["layout"], graph)))
            body.append([name, *times, f"{ms(official) / ms(ours):.3g}x", share])
    head = ["penalty + gradient, ms", "official", "compiled", "ours", "one product of these FLOPs"]
    return markdown([*head, "official / ours", "share of the matrix rate"], body)


def host_table(rows: list[Row]) -> str:
    """The host's time of the penalty's calls; see bench_host.py."""
    modes = ("accumulate_grad_", "accumulate_grad_ moved", "loss", "gradient")
    body = []
    for name in dict.fromkeys(workload["case"] for workload in cases(rows, op="orthogonality_host")):
        sides = [group(rows, ("isonet_fast",), op="orthogonality_host", mode=mode, case=name) for mode in modes]
        body.append([name, *(f"{1e3 * ms(side['isonet_fast']):.0f}" if side else "" for side in sides)])
    head = ["until the call returns, us", "`accumulate_grad_()`", "the same, gradients elsewhere"]
    return markdown([*head, "`reg()`", "its backward"], body)


def small_table(rows: list[Row]) -> str:
    """The two forms of the compiled kernel; those with the fewest multiplications to save come first."""
    forms, modes = ("overlap", "frequency"), ("one thread", "all threads")
    body = []
    for name in dict.fromkeys(workload["case"] for workload in cases(rows, op="orthogonality_small")):
        sides = [group(rows, forms, op="orthogonality_small", mode=mode, case=name) for mode in modes]
        if not all(sides):
            continue
        work = [float(sides[0][form]["tflops"]) * ms(sides[0][form]) for form in forms]
        times = [f"{ms(side[form]):.3g}" for side in sides for form in forms]
        gains = [f"{ms(side['overlap']) / ms(side['frequency']):.2f}x" for side in sides]
        body.append([name, f"{work[0] / work[1]:.2f}", *times, ", ".join(gains)])
    body.sort(key=lambda line: float(line[1]))
    heads = [f"{form}, {mode}" for mode in modes for form in ("offsets", "frequencies")]
    return markdown(["ten layers, ms", "products", *heads, "offsets / frequencies"], body)


def interval_table(rows: list[Row]) -> str:
    """A training step by the interval of its penalty; see bench_interval.py."""
    sides = [(c["case"], group(rows, PROVIDERS, **c)) for c in cases(rows, op="interval")]
    body = [[case, *(f"{ms(side[p]):.4g}" for p in PROVIDERS)] for case, side in sides if side]
    return markdown(["ms per step, with the penalty in", *PROVIDERS], body)


def srelu_table(rows: list[Row]) -> str:
    """SReLU and join, forward and backward, at the shapes of ISONet-50 and R-ISONet-50."""
    body = []
    for workload in cases(rows, mode="forward+backward"):
        side = group(rows, ("official", "isonet_fast", "copy"), **workload)
        if "srelu" not in workload["op"] or not side:
            continue
        side = {**group(rows, ("compile",), **workload), **side}
        ours = side["isonet_fast"]
        times = [f"{ms(side[p]):.4g}" if p in side else "" for p in ("official", "compile", "isonet_fast", "copy")]
        name = f"{workload['op']} {workload['case']} {workload['dtype']} {workload['layout']}"
        body.append(
            [name, *times, f"{ms(side['official']) / ms(ours):.3g}x", f"{float(ours['fraction_of_limit']):.0%}"]
        )
    head = ["forward + backward, ms", "official", "compiled", "ours", "copy of as many bytes"]
    return markdown([*head, "official / ours", "share of the copy bandwidth"], body)


def peers_table(rows: list[Row]) -> str:
    """Ways of keeping a convolution orthogonal: what each adds to a step, and the singular values that it reaches."""
    workloads = cases(rows, op="peers", mode="step")
    steps = [group(rows, ("none", "isonet_fast"), **workload) for workload in workloads]
    names = [workload["case"].partition(",")[0] for workload in workloads]
    body = []
    for provider in dict.fromkeys(name for side in steps for name in side if name != "none"):
        added = [f"{ms(side[provider]) - ms(side['none']):.3g}" if provider in side else "" for side in steps]
        spans = []
        for workload in workloads:
            ends = [group(rows, (provider,), **{**workload, "mode": mode}) for mode in ("smallest", "largest")]
            low, high = (float(end[provider]["error"]) if end else 0.0 for end in ends)
            spans.append(f"{1 - low:.3f} to {1 + high:.3f}" if all(ends) else "")
        body.append([provider, *added, *spans])
    head = ["", *(f"ms added, {name}" for name in names), *(f"singular values, {name}" for name in names)]
    return markdown(head, body)


TABLES: dict[str, Callable[[list[Row]], str]] = {
    "results": results_table,
    "targets": targets_table,
    "step": step_table,
    "lines": lines_table,
    "penalty": penalty_table,
    "host": host_table,
    "small": small_table,
    "interval": interval_table,
    "srelu": srelu_table,
    "peers": peers_table,
}


def by_device(make: Callable[[list[Row]], str], rows: list[Row]) -> str:
    """One table for each device that has rows, newest versions named; GPUs first."""
    parts = []
    for device in sorted({row["device"] for row in rows}, key=lambda name: (name.startswith("cpu:"), name)):
        own = [row for row in rows if row["device"] == device]
        table = make(own)
        if table.count("\n") > 2:
            last = own[-1]
            versions = ", ".join(filter(None, (f"torch {last['torch']}", last["driver"])))
            parts.append(f"{device.removeprefix('cpu: ')}, {versions}\n\n{table}")
    if not on(rows, "GPU") and not (parts and make in (lines_table, small_table, interval_table)):  # about the CPU
        parts.insert(0, f"No {'GPU' if parts else 'machine'} has measured this yet.\n")
    return "\n".join(parts)


def render(text: str, rows: list[Row]) -> str:
    """The text with every marked table made anew. Raises ValueError for an unknown name."""

    def table(match: re.Match) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise ValueError(f"<!-- benchmark:{name} -->: the tables are {', '.join(TABLES)}")
        make = TABLES[name]
        made = make(rows) if name in ("targets", "results") else by_device(make, rows)
        return f"{opening}{made}{closing}"

    return MARKED.sub(table, text)


def main(arguments: Sequence[str] | None = None, pages: Sequence[Path] = PAGES) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--check", action="store_true", help="fail where a table differs from its rows")
    check = options.parse_args(arguments).check
    measured, different = read(), []
    for page in pages:
        text = page.read_text()
        made = render(text, measured)
        if made != text:
            different.append(page.name)
            if not check:
                page.write_text(made)
    if check and different:
        print(
            f"{', '.join(different)}: tables differ from benchmarks/results: python -m benchmarks.table",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
