"""How ranks share the work: the same units in all splits, at costs that are as even as they can be."""

import math

import pytest
import torch

from isonet_fast import OrthoConv2d, models, split_work
from isonet_fast.geometry import Layer


def layers_of(name):
    with torch.device("meta"):
        net = getattr(models, name)()
    convolutions = [m for m in net.modules() if isinstance(m, OrthoConv2d)]
    return tuple(Layer(tuple(m.weight.shape), m.stride, m.dilation, m.groups, "isonet") for m in convolutions)


def split(layers, ranks):
    forms = [layer.triton_form for layer in layers]
    return forms, [split_work.split_work(layers, rank, ranks, forms, triton=True) for rank in range(ranks)]


def touched(layers, shares):
    return sum(math.prod(one.shape) for share in shares for one, units in zip(layers, share, strict=True) if units)


def costs(layers, forms, shares):
    """Of each rank, counted from its units."""
    return [
        sum(
            split_work.TOUCH * math.prod(one.shape) + sum(one.triton_work(form, unit) for unit in units)
            for one, form, units in zip(layers, forms, share, strict=True)
            if units
        )
        for share in shares
    ]


MIXED = (
    Layer((64, 64, 5, 5), (1, 1), (1, 1), 1, "isonet"),
    Layer((128, 64, 3, 3), (2, 2), (1, 1), 2, "lorth"),
    Layer((40, 10), (), (), 1, "matrix"),
)


@pytest.mark.parametrize("ranks", [2, 3, 8, 40])
@pytest.mark.parametrize("layers", [MIXED, MIXED[1:2], layers_of("isonet34"), layers_of("isonet50")], ids=len)
def test_every_unit_is_on_one_rank_of_those_with_triton(layers, ranks):
    forms, shares = split(layers, ranks)
    for n, (one, form) in enumerate(zip(layers, forms, strict=True)):
        assert sorted(unit for share in shares for unit in share[n]) == sorted(one.units(form))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["isonet18", "isonet34", "isonet50", "isonet101"])
def test_few_ranks_touch_a_layer_and_all_cost_the_same(name, ranks, monkeypatch):
    layers = layers_of(name)
    forms, shares = split(layers, ranks)
    most = costs(layers, forms, shares)
    assert max(most) <= 1.06 * sum(most) / ranks
    monkeypatch.setattr(split_work, "_layer_by_layer", split_work._unit_by_unit)
    _, unit_by_unit = split(layers, ranks)
    assert touched(layers, shares) < 0.9 * touched(layers, unit_by_unit)
    assert max(most) < max(costs(layers, forms, unit_by_unit))


def test_no_layer_is_more_than_its_part_of_a_share():
    """Unless it is one unit, which can't be shared."""
    layers = layers_of("isonet50")
    forms, shares = split(layers, 8)
    capacity = max(costs(layers, forms, shares))
    for share in shares:
        for one, form, units in zip(layers, forms, share, strict=True):
            cost = split_work.TOUCH * math.prod(one.shape) + sum(one.triton_work(form, unit) for unit in units)
            assert len(units) <= 1 or cost <= 1.002 * split_work.MOST * capacity
