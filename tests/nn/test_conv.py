"""OrthoConv1d-3d and OrthoLinear: their torch.nn parent in everything, plus delta initialisation and a penalty."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear, SReLU, reference

DOUBLE = torch.float64
PARENTS = {OrthoConv1d: nn.Conv1d, OrthoConv2d: nn.Conv2d, OrthoConv3d: nn.Conv3d, OrthoLinear: nn.Linear}
CONVOLUTIONS = {OrthoConv1d: 1, OrthoConv2d: 2, OrthoConv3d: 3}
# a value that differs from the default, for every argument of the parents
CONV_ARGUMENTS = {
    "in_channels": 4,
    "out_channels": 8,
    "kernel_size": 3,
    "stride": 2,
    "padding": 1,
    "dilation": 2,
    "groups": 2,
    "bias": False,
    "padding_mode": "circular",
    "device": "cpu",
    "dtype": DOUBLE,
}
LINEAR_ARGUMENTS = {"in_features": 4, "out_features": 6, "bias": False, "device": "cpu", "dtype": DOUBLE}

every_layer = pytest.mark.parametrize("ours", PARENTS)
every_convolution = pytest.mark.parametrize("ours", CONVOLUTIONS)


def build(cls, **changes):
    if issubclass(cls, nn.Linear):
        return cls(6, 4, **changes)
    return cls(6, 4, 3, **changes)


def example(layer, batch=2):
    """An input that the layer takes, in the layer's dtype and device."""
    if isinstance(layer, nn.Linear):
        shape = (batch, layer.in_features)
    else:
        shape = (batch, layer.in_channels, *[7] * len(layer.kernel_size))
    return torch.randn(shape, dtype=layer.weight.dtype).to(layer.weight.device)


def randomise(layer):
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.3)
    return layer


@every_layer
def test_every_argument_of_the_parent_by_name_and_by_position(ours):
    parent = PARENTS[ours]
    arguments = LINEAR_ARGUMENTS if parent is nn.Linear else CONV_ARGUMENTS
    assert list(inspect.signature(parent).parameters) == list(arguments), "torch has another argument: test it"
    by_name, by_position = ours(**arguments), ours(*arguments.values())
    theirs = parent(**arguments)
    for layer in (by_name, by_position):
        for name in ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"):
            if hasattr(theirs, name):
                assert getattr(layer, name) == getattr(theirs, name), name
        assert layer.bias is None
        assert layer.weight.dtype == DOUBLE
        x = example(layer)
        randomise(layer)
        theirs.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), theirs(x))


@every_layer
def test_signature_is_the_parents_and_penalty(ours):
    own, parent = (inspect.signature(cls).parameters for cls in (ours, PARENTS[ours]))
    assert [*parent, "penalty"] == list(own)
    assert all(own[name].default == parent[name].default for name in parent)
    assert own["penalty"].kind is inspect.Parameter.KEYWORD_ONLY and own["penalty"].default == "isonet"


@every_layer
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_both_ways(ours, bias):
    layer, theirs = randomise(build(ours, bias=bias)), build(PARENTS[ours], bias=bias)
    assert list(layer.state_dict()) == list(theirs.state_dict())
    x = example(layer)
    theirs.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), theirs(x))
    theirs = randomise(theirs)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(layer(x), theirs(x))


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(ours, copied):
    layer = randomise(build(ours, penalty="lorth"))
    other, x = copied(layer), example(layer)
    assert type(other) is ours and other.penalty == "lorth"
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.weight.zero_()
    assert layer.weight.any()


@every_layer
def test_moves_keep_the_penalty(ours):
    layer = randomise(build(ours, penalty="matrix"))
    value = layer.orthogonality_loss().item()
    assert layer.double().orthogonality_loss().item() == pytest.approx(value, rel=1e-5)
    assert layer.weight.dtype == DOUBLE
    rounded = layer.to(torch.bfloat16).weight
    expected = reference.orthogonality_loss(rounded.double(), penalty="matrix").item()
    half = layer.orthogonality_loss()
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected, rel=1e-5)
    layer.to("meta")
    assert layer.weight.is_meta and layer.orthogonality_loss().is_meta and layer(example(layer)).is_meta


@every_layer
def test_meta_then_to_empty_then_reset_is_the_initial_layer(ours):
    layer = build(ours, device="meta")
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    for got, expected in zip(layer.parameters(), build(ours).parameters(), strict=True):
        assert torch.equal(got, expected)


@every_layer
@pytest.mark.parametrize("penalty", ["isonet", "lorth", "matrix", None])
def test_repr_is_the_parents_with_the_penalty(ours, penalty):
    inside = repr(build(PARENTS[ours])).removeprefix(PARENTS[ours].__name__)[1:-1]
    assert repr(build(ours, penalty=penalty)) == f"{ours.__name__}({inside}, penalty={penalty!r})"


@every_layer
@pytest.mark.parametrize("penalty", ["ISONET", "", 1, True, np.array([1, 2])], ids=repr)
def test_an_unknown_penalty_is_refused(ours, penalty):
    with pytest.raises(ValueError, match=r"penalty must be one of .*isonet.*lorth.*matrix.* got ") as raised:
        build(ours, penalty=penalty)
    assert repr(penalty) in str(raised.value)


@every_layer
def test_starts_as_a_delta_without_bias_and_without_random_numbers(ours):
    state = torch.get_rng_state()
    layer = build(ours)
    assert torch.equal(torch.get_rng_state(), state)
    expected = torch.empty_like(layer.weight)
    nn.init.dirac_(expected) if expected.dim() > 2 else nn.init.eye_(expected)
    assert torch.equal(layer.weight, expected)
    assert not layer.bias.any()
    randomise(layer).reset_parameters()
    assert torch.equal(layer.weight, expected) and not layer.bias.any()


