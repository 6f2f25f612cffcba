"""The command line: isonet-fast demo | train | table | evaluate | report | export | info."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ... import environment
from ..._version import __version__
from .. import config, distributed
from ..data.loader import WorkerDied
from ..detection.config import DetectionConfig
from ..divergence import Diverged
from ..interrupts import Interrupted
from ..paths import user_path
from ..tables.plan import SCALES
from ..terminal import lasting_output, printable
from . import demo, detect, evaluate, launch, table


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="isonet-fast", description="Train, evaluate and inspect isometric networks: ISONet, R-ISONet."
    )
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)
    add = commands.add_parser("demo", help="train a 32-layer network on handwritten digits, about a minute")
    add.add_argument("--epochs", type=int, default=20)
    add.add_argument("--lr", type=float, help="learning rate (default 0.005)")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--output", type=_path, default=Path("runs/demo"), metavar="DIR")
    add.set_defaults(run=lambda args: demo.run(args.epochs, args.output, args.seed, args.lr))
    _add_train(commands)
    _add_detect(commands)
    _add_table(commands)
    _add_evaluate(commands)
    add = commands.add_parser("report", help="how isometric a checkpoint is: singular values of every convolution")
    add.add_argument("checkpoint", type=_path, help="a file, or the directory of a run (its best checkpoint)")
    add.add_argument("--size", type=int, default=224, help="of the input images (default %(default)s)")
    add.add_argument("--config", metavar="NAME", help="a preset or YAML file, where the checkpoint does not say enough")
    add.add_argument("--model", metavar="MODULE:FUNCTION", help="what builds the network, where it is one of your own")
    add.set_defaults(run=lambda args: evaluate.isometry(args.checkpoint, args.size, args.config, args.model))
    add = commands.add_parser("export", help="only the weights of a checkpoint, or its network as a graph")
    add.add_argument("checkpoint", type=_path, help="a file, or the directory of a run (its best checkpoint)")
    add.add_argument(
        "output", type=_path, metavar="OUT", help="weights: OUT.pt or OUT.safetensors; a graph: OUT.onnx or OUT.pt2"
    )
    add.add_argument("--size", type=int, help="of a graph's images (default: as configured)")
    add.add_argument("--config", metavar="NAME", help="a preset or YAML file, where the checkpoint does not say enough")
    add.set_defaults(run=lambda args: evaluate.export(args.checkpoint, args.output, args.config, args.size))
    add = commands.add_parser("info", help="which implementation serves each op on this machine, and why")
    add.set_defaults(run=lambda args: environment.info())
    return top


def _add_train(commands: Any) -> None:
    add = commands.add_parser("train", help="train a network of the paper, or your own configuration")
    add.add_argument("--config", metavar="NAME", help=f"a preset ({', '.join(config.presets())}) or a YAML file")
    add.add_argument("--output", type=_path, metavar="DIR", help="where the run is kept (default runs/NAME)")
    add.add_argument("--resume", type=_path, metavar="DIR", help="go on with the run in DIR, from its last checkpoint")
    _add_common(add)
    add.add_argument("--precision", choices=config.PRECISIONS, help="of autocast (default float32: no autocast)")
    add.add_argument("--channels-last", action="store_true", help="store images and weights as torch.channels_last")
    add.add_argument("--compile", action="store_true", help="train through torch.compile")
    add.add_argument("--accumulate", type=int, metavar="K", help="batches per optimizer step (default 1)")
    add.add_argument("--fsdp", action="store_true", help="under torchrun: shard the weights over the GPUs")
    add.set_defaults(run=lambda args: launch.run(args, launch.CLASSIFIER))


def _add_detect(commands: Any) -> None:
    add = commands.add_parser("detect", help="train Mask R-CNN on COCO and evaluate it")
    names = ", ".join(config.presets(DetectionConfig))
    add.add_argument("--config", metavar="NAME", help=f"a preset ({names}) or a YAML file")
    add.add_argument("--output", type=_path, metavar="DIR", help="where the run is kept (default runs/NAME)")
    add.add_argument("--resume", type=_path, metavar="DIR", help="go on with the run in DIR, from its last checkpoint")
    add.add_argument("--data", metavar="coco:DIR", help="DIR/annotations/, DIR/train2017/, DIR/val2017/")
    _add_set(add)
    _add_strict(add)
    add.add_argument("--precision", choices=config.PRECISIONS, help="of autocast (default float32: no autocast)")
    add.add_argument("--accumulate", type=int, metavar="K", help="parts of a process's share of a batch (default 1)")
    add.set_defaults(run=detect.run)


def _add_table(commands: Any) -> None:
    add = commands.add_parser(
        "table", help="a table of the paper: train what is missing of its rows, write it, draw it"
    )
    add.add_argument("number", type=int, help="1 to 6")
    add.add_argument("--scale", choices=SCALES, default="small", help="of networks and data (default %(default)s)")
    add.add_argument("--seeds", type=int, metavar="N", help="seeds of each row (default: the scale's)")
    add.add_argument("--only", metavar="ROW", help="one row, by its name")
    add.add_argument("--output", type=_path, metavar="DIR", help="of runs and table (default runs/tableN-SCALE)")
    add.add_argument("--dry-run", action="store_true", help="print every row's configuration and train nothing")
    _add_data(add)
    add.set_defaults(run=table.run)


def _add_evaluate(commands: Any) -> None:
    add = commands.add_parser("evaluate", help="top-1 and top-5 of a checkpoint, of ours or of the official code")
    add.add_argument("checkpoint", type=_path, help="a file, or the directory of a run (its best checkpoint)")
    add.add_argument("--config", metavar="NAME", help="a preset or YAML file, where the checkpoint does not say enough")
    _add_common(add)
    add.set_defaults(run=lambda args: evaluate.run(args.checkpoint, args.data, launch.settings(args), args.config))


def _add_common(add: argparse.ArgumentParser) -> None:
    _add_data(add)
    _add_strict(add)


def _add_strict(add: argparse.ArgumentParser) -> None:
    add.add_argument("--strict", action="store_true", help="a corrupt image is an error, not skipped")


def _add_data(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--data",
        metavar="SOURCE",
        help="imagefolder:DIR, cifar10:DIR, cifar100:DIR, digits[:SIZE] or synthetic[:IMAGES]",
    )
    _add_set(add)


def _add_set(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any value, for example optimizer.lr=0.02"
    )


def _path(text: str) -> Path:
    if not text:  # Path() would be the current directory
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return user_path(text)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    with lasting_output():
        return _run(args)


def _run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code. An error is printed as one line."""
    rank = _rank() if args.command in ("train", "table") else 0
    who = f"isonet-fast, rank {rank}" if rank else "isonet-fast"
    try:
        args.run(args)
    except KeyboardInterrupt:
        print(f"{who}: interrupted", file=sys.stderr)
        return 130
    except Interrupted as stop:
        if not rank:  # every process stops
            print(f"{who}: {printable(str(stop))}", file=sys.stderr)
        return stop.code
    except (Diverged, ModuleNotFoundError, OSError, ValueError, WorkerDied) as error:
        if not (rank and isinstance(error, Diverged)):  # Diverged is raised on every rank: rank 0 reports it
            print(f"{who}: {printable(str(error))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        print(f"{who}: out of memory; try a smaller data.batch_size or data.image_size ({reason})", file=sys.stderr)
        return 1
    return 0


def _rank() -> int:
    try:
        return distributed.rank_and_size()[0]
    except ValueError:  # the command itself says why
        return 0


def _out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. For the CPU PyTorch has no exception of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
