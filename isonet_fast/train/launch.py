"""`isonet-fast train`: from the command line's words to a run, new or resumed."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from . import checkpoint, config
from .config import Config
from .loop import Run


def settings(args: argparse.Namespace) -> list[str]:
    """Flags are short for settings; `--set` is applied last."""
    flags = [f"{key}=true" for key in ("channels_last", "compile") if getattr(args, key, False)]
    if getattr(args, "precision", None):
        flags.append(f"precision={args.precision}")
    if args.strict:
        flags.append("data.strict=true")
    return [*flags, *args.set]


def run(args: argparse.Namespace) -> None:
    if args.resume is not None:
        _resume(args)
        return
    if args.config is None:
        raise ValueError(f"say what to train with --config: {', '.join(config.presets())}, or a YAML file")
    settled = config.load(args.config, [*_data(args), *settings(args)])
    directory = args.output or Path("runs") / Path(args.config).stem
    if (directory / "latest.pt").exists() or (directory / "previous.pt").exists():
        raise ValueError(
            f"{directory} holds a run already: go on with --resume {directory}, or choose another --output"
        )
    _fit(settled, directory, None)


def _resume(args: argparse.Namespace) -> None:
    """The configuration is the checkpoint's; what is given now on the command line goes over it."""
    if args.output is not None:
        raise ValueError("--resume goes on in its own directory; leave --output out")
    state, path = checkpoint.load_latest(args.resume)
    settled = config.load(args.config, [*_data(args), *settings(args)], state["config"])
    position = state["position"]
    if position["epoch"] > settled.schedule.epochs:
        print(f"{path} is at the end of its {settled.schedule.epochs} epochs; raise schedule.epochs to go on")
        return
    print(f"resuming from {path}: epoch {position['epoch']}, {position['batch']} batches of it done", flush=True)
    _fit(settled, args.resume, state)


def _fit(settled: Config, directory: Path, state: dict[str, Any] | None) -> None:
    row = Run(settled, directory, state).fit()
    print(f"done: validation top-1 {row['val_top1']:.2f} %; checkpoints and metrics.csv in {directory}")


def _data(args: argparse.Namespace) -> list[str]:
    return [] if args.data is None else [f"data.source={args.data}"]
