"""The performance targets, each evaluated from the rows: what was measured, and whether the target is reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from .rows import Row, group, ms

LARGE = 256 << 20
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
NETWORKS = ("isonet18", "isonet34", "isonet50", "isonet101")
SHOWN = ("cifar32", *NETWORKS, "risonet50", "kernel5")
WHOLE = {"op": "orthogonality", "mode": "loss+gradient graph", "layout": "channels_last"}  # as a GPU trains


class Outcome(NamedTuple):
    measured: str
    reached: bool


class Target(NamedTuple):
    device: str  # "GPU" or "CPU"
    what: str
    target: str
    evaluate: Callable[[list[Row]], Outcome | None]  # None: not measured


def on(rows: Iterable[Row], device: str) -> list[Row]:
    """The rows of GPUs or of CPUs."""
    return [row for row in rows if row["device"].startswith("cpu:") == (device == "CPU")]


def evaluate(rows: list[Row]) -> list[tuple[Target, Outcome | None]]:
    return [(target, target.evaluate(on(rows, target.device))) for target in TARGETS]


def cases(rows: Iterable[Row], **where: str) -> list[dict[str, str]]:
    """The distinct (op, mode, case, dtype, layout) among rows that match, in the order they came."""
    columns = ("op", "mode", "case", "dtype", "layout")
    matching = (row for row in rows if all(row[column] == value for column, value in where.items()))
    return list({tuple(row[c] for c in columns): {c: row[c] for c in columns} for row in matching}.values())


def ratios(rows: list[Row], over: str, under: str, where: Iterable[dict[str, str]]) -> dict[str, float]:
    """For each case the time of `over` divided by the time of `under`, both measured side by side."""
    found = {}
    for workload in where:
        if both := group(rows, (over, under), **workload):
            found[workload["case"]] = ms(both[over]) / ms(both[under])
    return found


def _spread(found: dict[str, float], limit: float, unit: str = "x", largest: bool = False) -> Outcome | None:
    """The worst of several values against a limit (at most `limit` if `largest`, else at least), and the best."""
    if not found:
        return None
    low, high = min(found.values()), max(found.values())
    worst = high if largest else low

    def text(value: float) -> str:
        return f"{value:.0%}" if unit == "%" else f"{value:.3g}{unit}"

    spread = text(low) if text(low) == text(high) else f"{text(low)} to {text(high)}"
    return Outcome(spread, worst <= limit if largest else worst >= limit)


def _penalty_floor(rows: list[Row]) -> Outcome | None:
    found = {}
    for network in NETWORKS:
        where = WHOLE | {"case": network}
        if side := group(rows, ("matmul", "copy", "isonet_fast"), **where):
            found[network] = ms(side["isonet_fast"]) / (ms(side["matmul"]) + ms(side["copy"]))
    return _spread(found, 1.5, largest=True)


def _penalty_speedup(over: str, limit: float) -> Callable[[list[Row]], Outcome | None]:
    def speedup(rows: list[Row]) -> Outcome | None:
        where = [c for c in cases(rows, **WHOLE) if c["case"] in NETWORKS]
        return _spread(ratios(rows, over, "isonet_fast", where), limit)

    return speedup


def _host(rows: list[Row]) -> Outcome | None:
    where = [{"op": "orthogonality_host", "mode": mode, "case": "isonet101*"} for mode in ("accumulate_grad_", "loss")]
    found = {w["mode"]: 1e3 * ms(side["isonet_fast"]) for w in where if (side := group(rows, ("isonet_fast",), **w))}
    return _spread(found, 300.0, " us", largest=True) if len(found) == len(where) else None


def nbytes(row: Row) -> int:
    """The bytes of one tensor of an elementwise case."""
    return math.prod(map(int, row["case"].split("x"))) * ITEM_BYTES[row["dtype"]]


def _elementwise(rows: list[Row], large: bool = True) -> list[Row]:
    rows = [row for row in rows if "srelu" in row["op"]]
    return [row for row in rows if nbytes(row) >= LARGE] if large else rows


def _bandwidth(rows: list[Row]) -> Outcome | None:
    found = {}
    for n, workload in enumerate(cases(_elementwise(rows))):
        side = group(rows, ("isonet_fast",), **workload)
        if side and workload["mode"] in ("forward", "backward") and side["isonet_fast"]["fraction_of_limit"]:
            found[str(n)] = float(side["isonet_fast"]["fraction_of_limit"])
    return _spread(found, 0.9, "%")


def _against_compile(rows: list[Row]) -> Outcome | None:
    where = cases(_elementwise(rows), mode="forward+backward")
    found = {str(n): r for n, c in enumerate(where) for r in ratios(rows, "compile", "isonet_fast", [c]).values()}
    return _spread(found, 1.2)


def _accuracy(rows: list[Row]) -> Outcome | None:
    where = {"op": "orthogonality_accuracy", "mode": "gradient", "provider": "isonet_fast"}
    sides = {c["case"]: group(rows, **where, case=c["case"]) for c in cases(rows, **where)}
    found = {case: float(side["isonet_fast"]["error"]) for case, side in sides.items() if case.startswith("512 ")}
    return _spread(found, 1e-2, unit="", largest=True)


def _steps(rows: list[Row]) -> list[dict[str, str]]:
    return [c for c in cases(rows, op="step") if c["case"].startswith(("isonet50 batch 256", "risonet50 batch 256"))]


def _bare(rows: list[Row]) -> Outcome | None:
    return _spread(ratios(rows, "isonet_fast", "bare", _steps(rows)), 1.15, largest=True)


def _faster(over: str) -> Callable[[list[Row]], Outcome | None]:
    def faster(rows: list[Row]) -> Outcome | None:
        return _spread(ratios(rows, over, "isonet_fast", _steps(rows)), 1.0)

    return faster


def _share(rows: list[Row]) -> Outcome | None:
    without = ratios(rows, "isonet_fast without penalty", "isonet_fast", _steps(rows))
    return _spread({case: max(0.0, 1 - r) for case, r in without.items()}, 0.02, "%", largest=True)


def _memory(rows: list[Row]) -> Outcome | None:
    found = {}
    for workload in _steps(rows):
        if side := group(rows, ("official", "isonet_fast"), **workload):
            found[workload["case"]] = int(side["isonet_fast"]["peak_bytes"]) / int(side["official"]["peak_bytes"])
    return _spread(found, 0.5, largest=True)


def _cpu_srelu(rows: list[Row]) -> Outcome | None:
    reached, speedups, shares = True, {}, {}
    for n, workload in enumerate(cases(_elementwise(rows, large=False), mode="forward+backward", op="srelu")):
        if side := group(rows, ("official", "isonet_fast", "copy"), **workload):
            speedups[str(n)] = ms(side["official"]) / ms(side["isonet_fast"])
            shares[str(n)] = ms(side["copy"]) / ms(side["isonet_fast"])
            reached &= speedups[str(n)] >= 2 or shares[str(n)] >= 0.95
    if not speedups:
        return None
    speed, share = _spread(speedups, 2), _spread(shares, 1, "%")
    assert speed is not None and share is not None
    return Outcome(f"{speed.measured}; {share.measured} of the copy bandwidth", reached)


def _cpu_penalty(rows: list[Row]) -> Outcome | None:
    texts, reached = [], True
    for network in SHOWN:
        wanted = 4.0 if network == "kernel5" else 2.0
        where = {"op": "orthogonality", "mode": "loss+gradient", "case": network}
        if side := group(rows, ("official", "isonet_fast", "matmul"), **where):
            speedup = ms(side["official"]) / ms(side["isonet_fast"])
            share = float(side["isonet_fast"]["fraction_of_limit"])
            reached &= speedup >= wanted
            reached &= int(side["isonet_fast"]["peak_bytes"]) <= int(side["official"]["peak_bytes"])
            texts.append(f"{network} {speedup:.2g}x, {share:.0%} of sgemm")
    return Outcome("; ".join(texts), reached) if texts else None


def _cpu_step(rows: list[Row]) -> Outcome | None:
    found = {}
    for workload in cases(rows, op="step"):
        side = group(rows, ("official", "isonet_fast", "bare"), **workload)
        if side and workload["case"].startswith("cifar"):
            official, ours, bare = (ms(side[p]) for p in ("official", "isonet_fast", "bare"))
            found[workload["case"]] = (official - ours) / (official - bare)
    return _spread(found, 0.8, "%")


TARGETS = (
    Target("GPU", "penalty + gradient, whole network, graph replay / its floor", "<= 1.5x", _penalty_floor),
    Target("GPU", "the official penalty / ours", ">= 50x", _penalty_speedup("official", 50.0)),
    Target("GPU", "torch.compile of it / ours", ">= 4x", _penalty_speedup("compile", 4.0)),
    Target("GPU", "penalty of 99 layers: time until a call returns", "<= 300 us", _host),
    Target("GPU", "error of the penalty's gradient near its optimum, 512 channels", "<= 0.01", _accuracy),
    Target("GPU", "SReLU and join, tensors >= 256 MB: share of the copy bandwidth", ">= 90 %", _bandwidth),
    Target("GPU", "torch.compile of them / ours, forward + backward", ">= 1.2x", _against_compile),
    Target("GPU", "step of ISONet-50 and R-ISONet-50, batch 256 / bare step", "<= 1.15x", _bare),
    Target("GPU", "official step / ours", "> 1x", _faster("official")),
    Target("GPU", "torch.compile of it / ours", "> 1x", _faster("compile")),
    Target("GPU", "torchvision ResNet-50 / ours", "> 1x", _faster("resnet")),
    Target("GPU", "torchvision ResNet-50, compiled / ours", "> 1x", _faster("resnet, compile")),
    Target("GPU", "penalty's share of our step", "< 2 %", _share),
    Target("GPU", "peak memory of our step / official", "<= 0.5x", _memory),
    Target("CPU", "official SReLU / ours, forward + backward", ">= 2x, or the copy bandwidth", _cpu_srelu),
    Target("CPU", "official penalty / ours, with gradient", ">= 2x, 5x5 kernels >= 4x; no more memory", _cpu_penalty),
    Target("CPU", "the call for 99 layers, its launches on a driver that does nothing", "<= 300 us", _host),
    Target("CPU", "isonet_cifar step: share of the official overhead removed", ">= 80 %", _cpu_step),
)
