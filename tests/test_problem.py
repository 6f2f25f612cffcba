"""A problem: its text, the one object for equal problems, the tables that it keeps, and the rules of the penalties."""

import json

import pytest
import torch

from isonet_fast import functional, geometry, reference
from isonet_fast.geometry import Layer, Rule
from isonet_fast.problem import Problem, read

LAYERS = (
    Layer((8, 4, 3, 3), (2, 1), (1, 3), 2, "lorth"),
    Layer((6, 5), (), (), 1, "isonet"),
    Layer((6, 5, 4), (3,), (2,), 1, "matrix"),
)


@pytest.mark.parametrize("precision", [None, "highest"])
def test_the_text_is_json_and_gives_the_problem_back(precision):
    coefficients = 0.1 + 0.2, 1e-300, 3.0
    problem = Problem(LAYERS, coefficients, precision, (2, 5))
    assert json.loads(problem.text)["share"] == [2, 5]
    again = read(problem.text, tuple(layer.shape for layer in LAYERS))
    assert (again.layers, again.coefficients) == (LAYERS, coefficients)
    assert (again.precision, again.share, again.text) == (precision, (2, 5), problem.text)


def test_equal_problems_are_one_object_that_keeps_its_tables():
    problem, equal = (Problem(LAYERS, (1.0, 2.0, 3.0)) for _ in range(2))
    assert problem.unique is equal.unique is read(problem.text, tuple(layer.shape for layer in LAYERS))
    other = [Problem(LAYERS, (1.0, 2.0, 4.0)), Problem(LAYERS, (1.0, 2.0, 3.0), "highest")]
    other += [Problem(LAYERS, (1.0, 2.0, 3.0), None, (0, 2)), Problem(LAYERS[::-1], (1.0, 2.0, 3.0))]
    assert len({id(p.unique) for p in (problem, *other)}) == 5
    weights = [torch.randn(layer.shape) for layer in LAYERS]
    geometry_of = dict(stride=[(2, 1), 1, 3], dilation=[(1, 3), 1, 2], groups=[2, 1, 1])
    functional.orthogonality_loss(weights, **geometry_of)
    found = [Layer(layer.shape, layer.stride, layer.dilation, layer.groups, "isonet") for layer in LAYERS]
    tables = Problem(tuple(found), (1.0,) * 3).unique.tables
    before = dict(tables)
    functional.orthogonality_loss(weights, **geometry_of)
    assert tables.keys() == before.keys() and all(tables[key] is before[key] for key in tables)


def test_an_unknown_penalty_raises_everywhere():
    weight = torch.randn(4, 4, 3, 3)
    layer = Layer((4, 4, 3, 3), (1, 1), (1, 1), 1, "spectral")
    for ask in (
        lambda: reference.orthogonality_loss(weight, penalty="spectral"),
        lambda: reference.orthogonality_loss([], penalty="spectral"),
        lambda: functional.orthogonality_loss(weight, penalty="spectral"),
        lambda: torch.ops.isonet_fast.orthogonality_loss([weight], Problem((layer,), (1.0,)).text, False),
        *(lambda name=name: getattr(layer, name) for name in ("rows", "columns", "constant", "offsets", "taps")),
    ):
        with pytest.raises(ValueError, match="penalty must be .*'isonet', 'lorth'.*, got 'spectral'"):
            ask()


def test_a_penalty_is_a_row_of_the_table_of_rules(monkeypatch):
    """Rows of outputs without the constant: "lorth" plus what "lorth" subtracts."""
    monkeypatch.setitem(geometry.PENALTIES, "outputs", Rule(rows_are_outputs=True))
    for shape, stride, constant in (
        ((40, 4, 3, 3), 2, 12),
        ((6, 4, 3, 3), 2, 0),
        ((150, 4, 3, 3), 2, 67),
        ((40, 4, 3, 3), 1, 18),
        ((4, 6, 3, 3), 1, 0),
    ):
        weight = torch.randn(shape)
        got = functional.orthogonality_loss(weight, stride=stride, penalty="outputs")
        lorth = functional.orthogonality_loss(weight, stride=stride, penalty="lorth")
        torch.testing.assert_close(got, lorth + constant)
        problem = Problem((Layer(shape, (stride,) * 2, (1, 1), 1, "outputs"),), (1.0,))
        assert problem.by_precision[0][1].precision == ("highest" if constant else None)  # its R does not vanish
