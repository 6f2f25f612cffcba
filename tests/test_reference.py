"""The specification against itself, and the penalty against the operator that it speaks of."""

import math

import pytest
import torch
import torch.nn.functional as F

from isonet_fast import reference
from isonet_fast.init import delta_

DOUBLE = torch.float64


def operator(weight, stride, dilation, groups, grid):
    """The dense matrix A of a strided, grouped, dilated convolution on a circular grid: one row per output value."""
    dims = weight.dim() - 2
    inputs = weight.shape[1] * groups
    basis = torch.eye(inputs * math.prod(grid), dtype=weight.dtype).view(-1, inputs, *grid)
    reach = [e * (k - 1) for e, k in zip(dilation, weight.shape[2:])]
    wrapped = F.pad(basis, [p for r in reversed(reach) for p in (0, r)], mode="circular") if any(reach) else basis
    convolve = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolve(wrapped, weight, None, tuple(stride), 0, tuple(dilation), groups).flatten(1).T


# weight shape (O, I/g, k...), stride, dilation, groups, a grid large enough that offsets don't wrap onto each other
OPERATORS = [
    ((4, 4, 3, 3), (1, 1), (1, 1), 1, (6, 6)),
    ((3, 5, 3, 3), (1, 1), (1, 1), 1, (6, 6)),
    ((4, 6, 3, 3), (2, 2), (1, 1), 1, (6, 6)),
    ((8, 2, 3, 3), (2, 2), (1, 1), 1, (6, 6)),
    ((8, 4, 1, 1), (2, 2), (1, 1), 1, (4, 4)),
    ((4, 2, 2, 4), (1, 2), (1, 1), 2, (4, 8)),
    ((3, 2, 3, 3), (2, 2), (2, 2), 1, (10, 10)),
    ((6, 1, 3, 3), (1, 1), (2, 2), 6, (10, 10)),
    ((3, 2, 5), (3,), (1,), 1, (12,)),
    ((2, 3, 5), (2,), (3,), 1, (26,)),
    ((4, 2, 7), (3,), (1,), 2, (15,)),
    ((2, 3, 2, 1, 3), (1, 1, 2), (1, 1, 1), 1, (4, 2, 6)),
]


