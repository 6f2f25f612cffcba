"""What may change when a run is resumed: for every key of the configuration whether a new value counts, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class ChangeRule(NamedTuple):
    """effective: a new value takes effect from the next step on; otherwise it is refused."""

    effective: bool
    why: str


_WEIGHTS = ChangeRule(False, "the weights in the checkpoint are of that network")
_START = ChangeRule(False, "it says how a network starts, and that one has started")
_RECIPE = ChangeRule(True, "read at each step or epoch, and nothing in the checkpoint depends on it")
_STEP = ChangeRule(True, "images are counted, not batches, so the epoch goes on with the image that is next")
_MACHINE = ChangeRule(True, "weights and momentum are stored in float32, whatever computes with them")
_DATA = ChangeRule(
    True, "the network takes every size; classes, channels and within an epoch the number of images must stay"
)

RULES = {
    "model.name": _WEIGHTS,
    "model.dropout": ChangeRule(True, "dropout has no weights"),
    "model.depth": _WEIGHTS,
    "model.residual": _WEIGHTS,
    "model.width": _WEIGHTS,
    "model.activation": _WEIGHTS,
    "model.bias_init": _START,
    "model.bias_learned": _WEIGHTS,
    "model.initialisation": _START,
    "model.normalisation": _WEIGHTS,
    "model.branch_scale": _WEIGHTS,
    "model.fixup": _WEIGHTS,
    "data.source": _DATA,
    "data.batch_size": _STEP,
    "data.eval_batch_size": _STEP,
    "data.image_size": _DATA,
    "data.workers": _MACHINE,
    "data.strict": _RECIPE,
    "data.mixup": _RECIPE,
    "optimizer.lr": _RECIPE,
    "optimizer.momentum": _RECIPE,
    "optimizer.weight_decay": _RECIPE,
    "optimizer.clip": _RECIPE,
    "schedule.epochs": _RECIPE,
    "schedule.warmup": _RECIPE,
    "schedule.milestones": _RECIPE,
    "schedule.gamma": _RECIPE,
    "penalty.coeff": _RECIPE,
    "penalty.kind": _RECIPE,
    "penalty.interval": _RECIPE,
    "checkpoint.every_steps": _RECIPE,
    "checkpoint.keep_every_epochs": _RECIPE,
    "accumulate": _STEP,
    "fsdp": _MACHINE,
    "precision": _MACHINE,
    "channels_last": _MACHINE,
    "compile": _MACHINE,
    "seed": ChangeRule(False, "the order of the data, their augmentation and dropout follow from it"),
    "device": _MACHINE,
}


def changes(former: Any, now: Any, rules: Mapping[str, ChangeRule] = RULES) -> list[str]:
    """What differs, as "optimizer.lr 0.01 -> 0.02"; ValueError names the keys that must not change."""
    old, new = flat(former.as_dict()), flat(now.as_dict())
    differing = [key for key in new if new[key] != old[key]]
    refused = [
        f"{key} must stay {old[key]!r}, got {new[key]!r} ({rules[key].why})"
        for key in differing
        if not rules[key].effective
    ]
    if refused:
        raise ValueError(f"a resumed run keeps its network and its seed: {'; '.join(refused)}")
    return [f"{key} {old[key]} -> {new[key]}" for key in differing]


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The values under their dotted keys."""
    keys: dict[str, Any] = {}
    for key, value in values.items():
        keys |= flat(value, f"{before}{key}.") if isinstance(value, dict) else {before + key: value}
    return keys
