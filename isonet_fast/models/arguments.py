"""The networks' arguments, checked: TypeError for another type, ValueError outside the range, both with the name."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any


def integer(name: str, value: Any) -> int:
    """An int, or what stands for one (numpy's, a one-element integer tensor); a bool does not."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name} must be an int, got {value!r}") from None


def positive(name: str, value: Any) -> int:
    value = integer(name, value)
    if value < 1:
        raise ValueError(f"{name} must be a positive int, got {value}")
    if value >= 2**31:  # no tensor of that many channels could be made
        raise ValueError(f"{name} must be below 2**31")
    return value


def truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def dropout_rate(value: Any, default: float, meaning: str) -> float:
    """The rate; `default` for None. `meaning` says in an error what None means."""
    if value is None:
        return default
    allowed = f"dropout must be None ({meaning}) or in [0, 1), got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(allowed)
    rate = float(value)
    if not 0 <= rate < 1:
        raise ValueError(allowed)
    return rate