@pytest.mark.parametrize("shape, stride, dilation, groups, grid", OPERATORS)
def test_penalty_is_the_operators_distance_from_an_isometry(shape, stride, dilation, groups, grid):
    """||A A^T - I||^2 = 2 * loss * output pixels for rows = outputs ("lorth" plus its constant)."""
    weight = torch.randn(shape, dtype=DOUBLE)
    pixels = math.prod(-(-n // s) for n, s in zip(grid, stride))
    a = operator(weight, stride, dilation, groups, grid)
    distance = a @ a.T - torch.eye(len(a), dtype=DOUBLE)  # different groups share no input: their blocks are zero
    loss = reference.orthogonality_loss(weight, stride=stride, dilation=dilation, groups=groups, penalty="lorth")
    phases = math.prod(min(k, s // math.gcd(e, s)) for k, s, e in zip(shape[2:], stride, dilation))
    constant = groups * max(0, shape[0] // groups - shape[1] * phases) / 2
    torch.testing.assert_close(distance.square().sum() / pixels, 2 * (loss + constant))


@pytest.mark.parametrize(
    "shape, dilation, groups, grid", [(s, d, g, n) for s, st, d, g, n in OPERATORS if set(st) == {1}]
)
def test_isonet_takes_the_smaller_side_at_stride_one(shape, dilation, groups, grid):
    weight = torch.randn(shape, dtype=DOUBLE)
    a = operator(weight, [1] * len(grid), dilation, groups, grid)
    small = a.T @ a if shape[1] < shape[0] // groups else a @ a.T
    distance = (small - torch.eye(len(small), dtype=DOUBLE)).square().sum() / math.prod(grid)
    loss = reference.orthogonality_loss(weight, dilation=dilation, groups=groups)
    torch.testing.assert_close(distance, 2 * loss)


def test_grouped_penalty_is_the_sum_over_groups():
    weight = torch.randn(6, 2, 3, 3, dtype=DOUBLE)
    for penalty in ("isonet", "lorth", "matrix"):
        parts = [reference.orthogonality_loss(w, stride=2, penalty=penalty) for w in weight.chunk(3)]
        whole = reference.orthogonality_loss(weight, stride=2, groups=3, penalty=penalty)
        torch.testing.assert_close(whole, sum(parts))


def test_matrix_penalty_is_the_flattened_kernels_smaller_side():
    for shape in [(4, 2, 3, 3), (20, 2, 3, 3), (5, 7)]:
        k = torch.randn(shape, dtype=DOUBLE)
        flat = k.flatten(1)
        gram = flat @ flat.T if len(flat) <= flat.shape[1] else flat.T @ flat
        expected = 0.5 * (gram - torch.eye(len(gram), dtype=DOUBLE)).square().sum()
        torch.testing.assert_close(reference.orthogonality_loss(k, penalty="matrix"), expected)


def official_arithmetic(weight, stride):
    rows = weight.transpose(0, 1) if weight.shape[1] < weight.shape[0] else weight
    gram = F.conv2d(rows, rows, padding=[k - 1 for k in weight.shape[2:]], stride=stride)
    gram[:, :, gram.shape[2] // 2, gram.shape[3] // 2] -= torch.eye(len(rows), dtype=weight.dtype)
    return 0.5 * gram.square().sum()


@pytest.mark.parametrize(
    "shape, stride",
    [
        ((8, 8, 3, 3), 1),
        ((16, 8, 3, 3), 2),
        ((8, 16, 1, 1), 1),
        ((16, 8, 1, 1), 2),
        ((4, 4, 7, 7), 3),
        ((4, 6, 1, 3), 1),
    ],
)
def test_isonet_is_the_official_value_where_the_official_code_is_right(shape, stride):
    weight = torch.randn(shape, dtype=DOUBLE)
    torch.testing.assert_close(reference.orthogonality_loss(weight, stride=stride), official_arithmetic(weight, stride))


def test_a_dirac_kernel_scores_zero_where_the_official_code_misses_the_centre():
    weight = torch.nn.init.dirac_(torch.empty(8, 8, 4, 4, dtype=DOUBLE))
    assert official_arithmetic(weight, 2) == 4
    assert reference.orthogonality_loss(weight, stride=2) == 0


@pytest.mark.parametrize(
    "shape, stride, dilation",
    [
        ((16, 8, 1, 1), 2, 1),
        ((24, 4, 3, 3), 2, 2),
        ((16, 8, 3, 3), 2, 1),
        ((4, 6, 3, 3), 1, 1),
        ((12, 4, 3), 2, 1),
        ((9, 4), 1, 1),
    ],
)
def test_the_minimum_of_lorth_is_zero(shape, stride, dilation):
    """Minimised, it reaches 0, where the operator is row- or column-orthogonal."""
    weight = delta_(torch.empty(shape, dtype=DOUBLE), stride=stride) + 0.05 * torch.randn(shape, dtype=DOUBLE)
    weight.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight], lr=1, max_iter=80, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = reference.orthogonality_loss(weight, stride=stride, dilation=dilation, penalty="lorth")
        loss.backward()
        return loss

    optimizer.step(closure)
    loss = closure().item()
    assert -1e-12 < loss < 1e-6
    if weight.dim() > 2:
        dims = weight.dim() - 2
        grid = 2 * dilation * (shape[2] - 1) + 2
        a = operator(weight.detach(), [stride] * dims, [dilation] * dims, 1, [grid] * dims)
        values = torch.linalg.svdvals(a)
        reached = values[values > 1e-3]  # phases that no tap reaches stay at 0
        torch.testing.assert_close(reached, torch.ones_like(reached), atol=5e-3, rtol=0)


def test_lists_of_weights_and_geometry():
    weights = [torch.randn(4, 4, 3, 3, dtype=DOUBLE), torch.randn(8, 2, 3, dtype=DOUBLE)]
    total = reference.orthogonality_loss(weights, stride=[2, (1,)], groups=[1, 2], penalty="lorth")
    parts = (
        reference.orthogonality_loss(weights[0], stride=2, penalty="lorth"),
        reference.orthogonality_loss(weights[1], groups=2, penalty="lorth"),
    )
    torch.testing.assert_close(total, sum(parts))


def test_penalty_is_twice_differentiable():
    weight = torch.randn(4, 2, 3, 2, dtype=DOUBLE, requires_grad=True)
    for penalty in ("isonet", "lorth", "matrix"):
        f = lambda w: reference.orthogonality_loss(w, stride=(2, 1), groups=2, penalty=penalty)  # noqa: B023
        assert torch.autograd.gradcheck(f, weight)
        assert torch.autograd.gradgradcheck(f, weight)


def test_srelu_and_join_are_twice_differentiable():
    x = torch.randn(3, 4, 5, dtype=DOUBLE, requires_grad=True)
    bias = torch.randn(1, 4, 1, 1, dtype=DOUBLE, requires_grad=True)
    branch = torch.randn_like(x, requires_grad=True)
    scale = torch.randn(1, 1, 1, 1, dtype=DOUBLE, requires_grad=True)
    for f, inputs in (
        (reference.srelu, (x, bias)),
        (reference.residual_srelu, (x, branch, bias, scale)),
        (reference.residual_srelu, (x, branch, bias)),
    ):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


def test_srelu_ties_and_nan():
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[2.0, 1.0, 0.0, nan, 3.0, inf, -inf]]).T.requires_grad_()
    bias = torch.tensor([1.0], requires_grad=True)
    y = reference.srelu(x, bias)
    torch.testing.assert_close(y.flatten(), torch.tensor([2, 1, 1, nan, 3, inf, 1]), equal_nan=True)
    y.backward(torch.arange(1.0, 8.0).unsqueeze(1))
    assert x.grad.flatten().tolist() == [1, 0, 0, 4, 5, 6, 0]  # a tie belongs to the bias, a NaN passes
    assert bias.grad.tolist() == [2 + 3 + 7]


def test_a_nan_bias_shows_and_passes_the_gradient():
    x = torch.tensor([[2.0], [-3.0]], requires_grad=True)
    bias = torch.tensor([float("nan")], requires_grad=True)
    y = reference.srelu(x, bias)
    assert y.isnan().all()
    y.backward(torch.tensor([[5.0], [7.0]]))
    assert x.grad.flatten().tolist() == [5, 7]
    assert bias.grad.tolist() == [0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_srelu_equals_the_official_form_up_to_a_rounding(dtype):
    x, bias = torch.randn(2, 3, 8, 8, dtype=dtype), torch.randn(1, 3, 1, 1, dtype=dtype)
    torch.testing.assert_close(reference.srelu(x, bias), F.relu(x - bias) + bias)


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_srelu_commutes_with_max_pooling(ceil_mode):
    """Outputs and gradients are equal exactly: ties, NaN and infinities included."""
    x = torch.randn(2, 4, 9, 9, dtype=DOUBLE)
    x.view(-1)[5::31], x.view(-1)[11::37] = float("nan"), -float("inf")
    bias = torch.randn(4, dtype=DOUBLE)
    x[:, 1, ::2] = bias[1]
    grads = []
    pool = lambda t: F.max_pool2d(t, 3, 2, 1, ceil_mode=ceil_mode)
    for f in (lambda x, b: pool(reference.srelu(x, b)), lambda x, b: reference.srelu(pool(x), b)):
        inputs = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = f(*inputs)
        grads.append(
            (y, *torch.autograd.grad(y.nan_to_num(0), inputs, torch.arange(y.numel(), dtype=DOUBLE).view_as(y)))
        )
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grads[0][2], grads[1][2], rtol=1e-13, atol=0)
