"""Which units of which layers each rank computes where ranks share the work, from shapes alone.

Every rank finds the same split, without communication. On the CPU a unit costs its multiplications, and ranks come out
even. The Triton kernels on a rank must also pack every layer that it has a unit of, and write that layer's gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .geometry import Layer

Unit = tuple[int, ...]

# What packing an element of a weight and writing its gradient cost a rank with the Triton kernels, in multiplications,
# as tools/schedule.py predicts: 8 + 4 bytes at 4.4 TB/s, and a gradient tile's 2 microseconds per 128 x 256 elements.
TOUCH = 600
# So much of a rank's share may be one layer, for beside long tiles there should be short ones. Chosen by the same
# predictions for the published networks on 2 to 16 ranks.
MOST = 0.85


class LayerCost(NamedTuple):
    """Of one layer, in multiplications."""

    touch: float  # once on every rank that has a unit of it
    units: dict[Unit, float]

    @property
    def whole(self) -> float:
        return self.touch + sum(self.units.values())


class Deal:
    """What each rank has: its cost so far, and its units of each layer."""

    def __init__(self, costs: Sequence[LayerCost], count: int) -> None:
        self.costs = costs
        self.load = [0.0] * count
        self.units: list[list[list[Unit]]] = [[[] for _ in costs] for _ in range(count)]

    def load_with(self, rank: int, n: int, unit: Unit) -> float:
        return self.load[rank] + self.costs[n].units[unit] + (0 if self.units[rank][n] else self.costs[n].touch)

    def give(self, rank: int, n: int, unit: Unit) -> None:
        self.load[rank] = self.load_with(rank, n, unit)
        self.units[rank][n].append(unit)


def split_work(
    layers: tuple[Layer, ...], index: int, count: int, forms: Sequence[str] | None = None, triton: bool = False
) -> tuple[tuple[Unit, ...], ...]:
    """The units of each layer that rank `index` of `count` computes, balanced by what they cost.

    `split_work(layers, 0, 1)` is everything. Without `forms` units are offsets. triton: whether ranks have the Triton
    kernels.
    """
    forms = forms or ["overlap"] * len(layers)
    if count == 1:
        return tuple(layer.units(form) for layer, form in zip(layers, forms, strict=True))
    work, per_element = (Layer.triton_work, TOUCH) if triton else (Layer.work, 0)
    costs = [
        LayerCost(per_element * math.prod(layer.shape), {unit: work(layer, form, unit) for unit in layer.units(form)})
        for layer, form in zip(layers, forms, strict=True)
    ]
    deal = _unit_by_unit(costs, count)
    if triton:
        deal = min(deal, _layer_by_layer(costs, count), key=lambda deal: max(deal.load))
    return tuple(tuple(sorted(units)) for units in deal.units[index])


def _unit_by_unit(costs: Sequence[LayerCost], count: int) -> Deal:
    """Each unit goes to the rank that then has the least cost, the one with the most multiplications first."""
    deal = Deal(costs, count)
    units = sorted((-work, n, unit) for n, cost in enumerate(costs) for unit, work in cost.units.items())
    for _, n, unit in units:
        deal.give(min(range(count), key=lambda rank: deal.load_with(rank, n, unit)), n, unit)
    return deal


def _layer_by_layer(costs: Sequence[LayerCost], count: int) -> Deal:
    """Few ranks touch a layer: each takes of it what fits its capacity. The capacity is the least that is enough for
    all, found by bisection, as in the heuristic MULTIFIT for bin packing."""
    total = sum(cost.whole for cost in costs)
    low, high = total / count, total / MOST  # one rank has room for everything
    deal = _fill(costs, count, high)
    while high > 1.001 * low:
        capacity = (low + high) / 2
        found = _fill(costs, count, capacity)
        low, high, deal = (low, capacity, found) if found else (capacity, high, deal)
    assert deal is not None
    return deal


def _fill(costs: Sequence[LayerCost], count: int, capacity: float) -> Deal | None:
    """The most expensive layer first, its units to the rank with the least cost, then what is left to the next one;
    None if some are left in the end."""
    deal = Deal(costs, count)
    for n in sorted(range(len(costs)), key=lambda n: (-costs[n].whole, n)):
        units = costs[n].units
        left = sorted(units, key=lambda unit: (-units[unit], unit))
        for rank in sorted(range(count), key=deal.load.__getitem__):
            most = min(capacity, deal.load[rank] + MOST * capacity)
            kept = []
            for unit in left:
                if deal.load_with(rank, n, unit) <= (most if deal.units[rank][n] else capacity):
                    deal.give(rank, n, unit)
                else:
                    kept.append(unit)
            if left and len(kept) == len(left):
                return None
            left = kept
        if left:
            return None
    return deal
