"""`isonet-fast train` and `detect`: from a command line to a run, new or resumed, in one process or by torchrun."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...safe_load import few
from .. import config, distributed
from ..config import Config
from ..distributed import Processes
from ..loop import Run
from ..paths import to_resume
from ..saving import checkpoint, lock, resuming
from ..saving.files import disk_errors_naming, is_temporary

_LAUNCH = ".torchrun"  # in the directory of a run: which torchrun began it


def settings(args: argparse.Namespace) -> list[str]:
    """The settings of a command line. Flags are short for some of them; `--set` is applied last."""
    flags = [f"{key}=true" for key in ("channels_last", "compile", "fsdp") if getattr(args, key, False)]
    flags += [
        f"{key}={getattr(args, key)}" for key in ("precision", "accumulate") if getattr(args, key, None) is not None
    ]
    if args.strict:
        flags.append("data.strict=true")
    return [*flags, *args.set]


@dataclass(frozen=True)
class Kind:
    """What one command trains."""

    config: Any  # the dataclass of its configuration
    run: type[Run]
    rules: Mapping[str, resuming.ChangeRule]

    def load(self, *args: Any) -> Any:
        return config.load_as(self.config, *args)


CLASSIFIER = Kind(Config, Run, resuming.RULES)


def run(args: argparse.Namespace, kind: Kind) -> None:
    with distributed.processes() as processes:
        if args.resume is not None:
            if args.output is not None:
                raise ValueError("--resume goes on in its own directory; leave --output out")
            processes.from_main(lambda: checkpoint.expect_any(args.resume))  # before anything is written there
            with _locked(args.resume, processes):
                _resume(args, args.resume, processes, kind)
        else:
            _start(args, processes, kind)


@contextmanager
def _locked(directory: Path, processes: Processes) -> Iterator[None]:
    """Lock the directory: rank 0 holds it for all."""
    with ExitStack() as stack:
        processes.from_main(lambda: stack.enter_context(lock.locked(directory)))
        yield


def _start(args: argparse.Namespace, processes: Processes, kind: Kind) -> None:
    if args.config is None:
        raise ValueError(f"say what to train with --config: {', '.join(config.presets(kind.config))}, or a YAML file")
    settled = kind.load(args.config, [*data(args), *settings(args)])
    directory = args.output or Path("runs") / Path(args.config).stem
    processes.from_main(lambda: _goes_on(directory, kind))  # before anything is written there
    with _locked(directory, processes):
        if processes.from_main(lambda: _claim(directory, kind)):
            _resume(args, directory, processes, kind)
        else:
            _fit(settled, directory, None, processes, kind)


def _goes_on(directory: Path, kind: Kind) -> bool:
    """Whether `directory` holds this very run, which torchrun has started again. ValueError if it holds another run, or
    something else that a run could write over."""
    launch, begun = distributed.launch_name(), directory / _LAUNCH
    if checkpoint.find(directory, "latest", "previous"):
        if launch is not None and begun.exists() and begun.read_text() == launch:
            return True
        raise ValueError(
            f"{directory} holds a run already: go on with {to_resume(directory, kind.run.COMMAND)}, "
            "or choose another --output"
        )
    names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    foreign = [name for name in names if name not in (_LAUNCH, lock.NAME) and not is_temporary(name)]
    if foreign:
        raise ValueError(f"{directory} is not empty: it holds {few(foreign)}; choose another --output")
    return False


def _claim(directory: Path, kind: Kind) -> bool:
    """`_goes_on`, once the directory is locked. A new run leaves the name of torchrun's launch in it."""
    goes_on, launch = _goes_on(directory, kind), distributed.launch_name()
    if launch is not None and not goes_on:
        with disk_errors_naming(directory / _LAUNCH):
            (directory / _LAUNCH).write_text(launch)
    return goes_on


def _resume(args: argparse.Namespace, directory: Path, processes: Processes, kind: Kind) -> None:
    """Resume with the configuration of the checkpoint, which the command line may change (`resuming`)."""
    path = processes.from_main(
        lambda: checkpoint.load_latest(directory)[1]
    )  # one choice for all, if the last is damaged
    state = checkpoint.load(path)
    if not {"config", "position"} <= state.keys():
        raise ValueError(
            f"{path} holds no run: expected 'config' and 'position' in it, found {few([*map(repr, state)])}"
        )
    begun_by = state.get("command", CLASSIFIER.run.COMMAND)
    if begun_by != kind.run.COMMAND:
        raise ValueError(f"{path} is of another command: go on with {to_resume(directory, begun_by)}")
    former = kind.load(None, (), state["config"])
    settled = kind.load(args.config, [*data(args), *settings(args)], state["config"])
    changes = resuming.changes(former, settled, kind.rules)
    position = state["position"]
    if at_end := kind.run.at_end(settled, position):
        processes.say(f"{path} is at the end of its {at_end} to go on")
        return
    processes.say(f"resuming from {path}: epoch {position['epoch']}, {position['examples']} images of it done")
    if changes:
        processes.say(f"from here on with {', '.join(changes)}")
    _fit(settled, directory, state, processes, kind)


def _fit(settled: Any, directory: Path, state: dict[str, Any] | None, processes: Processes, kind: Kind) -> None:
    trained = kind.run(settled, directory, state, processes)
    trained.fit()
    processes.say(f"done: {trained.outcome()}; checkpoints and metrics.csv in {directory}")


def data(args: argparse.Namespace) -> list[str]:
    """`--data` as a setting."""
    return [] if args.data is None else [f"data.source={args.data}"]
