"""The command line: isonet-fast demo | info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__, environment
from . import demo
from .divergence import Diverged


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="isonet-fast", description="Isometric networks at full GPU speed.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser("demo", help="train a 32-layer network on handwritten digits, about a minute")
    add.add_argument("--epochs", type=int, default=20)
    add.add_argument("--lr", type=float, default=demo.LR, help="learning rate (default %(default)s)")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--output", type=Path, default=Path("runs/demo"), metavar="DIR")
    add.set_defaults(run=lambda args: demo.run(args.epochs, args.output, args.seed, args.lr))
    add = commands.add_parser("info", help="which implementation serves each op on this machine, and why")
    add.set_defaults(run=lambda args: environment.info())
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("isonet-fast: interrupted", file=sys.stderr)
        return 130
    except (Diverged, ModuleNotFoundError, OSError, ValueError) as error:
        print(f"isonet-fast: {error}", file=sys.stderr)
        return 1
    return 0
