"""The state of a run, as a checkpoint holds it, and a run that goes on from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..models.load_official import load_weights
from .distributed import shards_of

if TYPE_CHECKING:
    from .loop import Run

_KEYS = (
    "classes",
    "model",
    "optimizer",
    "regularizer",
    "scaler",
    "position",
    "ranks",
    "corrupt",
)  # in every checkpoint


def take(run: Run) -> dict[str, Any]:
    """Everything that the next step depends on. Every process must come here."""
    generators = {"cpu": torch.get_rng_state()}
    if run.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(run.device)
    mine = {"random": generators, "sums": run.sums.totals.cpu(), "penalty": run.penalty.cpu()}
    return {
        "command": run.COMMAND,
        "config": run.config.as_dict(),
        "classes": [run.source.num_classes, run.source.channels],
        "images": len(run.source.train),
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "regularizer": run.reg.state_dict(),
        "scaler": run.scaler.state_dict(),
        "position": {"epoch": run.epoch, "examples": run.examples, "step": run.step, "best": run.best},
        "ranks": run.processes.gather(mine),
        "corrupt": run.all_corrupt(),
    }


def restore(run: Run, state: dict[str, Any]) -> None:
    """Bring a new run to where the checkpoint's run was; ValueError for data or weights that do not fit it."""
    missing = [key for key in _KEYS if key not in state]
    if missing:
        raise ValueError(f"the checkpoint in {run.directory} is incomplete: it lacks {', '.join(missing)}")
    position = state["position"]
    run.epoch, run.examples, run.step = position["epoch"], position["examples"], position["step"]
    run.best = position["best"]
    _check_data(run, state)
    # the configuration's groups, because it may have another momentum or weight decay (`resuming`)
    groups = run.optimizer.state_dict()["param_groups"]
    weights, optimizer = state["model"], {**state["optimizer"], "param_groups": groups}
    if run.sharded:
        weights, optimizer = shards_of(weights, optimizer, run.model, run.optimizer)
    load_weights(run.model, weights, run.directory)
    run.optimizer.load_state_dict(optimizer)
    run.reg.load_state_dict(state["regularizer"])
    if state["scaler"]:  # empty where the precision needed none
        run.scaler.load_state_dict(state["scaler"])
    run.corrupt.update(state["corrupt"])
    _restore_own(run, state["ranks"])


def _check_data(run: Run, state: dict[str, Any]) -> None:
    source, given = run.source, run.config.data.source
    if state["classes"] != [source.num_classes, source.channels]:
        raise ValueError(
            f"the checkpoint is of a run on data with {state['classes'][0]} classes and {state['classes'][1]} "
            f"channels; {given} has {source.num_classes} and {source.channels}"
        )
    images = state.get("images", len(source.train))  # checkpoints of 0.1.0 do not say it
    if run.examples and images != len(source.train):
        raise ValueError(
            f"the checkpoint is within epoch {run.epoch} of {images} training images, {given} has {len(source.train)}: "
            f"end that epoch with the former data (schedule.epochs={run.epoch}) first"
        )


def _restore_own(run: Run, ranks: list[dict[str, Any]]) -> None:
    """Restore what each process has of its own. If their number changed, rank 0 gets the sums; dropout starts anew."""
    processes = run.processes
    if len(ranks) != processes.size:
        run.seed()
        count = "one process" if len(ranks) == 1 else f"{len(ranks)} processes"
        processes.say(
            f"the checkpoint is of {count}, this run has {processes.size}: dropout is seeded anew from "
            f"(seed, step, rank), and {run.batch_note()}"
        )
        for sums, key in ((run.sums.totals, "sums"), (run.penalty, "penalty")):
            total = torch.stack([rank[key] for rank in ranks]).sum(0)
            sums.copy_(total if processes.main else torch.zeros_like(total))
        return
    mine = ranks[processes.rank]
    torch.set_rng_state(mine["random"]["cpu"])
    if run.device.type == "cuda" and "cuda" in mine["random"]:
        torch.cuda.set_rng_state(mine["random"]["cuda"], run.device)
    run.sums.totals.copy_(mine["sums"])
    run.penalty.copy_(mine["penalty"])
