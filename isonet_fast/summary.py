"""What `OrthoRegularizer.summary()` returns: a row for each layer, printed as a table."""

from __future__ import annotations

import math
from typing import NamedTuple

from .geometry import Layer, Penalty


class SummaryRow(NamedTuple):
    """One layer in `OrthoRegularizer.summary()`."""

    name: str
    shape: tuple[int, ...]  # () where there is no weight of its own
    penalty: Penalty | None  # which one; None if excluded
    excluded: str  # why it is excluded; empty if it is not
    coeff: float
    value: float  # unweighted; NaN where the weight has no values (meta device, FakeTensor)
    gflop: float  # multiply-adds of the penalty and its gradient, times two
    isometry: str = ""  # how near to an isometry it can come (`existence.isometry`)


class Summary(list[SummaryRow]):
    """The rows of `OrthoRegularizer.summary()`; prints as a table."""

    def __str__(self) -> str:
        lines = [_line("layer", "weight", "penalty", "coeff", "value", "GFLOP", "isometry")]
        for row in self:
            shape = "x".join(map(str, row.shape))
            if row.excluded:
                lines.append(f"{row.name:<28} {shape:<22} excluded: {row.excluded}")
            else:
                numbers = f"{row.coeff:.2g}", f"{row.value:.5g}", f"{row.gflop:.4f}"
                lines.append(_line(row.name, shape, row.penalty or "", *numbers, row.isometry))
        values = math.fsum(row.value for row in self), math.fsum(row.gflop for row in self)
        return "\n".join([*lines, _line("total", "", "", "", f"{values[0]:.5g}", f"{values[1]:.4f}", "")])


def _line(name: str, shape: str, penalty: str, coeff: str, value: str, gflop: str, isometry: str) -> str:
    return f"{name:<28} {shape:<22} {penalty:<8} {coeff:>9} {value:>11} {gflop:>9}  {isometry}".rstrip()


def gflop(layer: Layer) -> float:
    """Gram of each offset of the half plane, and the two gradient products (one at t = 0)."""
    return sum(layer.gram_flops(t) * (3 if any(t) else 2) for t in layer.offsets) / 1e9
