"""Our networks against numbers of the official code (`make_golden.py`), in float64: the first step's logits, penalty
and every gradient, and of the published networks every weight after three training steps."""

from __future__ import annotations

import json

import pytest
import torch

from . import formula, steps
from .make_golden import CONFIGS, GOLDEN, STEPS, SWITCHED, dropout_rate, ours


@pytest.fixture(scope="module")
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def close(actual: float, expected: float, tolerance: float, scale: float | None = None) -> bool:
    return abs(actual - expected) <= tolerance * (abs(expected) if scale is None else scale)


def same_measure(actual: list[float], expected: list[float]) -> bool:
    """Norm and projection, relative to the norm."""
    return all(close(a, e, 1e-9, expected[0]) for a, e in zip(actual, expected, strict=True))


def test_every_network_is_in_the_file(golden: dict) -> None:
    assert sorted(golden) == sorted([*CONFIGS, *SWITCHED])


@pytest.mark.parametrize("name", [*CONFIGS, *SWITCHED])
def test_training_is_that_of_the_official_code(name: str, golden: dict, device: torch.device) -> None:
    expected = golden[name]
    model, optimizer, reg = ours(name, expected["recipe"], device)
    names = {n: list(p.shape) for n, p in model.named_parameters()}
    assert list(names.items()) == [(n, p["shape"]) for n, p in expected["parameters"].items()]
    assert dropout_rate(model) == expected["recipe"]["dropout"]

    losses = []
    count = STEPS if name in CONFIGS else 1  # the others show with their first gradients what is theirs
    for step in steps.train(model, reg, expected["recipe"]["gamma"], optimizer, count):
        losses.append(step.loss)
        if len(losses) == 1:
            check_first(steps.summarise(step, model), expected)
    assert all(close(a, e, 1e-9) for a, e in zip(losses, expected["losses"][:count], strict=True))
    if count < STEPS:
        return
    for stream, (parameter, p) in enumerate(model.named_parameters()):
        after = formula.measure(p.detach().cpu(), stream)
        assert same_measure(after, expected["parameters"][parameter]["after"]), parameter


def check_first(actual: dict, expected: dict) -> None:
    logits, reference = torch.tensor(actual["logits"]), torch.tensor(expected["logits"])
    assert (logits - reference).abs().max() <= 1e-10 * reference.abs().max()
    assert close(actual["penalty"], expected["penalty"], 1e-9)
    for parameter, entry in expected["parameters"].items():
        assert same_measure(actual["grads"][parameter], entry["grad"]), parameter
        penalty = actual["penalty_grads"].get(parameter)
        assert (penalty is None) == (entry["penalty_grad"] is None), parameter
        assert penalty is None or same_measure(penalty, entry["penalty_grad"]), parameter
