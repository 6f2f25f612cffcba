"""The shape of one layer's orthogonality problem: rows, columns, taps, and the units of which its work consists.

A unit is an offset between taps or a frequency, by the form in which the layer is computed (`Layer.form`).

Everything here follows only from shapes. The closed form and the kernel for small layers (`ops/`) and the tile plan of
the Triton kernels (`kernels/`) read it; the specification (`reference.py`) deliberately does not.
"""

from __future__ import annotations

import itertools
import math
import reprlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Offset = tuple[int, ...]
Frequency = tuple[int, ...]
Penalty = Literal["isonet", "lorth", "matrix"]
Precision = Literal["highest"]  # None: as fast as the tolerances allow

# A layer is small if neither its residual nor a tap has more elements. Beyond, a layer deserves more than the one
# thread that the compiled kernel gives it, and matrix products are large enough to use several.
SMALL = 128**2
# A small layer must multiply less by this factor over frequencies, which also take more additions and transposes.
# Measured with the compiled kernel: the two forms meet where 3x3 kernels have 14 to 16 channels (docs/benchmarks.md).
SMALL_FACTOR = 1.4
# The transforms of the frequency form take as long as its products where channels are few. Of the products of the form
# over offsets it has 0.26 for 5x5, 0.34 for 3x3x3, and gains as tools/schedule.py predicts for a GPU; networks of few
# channels would lose with 4x4 (0.38) and nine taps in one dimension (0.41).
TRITON_SHARE = 0.35


@dataclass(frozen=True)
class Rule:
    """What distinguishes one penalty from another."""

    rows_are_outputs: bool = False  # always; else rows are the smaller side
    constant: bool = False  # what no operator of the shape can avoid is subtracted
    flatten: bool = False  # the kernel's taps count as columns: one tap


PENALTIES: dict[Penalty, Rule] = {
    "isonet": Rule(),
    "lorth": Rule(rows_are_outputs=True, constant=True),
    "matrix": Rule(flatten=True),
}


def check_penalty(penalty: object, none: str = "") -> None:
    """Raise ValueError for what is no penalty's name. none: what None means, where None is allowed too."""
    if (none and penalty is None) or (isinstance(penalty, str) and penalty in PENALTIES):
        return
    allowed = f"{tuple(PENALTIES)} or None ({none})" if none else tuple(PENALTIES)
    raise ValueError(f"penalty must be one of {allowed}, got {reprlib.repr(penalty)}")


