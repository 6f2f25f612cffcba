"""Trial after trial until one fails; the trial of a number depends on the seed and on that number."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from .case import Case, Failure, failure_of, reproducer, shrink
from .trials import ODDS, TRIALS


class Found(NamedTuple):
    """A failure: the number and the kind of its trial, and the simplest choices that show it."""

    number: int
    kind: str
    case: Case
    failure: Failure

    def told(self) -> str:
        return f"{self.failure}\n\n{self.reproducer()}\n"

    def reproducer(self) -> str:
        return reproducer(self.kind, self.case)


def trial(seed: int, number: int, only: Sequence[str] = ()) -> tuple[str, Case]:
    """The trial of that number: its kind, and the case with its choices still to be drawn."""
    rng = random.Random(f"{seed}.{number}")
    kinds = only or [kind for kind in TRIALS for _ in range(ODDS[kind])]
    return rng.choice(kinds), Case(rng=rng)


def search(
    seed: int, numbers: Iterable[int], only: Sequence[str] = (), before: Callable[[int], bool] = lambda number: True
) -> tuple[int, Found | None]:
    """How many trials ran, and the first that failed, simplified. `before` is told each number and may end it."""
    calls = 0
    for number in numbers:
        if not before(number):
            break
        kind, case = trial(seed, number, only)
        run = TRIALS[kind]
        failure = failure_of(run, case)
        calls += 1
        if failure is not None:
            return calls, Found(number, kind, *shrink(run, case, failure))
    return calls, None