def test_starts_as_the_identity_function():
    x = torch.randn(2, 5, 6, 7)
    assert torch.equal(OrthoConv2d(5, 5, 3, padding=1)(x), x)
    x = torch.randn(3, 5)
    assert torch.equal(OrthoLinear(5, 5)(x), x)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (2, 2), (4, 2), (2, 3), (3, 2), ((2, 1), (1, 2))])
def test_lorth_starts_at_the_minimum_of_its_penalty(stride, dilation, groups):
    layer = OrthoConv2d(
        4, 32, 3, stride, 2, dilation, groups, bias=False, penalty="lorth", dtype=DOUBLE
    )  # more outputs than inputs: other taps of the stride cell are used as far as they reach other pixels
    assert layer.orthogonality_loss().item() == 0


def test_lorth_keeps_the_energy_of_a_strided_layer_and_isonet_starts_as_the_published_network():
    x = F.pad(torch.randn(1, 4, 10, 10, dtype=DOUBLE), (1, 1, 1, 1))
    arguments = {"stride": 2, "padding": 1, "bias": False, "dtype": DOUBLE}
    assert OrthoConv2d(4, 16, 3, penalty="lorth", **arguments)(x).square().sum() == x.square().sum()
    published = OrthoConv2d(4, 16, 3, penalty="isonet", **arguments)
    assert torch.equal(published.weight, nn.init.dirac_(torch.empty(16, 4, 3, 3, dtype=DOUBLE)))


@every_convolution
@pytest.mark.parametrize("penalty", ["isonet", "lorth", "matrix"])
@pytest.mark.parametrize("arguments", [{}, {"stride": 2}, {"stride": 2, "dilation": 2}, {"groups": 2}])
def test_penalty_of_the_layer_is_the_references(ours, penalty, arguments, device):
    layer = randomise(ours(4, 8, 3, penalty=penalty, dtype=DOUBLE, **arguments)).to(device)
    value = layer.orthogonality_loss()
    value.backward()
    weight = layer.weight.detach().cpu().clone().requires_grad_()
    expected = reference.orthogonality_loss(weight, penalty=penalty, **arguments)
    expected.backward()
    torch.testing.assert_close(value.detach().cpu(), expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.weight.grad.cpu(), weight.grad, rtol=1e-12, atol=1e-12)
    assert layer.bias.grad is None


def test_penalty_reads_a_stride_and_a_dilation_per_dimension():
    layer = randomise(OrthoConv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 3), dtype=DOUBLE))
    expected = reference.orthogonality_loss(layer.weight, stride=(2, 1), dilation=(1, 3))
    torch.testing.assert_close(layer.orthogonality_loss(), expected, rtol=1e-12, atol=0)
    swapped = reference.orthogonality_loss(layer.weight, stride=(1, 2), dilation=(3, 1))
    assert abs(swapped - expected) > 1e-3 * expected  # the case can tell the dimensions apart


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_linear_penalty_is_the_smaller_gram(shape):
    layer = randomise(OrthoLinear(*shape, dtype=DOUBLE))
    weight = layer.weight if shape[1] <= shape[0] else layer.weight.T
    expected = 0.5 * (weight @ weight.T - torch.eye(4, dtype=DOUBLE)).square().sum()
    torch.testing.assert_close(layer.orthogonality_loss(), expected, rtol=1e-12, atol=0)


def test_penalty_none_is_never_penalised():
    layer = randomise(OrthoConv2d(4, 8, 3, penalty=None, dtype=DOUBLE))
    assert layer.orthogonality_loss().item() == 0 and layer.orthogonality_loss().dtype == DOUBLE


def test_other_arguments_than_the_parents_are_refused():
    with pytest.raises(TypeError, match="strides"):
        OrthoConv2d(3, 4, 3, strides=2)


@every_convolution
def test_functional_call_reads_the_given_weight(ours):
    layer = build(ours, dtype=DOUBLE)
    given = {name: torch.randn_like(p, requires_grad=True) for name, p in layer.named_parameters()}
    x = example(layer)
    theirs = build(PARENTS[ours], dtype=DOUBLE)
    theirs.load_state_dict(given)
    assert torch.equal(torch.func.functional_call(layer, given, (x,)), theirs(x))

    class Penalty(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self):
            return self.layer.orthogonality_loss()

    value = torch.func.functional_call(Penalty(), {f"layer.{n}": p for n, p in given.items()}, ())
    expected = reference.orthogonality_loss(given["weight"])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (grad,), (expected_grad,) = (torch.autograd.grad(v, given["weight"]) for v in (value, expected))
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ours", [OrthoConv2d, OrthoLinear])
def test_compiles_as_one_graph_with_its_penalty(ours):
    layer, relu = randomise(build(ours, dtype=DOUBLE)), SReLU(4, dtype=DOUBLE)
    x = example(layer).requires_grad_()

    def step(x):
        return relu(layer(x)).square().mean() + 0.1 * layer.orthogonality_loss()

    inputs = [x, *layer.parameters(), *relu.parameters()]
    expected = step(x)
    expected_grads = torch.autograd.grad(expected, inputs)
    value = torch.compile(step, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for got, want in zip(torch.autograd.grad(value, inputs), expected_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_subclass_keeps_its_own_constructor():
    class Square(OrthoConv2d):
        def __init__(self, channels, **kwargs):
            super().__init__(channels, channels, 3, padding=1, **kwargs)

    assert list(inspect.signature(Square).parameters) == ["channels", "kwargs"]
    assert Square(4, penalty="matrix").penalty == "matrix"
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(Square(4)(x), x)
