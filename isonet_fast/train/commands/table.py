"""`isonet-fast table N`: make a table of the paper, or go on with it."""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml

from .. import distributed
from ..interrupts import Interrupted
from ..tables import detection, plan
from ..tables.making import Making
from . import launch


def run(args: argparse.Namespace) -> None:
    if args.number == 6:
        _run_detection(args)
        return
    table = plan.table(args.number, args.scale)
    rows, seeds = plan.only(args.only, table.rows, table.number), table.seeds if args.seeds is None else args.seeds
    _check_seeds(seeds)
    settings = [*launch.data(args), *args.set]
    if args.dry_run:
        _show(table, rows, settings)
        return
    _expect_matplotlib()
    folder = args.output or Path("runs") / f"table{table.number}-{table.scale}"
    with distributed.processes() as processes:
        try:
            Making(table, folder, seeds, settings, processes).complete(rows)
        except Interrupted:
            processes.say("the same command goes on with the table")
            raise
        processes.say(f"table {table.number}: {folder / f'table{table.number}.md'}, .csv and .png")


def _run_detection(args: argparse.Namespace) -> None:
    seeds, settings = 1 if args.seeds is None else args.seeds, [*launch.data(args), *args.set]
    _check_seeds(seeds)
    rows = detection.rows(args.scale, args.only)
    if args.dry_run:
        for row in rows:
            print(f"# table 6: {row.name}")
            print(yaml.safe_dump(row.config(0, None, settings).as_dict(), sort_keys=False, default_flow_style=None))
        return
    _expect_matplotlib()
    folder = args.output or Path("runs") / f"table6-{args.scale}"
    with distributed.processes() as processes:
        try:
            detection.complete(args.scale, args.only, seeds, settings, folder, processes)
        except Interrupted:
            processes.say("the same command goes on with the table")
            raise
        processes.say(f"table 6: {folder / 'table6.md'}, .csv and .png")


def _check_seeds(seeds: int) -> None:
    if seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {seeds}")


def _expect_matplotlib() -> None:
    try:  # what can fail fails before the training, not after
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("a table is drawn with matplotlib: pip install 'isonet_fast[demo]'") from error


def _show(table: plan.Table, rows: tuple[plan.TableRow, ...], settings: list[str]) -> None:
    """The configuration of each row, at each of its learning rates."""
    for row in rows:
        for lr in table.rates:
            published = "" if row.published is None else f" (published: {row.published:.2f} %)"
            print(f"# table {table.number}: {row.name}{published}")
            print(yaml.safe_dump(row.config(0, lr, settings).as_dict(), sort_keys=False, default_flow_style=None))
