"""The shape of one layer's orthogonality problem: rows, columns, taps and the offsets between them.

Everything here follows from shapes alone. The closed form and the kernel for small layers (`ops/`) and the tile plan of
the Triton kernels (`kernels/`) read it; the specification (`reference.py`) deliberately does not.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

Offset = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """What distinguishes one penalty from another."""

    rows_are_outputs: bool = False  # always; else rows are the smaller side
    constant: bool = False  # what no operator of the shape can avoid is subtracted
    flatten: bool = False  # the kernel's taps count as columns: one tap


PENALTIES = {
    "isonet": Rule(),
    "lorth": Rule(rows_are_outputs=True, constant=True),
    "matrix": Rule(flatten=True),
}


@dataclass(frozen=True)
class Layer:
    """One weight of shape (O, I/g, k...) and how it is convolved; a linear layer has no k.

    Hashable, so that plans and batches can be keyed by it. Only `offsets` is worth keeping; torch.compile can trace the
    rest (not a cached_property).
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    penalty: str

    @property
    def rule(self) -> Rule:
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty must be one of {tuple(PENALTIES)}, got {self.penalty!r}")
        return PENALTIES[self.penalty]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Taps per dimension, none where the penalty flattens them into the columns."""
        return () if self.rule.flatten else self.shape[2:]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def _phases(self) -> int:
        """prod r_i: how many input phases of the stride cell the taps reach."""
        phases = 1
        for k, step in zip(self.kernel, self.steps, strict=True):
            phases *= min(k, step)
        return phases

    @property
    def transposed(self) -> bool:
        """Whether rows are inputs: the smaller side, where the penalty allows it.

        Where the operator acts as an unstrided one both sides agree up to the constant, so the smaller one serves.
        """
        outputs, inputs = self._sides
        return inputs < outputs and (not self.rule.rows_are_outputs or self._phases == 1)

    @property
    def _sides(self) -> tuple[int, int]:
        inputs = math.prod(self.shape[1:]) if self.rule.flatten else self.shape[1]
        return self.shape[0] // self.groups, inputs

    @property
    def rows(self) -> int:
        """M: rows of one group's tap matrices."""
        return self._sides[1] if self.transposed else self._sides[0]

    @property
    def columns(self) -> int:
        """N: columns of one group's tap matrices."""
        return self._sides[0] if self.transposed else self._sides[1]

    @property
    def thin(self) -> bool:
        """Few rows: few rounding errors average out in the gradient, and float64 costs next to nothing."""
        return self.rows <= 8

    @property
    def constant(self) -> float:
        """What is subtracted so that the minimum is 0, all groups together (`lorth` with more rows than
        the operator has columns; 0 elsewhere)."""
        if not self.rule.constant or self.transposed:
            return 0.0
        return self.groups * max(0, self.rows - self.columns * self._phases) / 2

    @property
    def steps(self) -> tuple[int, ...]:
        """Per dimension, what every t in T is a multiple of: s_i / gcd(e_i, s_i)."""
        return tuple(s // math.gcd(e, s) for _, s, e in zip(self.kernel, self.stride, self.dilation, strict=False))

    @cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Half of T, t = 0 first: G_{-t} is the transpose of G_t, so the other half is not computed.

        T = {t : |t_i| <= k_i - 1 and e_i t_i divisible by s_i}.
        """
        ranges = [
            [t for t in range(1 - k, k) if t % step == 0] for k, step in zip(self.kernel, self.steps, strict=True)
        ]
        zero = (0,) * len(self.kernel)
        return tuple(t for t in itertools.product(*ranges) if t >= zero)

    def overlap(self, offset: tuple[int, ...]) -> int:
        """How many pairs of taps (u, u + t) exist: the size of a rectangle."""
        return math.prod(k - abs(t) for k, t in zip(self.kernel, offset, strict=True))

    def gram_flops(self, offset: tuple[int, ...]) -> int:
        """Multiply-adds, times two, of G_t over all groups (the diagonal's symmetry not exploited)."""
        return 2 * self.groups * self.rows**2 * self.columns * self.overlap(offset)


def split_work(layers: tuple[Layer, ...], index: int, count: int) -> tuple[tuple[Offset, ...], ...]:
    """The offsets of each layer that rank `index` of `count` computes: (layer, offset) units, balanced by FLOPs.

    Longest unit first, each to the rank with the least work so far: the same split on every rank without
    communication. `split_work(layers, 0, 1)` is everything.
    """
    if count == 1:
        return tuple(layer.offsets for layer in layers)
    units = sorted(
        ((layer.gram_flops(t), n, t) for n, layer in enumerate(layers) for t in layer.offsets),
        key=lambda unit: (-unit[0], unit[1], unit[2]),
    )
    load = [0] * count
    mine: list[list[tuple[int, ...]]] = [[] for _ in layers]
    for flops, n, t in units:
        rank = load.index(min(load))
        load[rank] += flops
        if rank == index:
            mine[n].append(t)
    return tuple(tuple(sorted(offsets)) for offsets in mine)
