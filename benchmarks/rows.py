"""The rows behind every number: their columns, the machine and versions they name, writing and reading them."""

from __future__ import annotations

import csv
import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from . import ROOT

COLUMNS = (
    *("op", "provider", "mode", "case", "dtype", "layout", "device", "p50_ms", "p20_ms", "p80_ms"),
    *("peak_bytes", "gbytes_per_s", "tflops", "fraction_of_limit", "error"),
    *("torch", "triton", "driver", "commit", "utc"),
)
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]


def utc() -> str:
    """When a group was measured, to the microsecond: rows that share it were measured side by side."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@functools.cache
def machine(device_type: str) -> Row:
    """The columns that say where and with what."""
    return {
        "device": torch.cuda.get_device_name() if device_type == "cuda" else f"cpu: {_cpu()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "driver": _driver() if device_type == "cuda" else "",
        "commit": commit(),
    }


def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as info:
            name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux: the platform module's name will do
    return f"{name} ({torch.get_num_threads()} threads)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return f"{(_output(query).splitlines() or ['?'])[0]}, CUDA {torch.version.cuda}"


def commit() -> str:
    """The tree's commit, with + where source files differ from it; ISONET_FAST_COMMIT names it where git can't."""
    if named := os.environ.get("ISONET_FAST_COMMIT"):
        return named
    head = _output(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--", "*.py", "csrc"])
    return head + ("+" if head and changed.strip() else "")


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows, with a header where the file is new; on the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path | None = None) -> list[Row]:
    """Every row in a folder (RESULTS), oldest first. Raises ValueError for a file with other columns."""
    rows: list[Row] = []
    for path in sorted((folder or RESULTS).glob("*.csv")):
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"{path} must have the columns {','.join(COLUMNS)}, has {reader.fieldnames}")
            rows.extend(reader)
    return sorted(rows, key=lambda row: row["utc"])


def group(rows: list[Row], providers: Iterable[str] = (), **where: str) -> dict[str, Row]:
    """The latest rows measured side by side, by provider, that match `where` and hold all of `providers`; or {}.

    A value of `where` that ends in * matches a prefix.
    """
    wanted = set(providers)
    matching = [row for row in rows if all(_matches(row[column], value) for column, value in where.items())]
    for stamp in sorted({row["utc"] for row in matching}, reverse=True):
        found = {row["provider"]: row for row in matching if row["utc"] == stamp}
        if wanted <= found.keys():
            return found
    return {}


def _matches(value: str, pattern: str) -> bool:
    return value.startswith(pattern[:-1]) if pattern.endswith("*") else value == pattern


def ms(row: Row) -> float:
    return float(row["p50_ms"])
