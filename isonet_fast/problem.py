"""Describes the penalty of a list of weights, in one form from `OrthoRegularizer` to the kernels' tables.

A `Problem` says everything but the values of the weights. Ops take its text, because an operator's schema has no room
for an object; `read` gives the object back. Code that computes a problem keeps its tables in the problem, so they
live as long as it does.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from typing import Any

from .geometry import Layer, Precision
from .split_work import split_work


class Problem:
    """coefficients[l] * penalty of layers[l], summed over the layers.

    precision: None or "highest", as for `functional.orthogonality_loss`.
    share: (rank, ranks), which part of the work is computed.
    tables: what has been prepared for this problem, by device or by purpose.
    """

    layers: tuple[Layer, ...]
    coefficients: tuple[float, ...]
    precision: Precision | None
    share: tuple[int, int]

    def __init__(
        self,
        layers: tuple[Layer, ...],
        coefficients: tuple[float, ...],
        precision: Precision | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        self.layers, self.coefficients, self.precision, self.share = layers, coefficients, precision, share
        self.tables: dict[Hashable, Any] = {}
        # torch.compile traces this class, but no functools.cached_property
        self._text: str | None = None
        self._unique: Problem | None = None
        self._units: dict[tuple[tuple[str, ...], bool], tuple[tuple[tuple[int, ...], ...], ...]] = {}
        self._by_precision: list[tuple[list[int], Problem]] | None = None

    @property
    def text(self) -> str:
        """Everything but the shapes of the weights, as JSON; written by hand, since torch.compile traces no json."""
        if self._text is None:
            layers = [
                f'[[{_numbers(layer.stride)}], [{_numbers(layer.dilation)}], {layer.groups}, "{layer.penalty}", {c!r}]'
                for layer, c in zip(self.layers, self.coefficients, strict=True)
            ]
            precision = f'"{self.precision}"' if self.precision else "null"
            head = f'{{"precision": {precision}, "share": [{_numbers(self.share)}], "layers": ['
            self._text = head + ", ".join(layers) + "]}"
        return self._text

    @property
    def unique(self) -> Problem:
        """The one object that stands for all equal problems, so that tables are made once."""
        if self._unique is None:
            self._unique = read(self.text, tuple([layer.shape for layer in self.layers]))
        return self._unique

    def units(self, forms: tuple[str, ...], triton: bool = False) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The units of each layer that this rank computes, if every layer is computed in this form.

        triton: whether ranks have the Triton kernels.
        """
        key = forms, triton
        if key not in self._units:
            self._units[key] = split_work(self.layers, *self.share, *key)
        return self._units[key]

    @property
    def by_precision(self) -> list[tuple[list[int], Problem]]:
        """What is computed together: indices into the layers, and their problem.

        The default precision suits residuals that vanish at the optimum. Where there are more rows than the operator
        has columns ("lorth") they don't: R tends to a projector of size 1 whose product with A cancels, and in bf16 the
        gradient would be noise. Those layers (mostly a network's first) take float32.
        """
        if self._by_precision is None:
            everything = list(range(len(self.layers)))
            tall = [] if self.precision else [n for n in everything if self.layers[n].excess]
            rest = [n for n in everything if n not in tall]
            if tall:
                split = [(rest, self._restricted(rest, None)), (tall, self._restricted(tall, "highest"))]
                self._by_precision = [(members, problem) for members, problem in split if members]
            else:
                self._by_precision = [(everything, self)]
        return self._by_precision

    def _restricted(self, members: list[int], precision: Precision | None) -> Problem:
        layers = tuple([self.layers[n] for n in members])
        return Problem(layers, tuple([self.coefficients[n] for n in members]), precision, self.share)


@functools.lru_cache(maxsize=64)
def read(text: str, shapes: tuple[tuple[int, ...], ...]) -> Problem:
    """The problem of this `Problem.text`, for weights of these shapes. Equal arguments give the same object."""
    fields = json.loads(text)
    layers = [
        Layer(tuple(shape), tuple(stride), tuple(dilation), groups, penalty)
        for shape, (stride, dilation, groups, penalty, _) in zip(shapes, fields["layers"], strict=True)
    ]
    coefficients = [coefficient for *_, coefficient in fields["layers"]]
    rank, ranks = fields["share"]
    return Problem(tuple(layers), tuple(coefficients), fields["precision"], (rank, ranks))


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
