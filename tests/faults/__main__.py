"""`make faults`: inject every fault, say what was lost, exit with 1 if any lost more than is promised.

python -m tests.faults                    all of them, under five minutes on two cores
python -m tests.faults --only disk        those with "disk" in their name
python -m tests.faults --seed 7           the random points of an earlier run
python -m tests.faults --write            and put the table into docs/reliability.md
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from .faults import FAULTS, Fault, Impossible
from .lab import ROOT, Lab, Outcome

DOCUMENT = ROOT / "docs" / "reliability.md"
MARKED = re.compile(r"(<!-- faults -->\n).*?(<!-- /faults -->)", re.DOTALL)
HEAD = ["fault", "injected", "may be lost", "was lost", "reported"]


def inject(fault: Fault, lab: Lab, times: int) -> list[str]:
    """The fault's row of the table."""
    outcomes = [fault.inject(lab) for _ in range(times)]
    injected = sum(outcome.times for outcome in outcomes)
    return [fault.name, str(injected), fault.promise, lost(outcomes), said(outcomes[-1], lab)]


def lost(outcomes: Sequence[Outcome]) -> str:
    steps = [outcome.lost for outcome in outcomes if outcome.lost is not None]
    if not steps:
        return "nothing"
    most = max(steps)
    return "nothing" if not most else f"at most {most} step{'s' if most > 1 else ''}"


def said(outcome: Outcome, lab: Lab) -> str:
    """What was printed, without the scratch paths."""
    text = re.sub(rf"{re.escape(str(lab.scratch))}/[a-z]+-\d+(/run\b)?", "RUN", outcome.reported)
    return f"`{text.removeprefix('isonet-fast: ')}`".replace("|", "\\|")


def table(rows: Sequence[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [HEAD, ["---", "---:", *["---"] * 3], *rows])


def write(text: str) -> None:
    document, found = MARKED.subn(lambda match: f"{match[1]}{text}{match[2]}", DOCUMENT.read_text())
    if found != 1:
        raise ValueError(f"{DOCUMENT} must hold one pair of faults markers, found {found}")
    DOCUMENT.write_text(document)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="WORD", help="the faults with this word in their name")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the random points")
    parser.add_argument("--write", action="store_true", help="put the table into docs/reliability.md")
    args = parser.parse_args(arguments)
    chosen = [fault for fault in FAULTS if args.only in f"{fault.name} {fault.inject.__name__}"]
    if args.write and len(chosen) < len(FAULTS):
        parser.error("--write needs every fault, leave --only out")
    print(f"seed {args.seed}", flush=True)
    start, rows, broken = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="faults-") as scratch, Lab(Path(scratch), args.seed) as lab:
        for fault in chosen:
            try:
                row = inject(fault, lab, fault.full)
            except Impossible as reason:
                row = [fault.name, "0", fault.promise, "not tried", str(reason)]
            except Exception:  # Broken, or whatever a check stumbled over
                broken += 1
                row = [fault.name, "", fault.promise, "**more than promised**", ""]
                traceback.print_exc()
            rows.append(row)
            print(f"{time.monotonic() - start:4.0f} s  {row[0]}: {row[1]} injected, lost: {row[3]}", flush=True)
    made = table(rows)
    print(f"\n{made}")
    if args.write:
        write(f"{stamp(args.seed)}\n\n{made}")
    return 1 if broken else 0


def stamp(seed: int) -> str:
    machine = f"{platform.system()}, {os.cpu_count()} cores, torch {torch.__version__}"
    return f"{datetime.date.today().isoformat()}, {machine}, seed {seed}:"


if __name__ == "__main__":
    sys.exit(main())
