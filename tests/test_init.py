"""Delta initialisation: torch's dirac_ at stride 1, other taps of the stride cell above it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isonet_fast import init, reference

DOUBLE = torch.float64


@pytest.mark.parametrize(
    "shape, groups",
    [
        ((8, 8, 3, 3), 1),
        ((16, 4, 3, 3), 1),
        ((4, 16, 3, 3), 1),
        ((12, 2, 3, 3), 6),
        ((12, 6, 3, 3), 3),
        ((6, 1, 3, 3), 6),
        ((8, 4, 1, 1), 1),
        ((5, 5, 2, 4), 1),  # even kernels: the tap right of the middle
        ((5, 7, 4, 3), 1),
        ((8, 4, 5), 1),
        ((8, 4, 2), 2),
        ((4, 4, 3, 3, 3), 1),
        ((6, 2, 1, 2, 3), 2),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE, torch.float16, torch.bfloat16])
def test_equals_dirac_at_stride_one(shape, groups, dtype, device):
    weight = torch.full(shape, 7.0, dtype=dtype, device=device)
    expected = nn.init.dirac_(torch.empty(shape), groups=groups)
    assert init.delta_(weight, groups) is weight
    assert torch.equal(weight.float().cpu(), expected)


@pytest.mark.parametrize("shape", [(4, 4), (4, 6), (6, 4)])
def test_a_linear_weight_becomes_the_identity(shape):
    assert torch.equal(init.delta_(torch.full(shape, 7.0)), torch.eye(*shape))


@pytest.mark.parametrize("make", [lambda w: w.to(memory_format=torch.channels_last), lambda w: w.transpose(2, 3)])
def test_delta_is_written_in_any_memory_format(make):
    weight = make(torch.full((8, 4, 3, 3), 7.0))
    init.delta_(weight)
    assert torch.equal(weight, nn.init.dirac_(torch.empty(8, 4, 3, 3)))


def test_a_parameter_keeps_requiring_grad_and_records_nothing():
    weight = nn.Parameter(torch.zeros(4, 4, 3, 3))
    init.delta_(weight, stride=2)
    assert weight.requires_grad and weight.grad_fn is None and weight.is_leaf


# shape, groups, stride, how many outputs of a group take part: I/g for each input phase that the taps reach
CELLS = [
    ((64, 16, 3, 3), 1, 2, 64),
    ((40, 16, 3, 3), 1, 2, 40),
    ((16, 16, 3, 3), 1, 2, 16),
    ((4, 16, 3, 3), 1, 2, 4),
    ((80, 16, 3, 3), 1, 2, 64),
    ((32, 4, 3, 3), 2, 2, 16),
    ((64, 16, 1, 1), 1, 2, 16),
    ((64, 4, 3, 3), 1, 4, 36),
    ((16, 4, 2, 2), 1, 2, 16),
    ((40, 4, 4, 4), 1, 3, 36),
    ((40, 4, 5, 5), 1, 3, 36),
    ((16, 4, 3, 3), 1, (2, 1), 8),
    ((16, 4, 3, 3), 1, (1, 2), 8),
    ((12, 4, 4), 1, 2, 8),
    ((12, 2, 5), 2, 3, 6),
    ((36, 4, 3, 3, 3), 1, 2, 32),
]


@pytest.mark.parametrize("shape, groups, stride, taking_part", CELLS)
def test_stride_takes_other_taps_of_the_cell(shape, groups, stride, taking_part):
    """Each output copies one input through one tap; within a group no two of them read the same input pixel."""
    weight = init.delta_(torch.empty(shape, dtype=DOUBLE), groups, stride)
    strides = (stride,) * (len(shape) - 2) if isinstance(stride, int) else stride
    inputs = shape[1]
    for group in weight.chunk(groups):
        assert group.flatten(1).sum(1).tolist() == [1] * taking_part + [0] * (len(group) - taking_part)
        assert group.eq(1).sum() == taking_part
        places = [row.nonzero()[0].tolist() for row in group[:taking_part]]
        assert [place[0] for place in places] == [n % inputs for n in range(taking_part)]
        middle = [k // 2 for k in shape[2:]]
        assert all(place[1:] == middle for place in places[:inputs])
        phases = {(place[0], *(t % s for t, s in zip(place[1:], strides))) for place in places}
        assert len(phases) == taking_part
    assert reference.orthogonality_loss(weight, stride=stride, groups=groups, penalty="lorth") == 0


def test_a_strided_widening_layer_keeps_all_energy():
    """16 -> 64 at stride 2: every pixel in the interior of an image arrives once, and only there."""
    weight = init.delta_(torch.empty(64, 16, 3, 3, dtype=DOUBLE), stride=2)
    assert reference.orthogonality_loss(weight, stride=2, penalty="lorth") == 0
    x = F.pad(torch.randn(2, 16, 11, 12, dtype=DOUBLE), (1, 1, 1, 1))
    y = F.conv2d(x, weight, stride=2, padding=1)
    assert torch.equal(y.flatten().sort().values, F.pad(x, (0, 0, 0, 1)).flatten().sort().values)
    torch.testing.assert_close(y.square().sum(), x.square().sum(), rtol=1e-14, atol=0)
    dirac = F.conv2d(x, nn.init.dirac_(torch.empty_like(weight)), stride=2, padding=1)
    assert dirac.square().sum() < 0.3 * x.square().sum()  # a quarter: the case can tell


def test_adjoint_gives_the_input_back():
    weight = init.delta_(torch.empty(64, 16, 3, 3, dtype=DOUBLE), stride=2)
    x = F.pad(torch.randn(1, 16, 6, 6, dtype=DOUBLE), (1, 1, 1, 1))
    y = F.conv2d(x, weight, stride=2, padding=1)
    assert torch.equal(F.conv_transpose2d(y, weight, stride=2, padding=1, output_padding=1), x)


def test_every_value_is_overwritten_also_of_nan():
    weight = init.delta_(torch.full((4, 4, 3, 3), float("nan")), stride=2)
    assert weight.sum() == 4 and sorted(set(weight.flatten().tolist())) == [0, 1]


@pytest.mark.parametrize(
    "weight, arguments, error, message",
    [
        (torch.zeros(4), {}, ValueError, r"0 to 3 kernel dimensions, got shape \(4,\)"),
        (torch.zeros(2, 2, 1, 1, 1, 1), {}, ValueError, r"0 to 3 kernel dimensions, got shape \(2, 2, 1, 1, 1, 1\)"),
        (torch.zeros(4, 4, 3, dtype=torch.int64), {}, TypeError, r"float32, float64.*got torch.int64"),
        ([[1.0]], {}, TypeError, r"must be tensors, got list"),
        (torch.zeros(4, 2, 3), {"groups": 3}, ValueError, r"groups must be .*divisor of the 4 output channels, got 3"),
        (torch.zeros(4, 2, 3), {"groups": 0}, ValueError, r"groups must be .* got 0"),
        (torch.zeros(4, 2, 3), {"stride": 0}, ValueError, r"stride must be a positive int .*got 0"),
        (torch.zeros(4, 2, 3, 3), {"stride": (2, 1, 1)}, ValueError, r"tuple of 2 of them, got \(2, 1, 1\)"),
    ],
)
def test_errors_name_the_argument_and_leave_the_weight(weight, arguments, error, message):
    before = weight.clone() if isinstance(weight, torch.Tensor) else weight
    with pytest.raises(error, match=message):
        init.delta_(weight, **arguments)
    assert not isinstance(weight, torch.Tensor) or torch.equal(weight, before)


def test_cells_cover_every_size_of_kernel_and_stride():
    for kernel, stride in itertools.product(range(1, 8), range(1, 6)):
        weight = init.delta_(torch.empty(2 * stride, 2, kernel), stride=stride)
        reached = min(kernel, stride)
        assert weight.sum() == 2 * reached
        phases = {w.nonzero()[0, 1].item() % stride for w in weight[: 2 * reached]}
        assert phases == {tap % stride for tap in range(kernel)}


def test_a_stride_beyond_every_kernel_takes_no_time():
    """Its cell has more phases than could be counted; the taps reach few of them."""
    for kernel in (1, 2, 3, 4):
        huge, large = (init.delta_(torch.empty(12, 2, kernel), stride=stride) for stride in (2**60, kernel))
        assert torch.equal(huge, large)
