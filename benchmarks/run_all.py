"""`make bench` and `make bench-gpu`: every part in its own process and its own time, then a short table.

A part that fails, crashes or overruns is reported, and the others still run; its rows up to then are kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import ROOT, rows, table
from .targets import evaluate

GRACE = 12.0  # seconds that a part may go on with what it began in time, before it is ended


class Part(NamedTuple):
    module: str
    seconds: float  # within LIMIT; a plain script knows no other limit
    options: tuple[str, ...] = ()
    plain: bool = False  # a script without the options that the others share


PARTS = {
    "cuda": (  # 380 s with every grace used up; what has a target comes first within each part
        Part("bench_srelu", 48),
        Part("bench_orthogonality", 70),
        Part("bench_step", 120),
        Part("accuracy", 40, plain=True),
        Part("bench_host", 18),
        Part("bench_scaling", 12),
    ),
    "cpu": (  # under ten minutes on two cores
        Part("bench_srelu", 110),
        Part("bench_orthogonality", 150),
        Part("bench_step", 110, ("--profile",)),
        Part("bench_host", 8),
        Part("bench_scaling", 100),
    ),
}
LIMIT = {"cuda": 380.0, "cpu": 540.0}


def scaled(parts: Sequence[Part], seconds: float) -> list[Part]:
    """The parts in another total; what plain scripts take and every grace stay as they are."""
    free = [part for part in parts if not part.plain]
    fixed = sum(part.seconds for part in parts if part.plain) + GRACE * len(parts)
    factor = max(0.0, seconds - fixed) / sum(part.seconds for part in free)
    return [part if part.plain else part._replace(seconds=part.seconds * factor) for part in parts]


def run(part: Part, options: Sequence[str], left: float) -> str:
    """Run one part; what became of it."""
    seconds = min(part.seconds, left - GRACE)
    if seconds < 5:
        return "not started: no time left"
    command = [sys.executable, "-m", f"{__package__}.{part.module}"]
    if not part.plain:
        command += [*options, *part.options, "--budget", f"{seconds:.0f}"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(seconds + GRACE)
    except subprocess.TimeoutExpired:
        return f"ended after {seconds + GRACE:.0f} s"
    finally:
        _end(process)
    return {0: "complete", 3: "complete, but a provider failed (see FAILED above)"}.get(
        status, f"failed, status {status}"
    )


def _end(process: subprocess.Popen) -> None:
    """End the part and the compilers that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def short_table(measured: list[rows.Row]) -> str:
    """The targets that this run's rows speak to."""
    lines = []
    for target, outcome in evaluate(measured):
        if outcome is not None:
            verdict = "reached" if outcome.reached else "NOT REACHED"
            lines.append(f"{target.device}  {target.what:<66} {target.target:<28} {outcome.measured:<36} {verdict}")
    return "\n".join(lines) or "no row has a target"


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--device", choices=tuple(PARTS), default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dry-run", action="store_true", help="every part on tiny shapes, on the CPU; no rows kept")
    options.add_argument("--seconds", type=float, help="in all; default: 380 on a GPU, 540 on a CPU")
    args = options.parse_args(arguments)
    device = args.device
    if device == "cuda" and not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU here")
    limit = args.seconds or LIMIT[device]
    shared = ["--dry-run"] if args.dry_run else ["--quick", "--device", device]
    started, start = rows.utc(), time.monotonic()
    outcomes = {}
    for part in scaled(PARTS[device], limit):
        if args.dry_run and part.plain:
            continue
        left = limit - (time.monotonic() - start)
        outcomes[part.module] = run(part, shared, left)
        print(f"--- {part.module}: {outcomes[part.module]}", file=sys.stderr, flush=True)
    measured = [row for row in rows.read() if row["utc"] >= started]
    if measured and (ROOT / "README.md").exists():
        table.main([])  # rows and the tables made from them change together
    print(f"\n{len(measured)} rows in {time.monotonic() - start:.0f} s, benchmarks/results/")
    for module, outcome in outcomes.items():
        print(f"  {module:<20} {outcome}")
    print(f"\n{short_table(measured)}")
    return 0 if all(outcome.startswith("complete") for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
