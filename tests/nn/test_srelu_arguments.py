"""What SReLU and the join take: inputs with and without a batch, initial values, sizes; errors name the argument."""

from decimal import Decimal
from fractions import Fraction

import numpy
import pytest
import torch
from torch import nn

from isonet_fast import ResidualSReLU, SharedScale, SReLU, functional, reference

BEFORE = {  # the layer before, and an unbatched input of it
    0: (lambda c: nn.Linear(4, c), (4,)),
    1: (lambda c: nn.Conv1d(4, c, 3), (4, 7)),
    2: (lambda c: nn.Conv2d(4, c, 3), (4, 7, 6)),
    3: (lambda c: nn.Conv3d(4, c, 3), (4, 5, 7, 6)),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("channels", [3, 4, 5])  # as long as other axes, too
@pytest.mark.parametrize("dims", BEFORE)
def test_with_spatial_dims_every_input_is_understood(dims, channels, inplace):
    """Batches of every size, and none, behind any layer; joins too."""
    make, shape = BEFORE[dims]
    layer, x = make(channels), torch.randn(channels, *shape)
    srelu, join = (cls(channels, inplace=inplace, spatial_dims=dims) for cls in (SReLU, ResidualSReLU))
    with torch.no_grad():
        for activation in (srelu, join):
            activation.srelu_bias.copy_(torch.randn(1, channels, 1, 1))
    batched = srelu(layer(x))
    assert torch.equal(batched, reference.srelu(layer(x), srelu.srelu_bias))
    y = torch.stack([srelu(layer(one)) for one in x])
    torch.testing.assert_close(y, batched, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        torch.stack([join(one, layer(piece)) for one, piece in zip(layer(x).flip(0), x)]),
        reference.residual_srelu(layer(x).flip(0), layer(x), join.srelu_bias),
        rtol=1e-5,
        atol=1e-6,
    )
    parameters = [*layer.parameters(), srelu.srelu_bias]
    want = torch.autograd.grad(batched.square().sum(), parameters)
    for got, expected in zip(torch.autograd.grad(y.square().sum(), parameters), want):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_without_spatial_dims_an_image_is_understood_unless_it_may_be_a_sequence():
    layer = SReLU(5)
    image = torch.randn(5, 6, 7)
    assert torch.equal(layer(image), layer(image[None])[0])
    assert torch.equal(layer(image[:, 0, 0]), layer(image[None, :, 0, 0])[0])
    sequence = torch.randn(3, 5, 7)
    assert torch.equal(layer(sequence), reference.srelu(sequence, layer.srelu_bias))
    kept = (either := torch.randn(5, 5, 7)).clone()
    message = r"\(5, 5, 7\) may be \(N, C, L\) or an unbatched \(C, H, W\).*spatial_dims=1 or spatial_dims=2"
    for refuse in (layer, SReLU(5, inplace=True), lambda x: ResidualSReLU(5)(x, x)):
        with pytest.raises(ValueError, match=message):
            refuse(either)
    assert torch.equal(either, kept)


@pytest.mark.parametrize(
    ("dims", "shape", "message"),
    [
        (None, (), r"x must be \(N, C, ...\), at least two dimensions"),
        (None, (2, 4, 7), r"4 channels of x, got shape \(1, 5, 1, 1\)"),
        (None, (5, 3), r"3 channels of x, got shape \(1, 5, 1, 1\)"),
        (None, (5, 3, 3, 3), r"3 channels of x"),
        (None, (4,), r"4 channels of x"),
        (0, (2, 5, 7), r"x must be \(N, C\) or \(C,\), got shape \(2, 5, 7\)"),
        (1, (2, 5, 7, 7), r"x must be \(N, C, L\) or \(C, L\), got shape"),
        (2, (2, 5), r"x must be \(N, C, H, W\) or \(C, H, W\), got shape \(2, 5\)"),
        (2, (2, 5, 7), r"2 channels of x"),
        (3, (2, 5, 7), r"x must be \(N, C, D, H, W\) or \(C, D, H, W\)"),
    ],
)
def test_another_shape_is_refused(dims, shape, message):
    with pytest.raises(ValueError, match=message):
        SReLU(5, spatial_dims=dims)(torch.zeros(shape))


@pytest.mark.parametrize(
    "init",
    [-1, numpy.float32(-1), numpy.int64(-1), torch.tensor(-1), torch.tensor([-1.0]), Fraction(-1), Decimal(-1)],
    ids=lambda v: type(v).__name__,
)
def test_initial_values_of_any_kind(init):
    for value, shape in ((SReLU(8, init).srelu_bias, (1, 8, 1, 1)), (SharedScale(init).scale, (1, 1, 1, 1))):
        assert value.dtype == torch.float32 and value.shape == shape and value.eq(-1).all() and value.requires_grad
    assert ResidualSReLU(2, init, dtype=torch.float64).srelu_bias.tolist() == [[[[-1.0]], [[-1.0]]]]


def test_an_infinite_initial_value_lets_everything_pass():
    x = torch.randn(2, 3, 4)
    assert torch.equal(SReLU(3, -float("inf"))(x), x)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SReLU(8, "1"), TypeError, "init must be a real number, got '1'"),
        (lambda: SReLU(8, None), TypeError, "init must be a real number, got None"),
        (lambda: SReLU(8, 1j), TypeError, "init must be a real number, got 1j"),
        (lambda: SReLU(8, True), TypeError, "init must be a real number, got True"),
        (lambda: SReLU(8, torch.zeros(2)), TypeError, "init must be a real number"),
        (lambda: SReLU(8, 10**400), ValueError, "init must be a number that a float can hold"),
        (lambda: SReLU(8, 10**5000), ValueError, "init must be a number that a float can hold"),
        (lambda: SReLU(8, float("nan")), ValueError, "init must be a number, got NaN"),
        (lambda: SharedScale([1]), TypeError, r"init must be a real number, got \[1\]"),
        (lambda: SReLU("8"), ValueError, "num_channels must be a positive int, got '8'"),
        (lambda: SReLU(0), ValueError, "num_channels must be a positive int, got 0"),
        (lambda: SReLU(2.5), ValueError, "num_channels must be a positive int, got 2.5"),
        (lambda: SReLU(torch.ones(2)), ValueError, "num_channels must be a positive int, got tensor"),
        (lambda: SReLU(2**63), ValueError, r"num_channels must be below 2\*\*63"),
        (lambda: SReLU(10**5000), ValueError, r"num_channels must be below 2\*\*63"),
        (lambda: SReLU(8, torch.nested.nested_tensor([torch.ones(1)])), TypeError, "init must be a real number"),
        (lambda: ResidualSReLU(None), ValueError, "num_channels must be a positive int, got None"),
        (lambda: SReLU(8, spatial_dims=4), ValueError, "spatial_dims must be None, 0, 1, 2 or 3, got 4"),
        (lambda: SReLU(8, spatial_dims="2"), ValueError, "spatial_dims must be None, 0, 1, 2 or 3, got '2'"),
        (lambda: SReLU(8, spatial_dims=[2]), ValueError, r"spatial_dims must be None, 0, 1, 2 or 3, got \[2\]"),
        (lambda: SReLU(8, dtype=torch.int32), TypeError, "dtype must be one of float32, .*, got torch.int32"),
        (lambda: SharedScale(dtype=torch.cfloat), TypeError, "dtype must be one of float32, .*, got torch.complex64"),
    ],
)
def test_constructors_name_the_argument(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_sizes_may_be_numpy_integers():
    assert SReLU(numpy.int64(3)).srelu_bias.shape == (1, 3, 1, 1)
    assert SReLU(3, spatial_dims=numpy.int64(2))(torch.zeros(3, 4, 5)).shape == (3, 4, 5)


@pytest.mark.parametrize("value", [torch.ones(2), torch.ones(0, 2), numpy.zeros(2)], ids=repr)
def test_inplace_is_true_or_false(value):
    x, bias = torch.randn(2, 3, 4), torch.zeros(3)
    for call in (lambda: functional.srelu(x, bias, value), lambda: functional.residual_srelu(x, x, bias, None, value)):
        with pytest.raises(TypeError, match="^inplace must be True or False, got "):
            call()
    assert torch.equal(functional.srelu(x.clone(), bias, numpy.True_), functional.srelu(x, bias))
