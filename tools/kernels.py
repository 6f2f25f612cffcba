"""`make kernels`: compile every kernel without a GPU, print what the compilers made of it, fail where a gate fails.

Writes build/kernels.json: a list of {kernel, arch, registers, shared, spills, loads_128, stores_128, tensor_core,
async_loads}. CUDA kernels from lower_cuda.py, Triton kernels from lower_triton.py; what their launches should take from
schedule.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLUMNS = ("kernel", "arch", "registers", "shared", "spills", "loads_128", "stores_128", "tensor_core", "async_loads")


def main() -> int:
    sys.path[:0] = [str(pathlib.Path(__file__).parent), str(ROOT)]
    table: list[dict] = []
    failures: list[str] = []
    for name in ("lower_cuda", "lower_triton"):
        if importlib.util.find_spec(name) is not None:
            more, failed = importlib.import_module(name).rows()
            table += more
            failures += failed
    target = ROOT / "build" / "kernels.json"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_suffix(".json.partial")
    partial.write_text(json.dumps(table, indent=1))
    os.replace(partial, target)
    show(table)
    print(f"\n{len(table)} kernels, written to {target.relative_to(ROOT)}\n")
    if importlib.util.find_spec("triton") is not None:
        schedule = importlib.import_module("schedule")
        schedule.report(schedule.NETWORKS, schedule.Machine())
    for failure in failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    return 1 if failures else 0


def show(table: list[dict]) -> None:
    lines = [COLUMNS, *(tuple(str(row[column]) for column in COLUMNS) for row in table)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    for line in lines:
        print(
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
            )
        )


if __name__ == "__main__":
    sys.exit(main())