@dataclass(frozen=True)
class Layer:
    """One weight of shape (O, I/g, k...) and how it is convolved; a linear layer has no k.

    Hashable, so that plans and batches can be keyed by it. What is worth keeping is a cached_property; torch.compile
    can trace the rest.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    penalty: Penalty

    @property
    def rule(self) -> Rule:
        check_penalty(self.penalty)
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

        Where the operator acts as an unstrided one both sides agree up to the constant, so the smaller one serves a
        penalty that subtracts it.
        """
        outputs, inputs = self._sides
        either = not self.rule.rows_are_outputs or (self.rule.constant and self._phases == 1)
        return inputs < outputs and either

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
        """Whether there are few rows. Then rounding errors in the gradient hardly average out, and float64 is cheap."""
        return self.rows <= 8

    @property
    def small(self) -> bool:
        return self.rows * max(self.rows, self.columns) <= SMALL

    @property
    def excess(self) -> int:
        """By how many one group's rows outnumber the operator's columns. At best this many eigenvalues of R are -1."""
        return max(0, self.rows - self.columns * self._phases)

    @property
    def constant(self) -> float:
        """What is subtracted so that the minimum is 0, all groups together (0 where the penalty subtracts nothing)."""
        return self.groups * self.excess / 2 if self.rule.constant else 0.0

    @property
    def steps(self) -> tuple[int, ...]:
        """Per dimension, the number of which every t in T is a multiple: s_i / gcd(e_i, s_i)."""
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

    def overlap(self, offset: Offset) -> int:
        """How many pairs of taps (u, u + t) exist: the size of a rectangle."""
        return math.prod(k - abs(t) for k, t in zip(self.kernel, offset, strict=True))

    def gram_flops(self, offset: Offset) -> int:
        """Multiply-adds, times two, of G_t over all groups (the diagonal's symmetry not exploited)."""
        return 2 * self.groups * self.rows**2 * self.columns * self.overlap(offset)

    @property
    def phases(self) -> tuple[int, ...]:
        """Per dimension, how many input phases of the stride cell the taps reach."""
        return tuple(min(k, step) for k, step in zip(self.kernel, self.steps, strict=True))

    @property
    def periods(self) -> tuple[int, ...]:
        """m_i: how many taps of one phase there are at most. G_t vanishes where |t_i| / steps_i >= m_i."""
        return tuple(-(-k // max(p, 1)) for k, p in zip(self.kernel, self.phases, strict=True))

    @property
    def grid(self) -> tuple[int, ...]:
        """n_i = 2 m_i - 1: this many frequencies per dimension hold the support of G without wrapping."""
        return tuple(max(0, 2 * m - 1) for m in self.periods)

    @cached_property
    def frequencies(self) -> tuple[Frequency, ...]:
        """Half of the grid, 0 first: B(-w) is the conjugate of B(w). The grid is odd, so that only 0 is its own."""
        every = itertools.product(*map(range, self.grid))
        opposite = ((w, tuple(-x % n for x, n in zip(w, self.grid, strict=True))) for w in every)
        return tuple(w for w, other in opposite if w <= other)

    @cached_property
    def form(self) -> str:
        """How the closed form and the compiled kernel compute this layer: "overlap" or "frequency", the one with fewer
        multiplications.

        A small layer takes "frequency" only if this saves the factor SMALL_FACTOR. A thin layer always takes "overlap",
        whose few products are summed in float64. Ties go to "overlap".
        """
        factor = SMALL_FACTOR if self.small else 1
        saves = self.multiplications("overlap") > factor * self.multiplications("frequency")
        return "frequency" if saves and not self.thin else "overlap"

    @cached_property
    def triton_form(self) -> str:
        """How the Triton kernels compute this layer: "frequency" where that takes at most TRITON_SHARE of the products.

        A unit is multiplied as often as its residual has pairs of taps, or twice (cosine and sine), and half of that if
        the residual is symmetric. So in the same measure offsets take taps^2 and n frequencies 2 n - 1. Strided layers
        stay with offsets: fewer of their taps overlap. So do thin ones, as in the closed form.
        """
        saves = 2 * math.prod(self.grid) - 1 <= TRITON_SHARE * self.taps**2
        return "frequency" if saves and self.taps and self._phases == 1 and not self.thin else "overlap"

    def units(self, form: str) -> tuple[tuple[int, ...], ...]:
        """Offsets or frequencies: each can be computed by itself, and their results add up."""
        return self.offsets if form == "overlap" else self.frequencies

    def work(self, form: str, unit: tuple[int, ...], gradient: bool = True) -> int:
        """Multiplications of one unit's penalty, and of its gradient, in the closed form, as ops/overlap_form.py and
        ops/frequency_form.py do them, over all groups."""
        square = self.groups * self.rows**2 * self.columns
        if form == "overlap":  # R_t; R_t A and R_t^T A
            return square * self.overlap(unit) * (1 + gradient * (2 if any(unit) else 1))
        wide = math.prod(self.phases)
        if not any(unit):  # R; R B
            return square * wide * (1 + gradient)
        wave = self.groups * math.prod(self.periods) * self.rows * self.columns * wide
        return square * wide * (2 + 3 * gradient) + 2 * wave * (1 + gradient)  # cosine and sine, there and back

    def triton_work(self, form: str, unit: tuple[int, ...]) -> float:
        """`work` of the Triton kernels, which multiply half of G_0, because it is symmetric."""
        return self.work(form, unit) * (0.75 if form == "overlap" and not any(unit) else 1)

    def multiplications(self, form: str, gradient: bool = True) -> int:
        return sum(self.work(form, unit, gradient) for unit in self.units(form))
