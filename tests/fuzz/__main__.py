"""`make fuzz`: random trials until the time is over; a failure is printed as three lines that show it, and ends with 1.

python -m tests.fuzz --seconds 1800 --workers 2     half an hour on two cores
python -m tests.fuzz --calls 20000 --seed 7         the trials of an earlier run
python -m tests.fuzz --seed 7 --first 123 --calls 1 one of them
python -m tests.fuzz --only srelu                   one kind of them
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence

from .trials import TRIALS
from .watch import Watch, work


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, help="stop then (60, if there are no --calls)")
    parser.add_argument("--calls", type=int, default=0, help="stop after so many trials")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="of the first trial")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--only", nargs="+", default=[], choices=list(TRIALS), metavar="KIND", help=", ".join(TRIALS))
    args = parser.parse_args(arguments)
    if args.seconds is None:
        args.seconds = float("inf") if args.calls else 60.0
    print(f"seed {args.seed}", flush=True)
    return Watch(args, work).run()


if __name__ == "__main__":
    sys.exit(main())
