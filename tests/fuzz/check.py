"""What a trial demands of a call: the right value, or an error of ours that names the argument."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import isonet_fast

from .case import Failure

PACKAGE = str(Path(isonet_fast.__file__).parent)


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What the call returned, or what it raised."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def refused(error: Exception | None, names: Iterable[str], what: str) -> None:
    """The call must have been refused: ValueError or TypeError raised by our code, with one of the arguments' names."""
    if error is None:
        raise Failure("not refused", what)
    told = f"{what}: {type(error).__name__}: {str(error)[:300]}"
    if type(error) not in (ValueError, TypeError):
        raise Failure("foreign error", told) from error
    if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
        raise Failure("foreign error", f"{told} (raised outside the package)") from error
    if not any(re.search(rf"\b{re.escape(name)}s?\b", str(error)) for name in names):
        raise Failure("unnamed argument", f"{told} (expected one of {', '.join(names)})") from error


def accepted(error: Exception | None, what: str) -> None:
    if error is not None:
        raise Failure("refused or failed", f"{what}: {type(error).__name__}: {str(error)[:300]}") from error


def same_bits(what: str, actual: Tensor, expected: Tensor) -> None:
    """Equal, NaN where NaN is, whatever the strides."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        raise Failure("changed", f"{what}: {describe(actual)} instead of {describe(expected)}")
    if not torch.equal(actual.nan_to_num(0, 1, -1), expected.nan_to_num(0, 1, -1)) or not torch.equal(
        actual.isfinite(), expected.isfinite()
    ):
        raise Failure("changed", f"{what} changed")


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def accurate(
    what: str,
    actual: Tensor,
    expected: Tensor,  # float64
    plain: Callable[[], Iterable[Tensor]] = tuple,
    absolute: float = 0.0,
) -> None:
    """The error at most twice that of plain PyTorch in the same dtype, plus 1e-6 of the largest value of the reference.

    plain: the values that plain PyTorch computes, over several orders of summation, asked for only if the 1e-6 do not
    do (a sum of few numbers may come out exact in one order by luck). NaN and infinities must be where they are.
    """
    if actual.shape != expected.shape:
        raise Failure("wrong shape", f"{what}: {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if not actual.numel():
        return
    actual = actual.detach().double()
    expected = expected.detach()
    finite = expected.isfinite()
    error = (actual - expected).abs()
    if finite.all():
        largest = expected.abs().max().item()
    else:
        outside = (actual == expected) | (actual.isnan() & expected.isnan())
        error = torch.where(finite, error, torch.where(outside, 0.0, torch.inf).double())
        largest = torch.where(finite, expected.abs(), 0.0).max().item()
    error = error.nan_to_num(nan=torch.inf)
    worst, allowed = error.max().item(), absolute + 1e-6 * largest
    if worst <= allowed:
        return
    exact, miss = allowed, 0.0
    for values in plain():
        miss = max(miss, _miss(values.detach().double(), expected, finite))
        allowed = exact + 2 * miss
        if worst <= allowed:
            return
    at = tuple(torch.unravel_index(error.argmax(), error.shape))
    numbers = f"{actual[at].item():.9g} instead of {expected[at].item():.9g}, allowed error {allowed:.3g}"
    raise Failure("wrong value", f"{what}{[int(n) for n in at]} is {numbers}")


def _miss(values: Tensor, expected: Tensor, finite: Tensor) -> float:
    """The largest error of plain PyTorch; one that overflowed in its dtype allows any."""
    error = torch.where(finite, (values - expected).abs(), 0.0)
    return error.nan_to_num(nan=torch.inf).max().item()
