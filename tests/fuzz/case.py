"""The choices that make a trial: drawn at random and noted by name, so that a failure is one small dictionary."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Failure(AssertionError):
    """A wrong value, a foreign error, or an input that should have been refused."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


class Case:
    """Choices by name: those given, else drawn by `rng`, else (without one) the simplest, which is the first."""

    def __init__(self, given: dict[str, Any] | None = None, rng: random.Random | None = None) -> None:
        self._given, self._rng = given or {}, rng
        self.made: dict[str, Any] = {}
        self._options: dict[str, Sequence[Any]] = {}

    def choose(self, name: str, options: Sequence[Any]) -> Any:
        """One of `options`, the simplest first; one that is listed twice is drawn twice as often."""
        if name in self._given and self._given[name] in options:
            value = self._given[name]
        else:
            value = options[0] if self._rng is None else self._rng.choice(options)
        self.made[name], self._options[name] = value, options
        return value

    def flag(self, name: str, odds: int = 2) -> bool:
        """True once in `odds` times."""
        return self.choose(name, [False] * (odds - 1) + [True])

    def dtype(self, name: str, options: Sequence[str]) -> torch.dtype:
        return getattr(torch, self.choose(name, options))

    def seed(self) -> None:
        """The CPU's generator: torch.manual_seed formats the stack, for every kind of device that is not there."""
        torch.default_generator.manual_seed(self.choose("seed", range(10**6)))

    def simpler(self) -> list[dict[str, Any]]:
        """The choices with one of them replaced by a simpler one, the simplest first."""
        candidates = []
        for name, value in self.made.items():
            options = list(dict.fromkeys(self._options[name][:100]))  # a seed has a million
            earlier = options[: options.index(value)] if value in options else options[:1]
            candidates += [{**self.made, name: option} for option in earlier]
        return candidates

    def essential(self) -> dict[str, Any]:
        """The choices that are not the simplest ones, which a replay takes anyway."""
        return {name: value for name, value in self.made.items() if value != self._options[name][0]}


def failure_of(run: Callable[[Case], None], case: Case) -> Failure | None:
    """What is wrong with this trial; an unforeseen exception is a failure too."""
    try:
        run(case)
    except Failure as failure:
        return failure
    except Exception as error:
        failure = Failure("unforeseen error", f"{type(error).__name__}: {str(error)[:300]}")
        failure.__cause__ = error
        return failure
    return None


def shrink(run: Callable[[Case], None], case: Case, failure: Failure, tries: int = 400) -> tuple[Case, Failure]:
    """The same kind of failure from simpler choices: one choice at a time, until none can be simplified."""
    simplified = True
    while simplified and tries > 0:
        simplified = False
        for choices in case.simpler():
            tries -= 1
            attempt = Case(choices)
            found = failure_of(run, attempt)
            if found is not None and found.kind == failure.kind:
                case, failure, simplified = attempt, found, True
                break
            if tries <= 0:
                break
    return case, failure


def reproducer(kind: str, case: Case) -> str:
    """Three lines that show the failure, to be pasted into a Python started in the repository."""
    return f"from tests.fuzz import replay\nchoices = {case.essential()!r}\nreplay({kind!r}, choices)"
