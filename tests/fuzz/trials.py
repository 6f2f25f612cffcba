"""Every kind of trial by name, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Callable

from . import arguments, elementwise, networks, penalty
from .case import Case

TRIALS: dict[str, Callable[[Case], None]] = {
    "srelu": elementwise.srelu,
    "residual_srelu": elementwise.residual_srelu,
    "orthogonality_loss": penalty.orthogonality_loss,
    "delta_": penalty.delta_,
    "layer": penalty.layer,
    "regularizer": networks.regularizer,
    "convert": networks.convert,
    "param_groups": networks.param_groups,
    "singular_values": networks.singular_values,
    "isometry_report": networks.isometry_report,
    "shared_scale": networks.shared_scale,
    "network": networks.network,
    "arguments": arguments.arguments,
}
ODDS = dict.fromkeys(TRIALS, 5) | {
    "srelu": 60,
    "residual_srelu": 60,
    "orthogonality_loss": 30,
    "regularizer": 10,
    "delta_": 10,
    "arguments": 10,
    "isometry_report": 1,
    "network": 1,
}
