"""Twenty thousand of the trials of `make fuzz`; and that the program finds, tells and repeats faults planted here."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from isonet_fast import OrthoRegularizer, diagnostics, functional, init
from isonet_fast.ops import orthogonality, residual_srelu, srelu

from . import replay
from .case import Case, Failure
from .search import search
from .trials import TRIALS
from .watch import Watch

PARTS = 4
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", range(PARTS))
def test_twenty_thousand_trials_without_a_failure(part: int) -> None:
    numbers = range(part * 20_000 // PARTS, (part + 1) * 20_000 // PARTS)
    calls, found = search(0, numbers)
    assert found is None, found.told()
    assert calls == 20_000 // PARTS


def test_a_sum_of_few_terms_that_cancels() -> None:
    """The gradient of the scale is the sum of 24 products, which cancel to a hundredth of the largest."""
    choices = {"seed": 986052, "N": 3, "C": 8, "values": "normal", "branch layout": "batch slice"}
    choices |= {"branch dtype": "bfloat16", "bias form": "expanded", "with scale": True, "gradient layout": "unbind"}
    replay("residual_srelu", choices)


def scaled(function: Callable, factor: float, which: int) -> Callable:
    """`function` with one of its results multiplied."""

    def wrong(*args: Any, **kwargs: Any) -> tuple:
        results = list(function(*args, **kwargs))
        results[which] = None if results[which] is None else results[which] * factor
        return tuple(results)

    return wrong


def ties_pass(grad_output: torch.Tensor, output: torch.Tensor, bias: torch.Tensor) -> tuple:
    taken = output < srelu.per_channel(bias, output)
    grad_x, grad_bias = torch.where(taken, 0, grad_output), torch.where(taken, grad_output, 0)
    return grad_x, srelu.channel_sum(grad_bias, bias)


class Fault(NamedTuple):
    """A slip of the pen: what is replaced, by what is made of the original; the kind of trial that must notice."""

    told: str
    kind: str
    owner: Any
    name: str
    wrong: Callable[[Any], Any]


FAULTS = [
    Fault("a tie passes its gradient", "srelu", srelu, "gradients", lambda right: ties_pass),
    Fault(
        "the gradient of the scale is one percent off",
        "residual_srelu",
        residual_srelu.ResidualSReLU,
        "backward",
        lambda right: staticmethod(scaled(right, 1.01, 3)),
    ),
    Fault(
        "the gradient of a weight is a thousandth off",
        "orthogonality_loss",
        orthogonality.OrthogonalityLoss,
        "backward",
        lambda right: staticmethod(scaled(right, 1.001, 2)),
    ),
    Fault("in place over a leaf", "srelu", functional, "may_write", lambda right: lambda *arguments: True),
    Fault("an interval that is ignored", "regularizer", OrthoRegularizer, "_due", lambda right: lambda self: True),
    Fault(
        "a delta without its stride", "delta_", init, "delta_", lambda right: lambda w, groups, stride: right(w, groups)
    ),
    Fault(
        "squared singular values",
        "singular_values",
        diagnostics,
        "singular_values",
        lambda right: lambda conv, size: right(conv, size).square(),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.told)
def test_a_planted_fault_is_found_and_told_in_three_lines(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as planted:
        planted.setattr(fault.owner, fault.name, fault.wrong(getattr(fault.owner, fault.name)))
        _, found = search(1, range(500), only=[fault.kind])
        assert found is not None, "not found"
        lines = found.reproducer()
        assert len(lines.splitlines()) == 3
        with pytest.raises(Failure, match=found.failure.kind):
            exec(lines, {})
    exec(lines, {})  # without the fault nothing fails


def test_a_failure_is_shown_by_the_simplest_choices() -> None:
    def fails(case: Case) -> None:
        sizes = [case.choose(f"size {n}", (1, 2, 3, 4)) for n in range(6)]
        case.flag("whatever")
        if sizes[2] >= 3:
            raise Failure("wrong value", "size 2 is too large")

    TRIALS["fails"] = fails
    try:
        _, found = search(0, range(100), only=["fails"])
    finally:
        del TRIALS["fails"]
    assert found is not None and found.case.essential() == {"size 2": 3}


def test_a_trial_depends_on_its_seed_and_number_alone() -> None:
    def choices(case: Case) -> None:
        case.choose("number", range(10**6))
        seen.append(case.made["number"])

    seen: list[int] = []
    TRIALS["choices"] = choices
    try:
        search(5, range(4), only=["choices"])
        search(5, (3, 1), only=["choices"])
        search(6, (3,), only=["choices"])
    finally:
        del TRIALS["choices"]
    assert seen[4:6] == [seen[3], seen[1]] and seen[6] != seen[3] and len(set(seen[:4])) == 4


def crash(worker: int, args: argparse.Namespace, at: Any, calls: Any, found: Any) -> None:
    at[worker] = 17
    os.kill(os.getpid(), signal.SIGKILL)


def report(worker: int, args: argparse.Namespace, at: Any, calls: Any, found: Any) -> None:
    found.put("trial 3 of seed 5: wrong value")


@pytest.mark.parametrize(("work", "told"), [(crash, "--seed 5 --first 17 --calls 1"), (report, "trial 3 of seed 5")])
def test_a_failure_and_a_crash_end_the_program_with_1(
    work: Callable, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(seed=5, first=0, workers=1, calls=0, seconds=60.0, only=[])
    assert Watch(args, work).run() == 1
    assert told in capsys.readouterr().out


def test_the_program_makes_the_calls_that_it_is_asked_for() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--calls", "21", "--seed", "3", "--workers", "2", "--only", "delta_"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "seed 3" in ended.stdout and " 21 calls" in ended.stdout and "no failure" in ended.stdout
