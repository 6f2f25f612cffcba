"""OrthoRegularizer's arguments: what each may be, what is refused, and a model with nothing to penalise."""

import re
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from isonet_fast import OrthoConv2d, OrthoRegularizer

from .regularized import by_reference, grads, network


@pytest.mark.parametrize("interval", [0, -1, 1.5, "2", None])
def test_interval_must_be_a_positive_int(interval):
    with pytest.raises(ValueError, match="interval must be a positive int, got " + repr(interval)):
        OrthoRegularizer(network(), interval=interval)


NOTHING = {
    "the model has no convolution or linear layer": nn.Sequential(nn.ReLU()),
    r"it leaves out the model itself \(linear, not in include\)": nn.Linear(3, 3),
    r"'up' \(transposed, not in include\)": nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3)}),
    r"'a', 'b' \(filter official_filter\); 'c' \(penalty=None\)": nn.ModuleDict(
        {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 7), "c": OrthoConv2d(4, 4, 3, penalty=None)}
    ),
    r"'0', '1', '2', '3', '4' and 4 more \(filter": nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(9)]),
}


@pytest.mark.parametrize("why", NOTHING)
def test_nothing_to_penalise_is_said_with_what_was_left_out_and_why(why):
    net = NOTHING[why]
    with pytest.warns(UserWarning, match="OrthoRegularizer has nothing to penalise: .*" + why) as caught:
        reg = OrthoRegularizer(net)
    assert caught[0].filename == __file__
    for _ in range(2):
        value = reg()
        assert value.item() == 0 and value.shape == ()
        value.backward()
    assert reg.accumulate_grad_().item() == 0
    assert reg.last.item() == 0
    assert all(row.excluded for row in reg.summary()) and "total" in str(reg.summary())
    assert not grads(net)


def test_a_users_filter_is_named_where_it_leaves_nothing():
    def only_heads(name, module):
        return "head" in name

    with pytest.warns(UserWarning, match=r"filter .*only_heads"):
        OrthoRegularizer(network(), filter=only_heads)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"penalty": "soft"}, ValueError, r"penalty must be one of .*or None.* got 'soft'"),
        ({"penalty": np.array(["lorth", "isonet"])}, ValueError, r"penalty must be one of .*got array"),
        ({"precision": "high"}, ValueError, r"precision must be one of .*'highest'.*got 'high'"),
        ({"filter": "conv"}, TypeError, r"filter must be callable\(name, module\) or None, got str"),
        ({"filter": lambda name: True}, TypeError, r"filter must take two arguments, \(name, module\), got .*\(name\)"),
        ({"filter": lambda *, name: True}, TypeError, r"filter must take two arguments"),
        (
            {"filter": lambda name, module: module.weight > 0},
            TypeError,
            "filter must return True or False, got a Tensor",
        ),
        ({"coeff": "1e-4"}, TypeError, r"coeff must be a number.* got '1e-4'"),
        ({"coeff": None}, TypeError, "coeff must be a number.* got None"),
        ({"coeff": 1e-4j}, TypeError, "coeff must be a number.* got 0.0001j"),
        ({"coeff": True}, TypeError, "coeff must be a number.* got True"),
        ({"coeff": torch.ones(2)}, TypeError, "coeff must be a number"),
        ({"coeff": torch.ones((), device="meta")}, TypeError, "coeff must be a number"),
        ({"coeff": lambda name, module: None}, TypeError, r"coeff must be a number or give one.* got None for '0'"),
        ({"coeff": lambda module: 1.0}, TypeError, r"coeff must take two arguments, \(name, module\)"),
        ({"coeff": float("nan")}, ValueError, "coeff must be finite and at least 0, got nan"),
        ({"coeff": float("inf")}, ValueError, "coeff must be finite and at least 0, got inf"),
        ({"coeff": 10**400}, ValueError, "coeff must be finite and at least 0, got inf"),
        ({"coeff": -1}, ValueError, "coeff must be finite and at least 0, got -1"),
        ({"coeff": lambda name, module: -0.5}, ValueError, "coeff must be finite.* got -0.5 for '0'"),
        ({"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        ({"model": OrthoConv2d}, TypeError, "model must be a torch.nn.Module, got type"),
        ({"include": "linear"}, TypeError, "include must be a class or a tuple of classes.* got 'linear'"),
        ({"include": (nn.Linear, nn.ReLU)}, TypeError, "include must be .*nn.Linear.*ReLU"),
        ({"interval": True}, ValueError, "interval must be a positive int, got True"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        OrthoRegularizer(**{"model": network()} | arguments)


@pytest.mark.parametrize(
    "number",
    [
        torch.tensor(0.5),
        torch.tensor([0.5], requires_grad=True),
        np.float32(0.5),
        np.array(0.5),
        Fraction(1, 2),
        Decimal("0.5"),
    ],
    ids=lambda number: type(number).__name__,
)
def test_coeff_may_be_a_number_of_any_kind(number):
    net = network()
    expected, *_ = by_reference(net, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for coeff in (number, lambda name, module: number):
            assert OrthoRegularizer(net, coeff)().item() == pytest.approx(expected.item(), rel=1e-12)
    assert OrthoRegularizer(net, 3)().item() == pytest.approx(6 * expected.item(), rel=1e-12)


def test_interval_may_be_an_integer_of_any_kind():
    for interval in (np.int64(2), torch.tensor(2)):
        assert OrthoRegularizer(network(), interval=interval).interval == 2


def test_what_a_filter_raises_says_about_which_layer_it_was_asked():
    with pytest.raises(AttributeError) as caught:
        OrthoRegularizer(network(), filter=lambda name, module: module.kernel_size == (3, 3))
    assert caught.value.__notes__ == ["raised by filter= of OrthoRegularizer, asked about '11', a OrthoLinear"]


def test_a_filter_may_return_what_is_true_or_false():
    """A match of a regular expression, None, a number, an array's bool."""
    answers = {"0": re.match("0", "0"), "2": np.bool_(True), "3": torch.tensor(True)}
    reg = OrthoRegularizer(network(), filter=lambda name, module: answers.get(name))
    assert [row.name for row in reg.summary() if not row.excluded] == ["0", "2", "3"]


@pytest.mark.parametrize("state", [{}, None, {"calls": "3"}, {"calls": -1}, {"calls": True}, [("calls", 3)]])
def test_a_state_of_something_else_is_refused(state):
    reg = OrthoRegularizer(network(), interval=2)
    with pytest.raises(ValueError, match=r'state must be what state_dict\(\) returned, \{"calls": N\}, got '):
        reg.load_state_dict(state)
    assert reg.state_dict() == {"calls": 0}
