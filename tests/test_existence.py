"""What a shape allows, against brute force: the dense operator of small circular convolutions, minimised from many
starts, and the penalty itself, minimised from random weights."""

import itertools

import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer, diagnostics
from isonet_fast.existence import isometry
from isonet_fast.functional import orthogonality_loss
from isonet_fast.geometry import Layer
from tests.test_reference import operator

DOUBLE = torch.float64


def words(outputs, inputs, kernel, stride=1, dilation=1, groups=1, penalty="lorth"):
    dims = len(kernel)
    shape = (outputs, inputs // groups, *kernel)
    return isometry(Layer(shape, (stride,) * dims, (dilation,) * dims, groups, penalty))


def descend(defect, shape, seed, tolerance_change=1e-9):
    """The weights to which descent on `defect` leads from random ones of this shape."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=DOUBLE) / shape[1:].numel() ** 0.5
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], max_iter=400, tolerance_grad=1e-10, tolerance_change=tolerance_change, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = defect(weight)
        value.backward()
        return value

    optimizer.step(closure)
    return weight.detach()


def minimised(defect, shape, starts=4):
    return min(defect(descend(defect, shape, seed)).item() for seed in range(starts))


def penalty_of(stride=1, penalty="lorth"):
    return lambda weight: orthogonality_loss(weight, stride=stride, penalty=penalty)


SMALL = [
    (outputs, inputs, kernel, stride, dilation)
    for outputs, inputs, kernel, stride, dilation in itertools.product(
        (1, 2, 3, 4, 5), (1, 2), (1, 2, 3), (1, 2, 3), (1, 2)
    )
    if (inputs == 1 or outputs > 2) and (dilation == 1 or (stride == 2 and kernel < 3))
]


@pytest.mark.parametrize("outputs, inputs, kernel, stride, dilation", SMALL)
def test_the_word_says_what_the_best_operator_is(outputs, inputs, kernel, stride, dilation):
    """1-d, where descent finds every minimum: the operator's rows, its columns, both or neither orthonormal."""
    size = stride * 4 if stride > 1 else 5

    def dense(weight):
        return operator(weight, (stride,), (dilation,), 1, (size,))

    def rows(weight):
        matrix = dense(weight)
        return (matrix @ matrix.T - torch.eye(len(matrix), dtype=DOUBLE)).square().sum()

    def columns(weight):
        matrix = dense(weight)
        return (matrix.T @ matrix - torch.eye(matrix.shape[1], dtype=DOUBLE)).square().sum()

    shape = torch.Size((outputs, inputs, kernel))
    exists = {name for name, defect in {"rows": rows, "columns": columns}.items() if minimised(defect, shape) < 1e-8}
    best, *rest = words(outputs, inputs, (kernel,), stride, dilation).split(", ")
    assert exists == {"rows": {"rows"}, "columns": {"columns"}, "none": set()}.get(best, {"rows", "columns"})
    if any(word.startswith("reads") for word in rest):
        untouched = dense(torch.ones(shape, dtype=DOUBLE)).abs().sum(0).eq(0).sum().item()
        read, cell = (int(n) for n in rest[0].split(" ")[1:4:2])
        assert untouched == inputs * size * (1 - read / cell)
    else:
        assert not dense(torch.ones(shape, dtype=DOUBLE)).abs().sum(0).eq(0).any()


@pytest.mark.parametrize(
    "outputs, inputs, kernel, stride, hard",
    [
        (1, 1, (3, 3), 1, True),  # a depthwise group
        (2, 2, (3, 3), 1, True),
        (2, 2, (3, 1), 1, False),  # overlapping taps in one dimension
        (4, 4, (1, 1), 1, False),
        (4, 1, (2, 2), 2, False),
        (3, 2, (2, 2), 1, False),
        (2, 1, (3, 3), 2, False),
    ],
)
def test_hard_to_train_is_where_descent_stays_above_zero(outputs, inputs, kernel, stride, hard):
    """At least a quarter of the random starts end in a minimum above 0; elsewhere every start ends at 0."""
    starts, defect, shape = 8 if hard else 4, penalty_of(stride), torch.Size((outputs, inputs, *kernel))
    stuck = sum(defect(descend(defect, shape, seed)).item() > 1e-3 for seed in range(starts))
    assert (stuck >= starts // 4) if hard else stuck == 0
    assert ("hard to train" in words(outputs, inputs, kernel, stride)) == hard


def test_a_depthwise_kernel_is_a_shift_where_it_is_orthogonal():
    for seed in range(6):
        kernel = descend(penalty_of(), torch.Size((1, 1, 2)), seed)
        assert penalty_of()(kernel).item() < 1e-8
        expected = torch.tensor([0, 1], dtype=DOUBLE)
        torch.testing.assert_close(kernel.abs().flatten().sort().values, expected, rtol=0, atol=1e-2)
    assert words(4, 4, (5,), groups=4) == "shifts only"
    assert words(4, 4, (3, 3), groups=4) == "shifts only, hard to train"


@pytest.mark.parametrize(
    "outputs, inputs, kernel, stride, penalty, leads",
    [
        (4, 2, 3, 2, "isonet", False),
        (4, 2, 3, 1, "isonet", True),
        (2, 4, 3, 2, "isonet", True),
        (3, 2, 3, 2, "lorth", True),
        (3, 2, 3, 2, "isonet", False),
        (2, 2, 3, 1, "matrix", False),
        (2, 1, 2, 2, "matrix", True),
        (2, 1, 2, 2, "isonet", False),
        (4, 2, 1, 1, "isonet", True),
    ],
)
def test_needs_lorth_is_where_a_minimum_of_the_penalty_is_no_isometry(outputs, inputs, kernel, stride, penalty, leads):
    worst, size, defect = 0.0, 12, penalty_of(stride, penalty)
    conv = nn.Conv1d(inputs, outputs, kernel, stride=stride).double()
    for seed in range(4):
        conv.weight.data = descend(defect, conv.weight.shape, seed, tolerance_change=1e-14)
        assert defect(conv.weight).item() < 1e-8
        values = diagnostics.singular_values(conv, size)[: size // stride * min(outputs, inputs * stride)]
        worst = max(worst, (values - 1).abs().max().item())
    assert (worst < 1e-3) == leads
    assert ("needs lorth" not in words(outputs, inputs, (kernel,), stride, penalty=penalty)) == leads


@pytest.mark.parametrize(
    "arguments, text",
    [
        ((8, 2, (1, 1), 2), "none, reads 1 of 4 inputs"),
        ((4, 2, (1, 1), 2), "none, reads 1 of 4 inputs"),
        ((2, 2, (1, 1), 2), "rows, reads 1 of 4 inputs"),
        ((16, 4, (3, 3), 2), "both, hard to train"),
        ((64, 16, (2, 2), 2), "both"),
        ((32, 4, (3, 3), 2), "columns"),
        ((8, 4, (3, 3), 2, 2), "none, reads 1 of 4 inputs"),
        ((8, 4, (), 1), "columns"),
        ((4, 4, (), 1), "both"),
        ((6, 4, (3, 3), 1, 1, 2), "columns"),
        ((8, 4, (3, 3), 2, 1, 1, "isonet"), "rows, needs lorth"),
        ((8, 2, (1, 1), 2, 1, 1, "isonet"), "none, reads 1 of 4 inputs"),
    ],
)
def test_the_words_for_familiar_layers(arguments, text):
    assert words(*arguments) == text


def test_both_tables_have_the_column():
    """A kernel smaller than its stride: penalty 0, yet singular values are 0, and the tables say why."""
    conv = nn.Conv2d(2, 8, 1, stride=2, bias=False)
    nn.init.orthogonal_(conv.weight)
    (row,) = OrthoRegularizer(conv, penalty="lorth").summary()
    assert row.value == pytest.approx(0, abs=1e-10) and row.isometry == "none, reads 1 of 4 inputs"
    values = diagnostics.singular_values(conv, 8)
    dense = torch.linalg.svdvals(operator(conv.weight.detach().double(), (2, 2), (1, 1), 1, (4, 4)))
    assert dense.lt(1e-6).sum() == 24 and dense.sub(1).abs().lt(1e-6).sum() == 8, (
        "of the inputs that are read, all kept"
    )
    assert values.lt(1e-6).any()
    report = diagnostics.isometry_report(conv, (2, 8, 8))
    assert report[0].isometry == row.isometry and (report[0].smallest, report[0].largest) == pytest.approx(
        (0, 1), abs=1e-6
    )
    assert "isometry" in str(report).splitlines()[0] and str(report).splitlines()[1].endswith(row.isometry)


def test_a_transposed_convolution_swaps_rows_and_columns():
    net = nn.Sequential(
        nn.ConvTranspose2d(4, 2, 3, stride=2), nn.ConvTranspose2d(2, 3, 1, stride=2), nn.ConvTranspose2d(8, 2, 3)
    )
    rows = OrthoRegularizer(net, penalty="lorth", filter=lambda *_: True, include=nn.ConvTranspose2d).summary()
    assert [row.isometry for row in rows] == ["columns", "columns, writes 1 of 4 outputs", "rows"]
