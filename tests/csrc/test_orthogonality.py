"""The compiled penalty of small layers against the reference: geometries, layouts, tails, limits, shards, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from isonet_fast import reference
from isonet_fast.geometry import PENALTIES
from isonet_fast.ops import library, orthogonality, small_layers
from isonet_fast.penalty_arguments import checked_layer
from isonet_fast.problem import Problem
from tests.cases import EMPTY_LAYERS, LAYERS, assert_accurate, layouts, random_weight

if library.why_not_compiled:
    pytest.skip(library.why_not_compiled, allow_module_level=True)

ops = torch.ops.isonet_fast

both_forms = pytest.mark.usefixtures("form")


def problem_of(weights, geometry, part=(0, 1), coefficients=None):
    layers = tuple(checked_layer(w, *rest) for w, rest in zip(weights, geometry))
    return Problem(layers, tuple(coefficients or [1.0] * len(layers)), None, part)


def expected(weight, stride, dilation, groups, penalty, dtype) -> tuple[Tensor, Tensor]:
    wide = weight.detach().to(dtype).requires_grad_()
    loss = reference.orthogonality_loss(wide, stride=stride, dilation=dilation, groups=groups, penalty=penalty)
    return loss.detach(), torch.autograd.grad(loss, wide)[0]


def check(weight, *geometry, message="") -> None:
    """Value alone, value with saved gradient, and gradient added to one that lies otherwise in memory."""
    (exact, exact_grad), (plain, plain_grad) = (
        expected(weight, *geometry, dtype) for dtype in (torch.float64, weight.dtype)
    )
    problem = problem_of([weight], [geometry], coefficients=[0.5])
    weight = weight.detach().requires_grad_()
    total, losses = orthogonality.loss([weight], problem)
    assert_accurate(losses[0], exact, plain, message)
    assert_accurate(total, exact / 2, plain / 2, message)
    (grad,) = torch.autograd.grad(total, weight)
    assert_accurate(grad, exact_grad / 2, plain_grad / 2, message)
    assert torch.equal(orthogonality.loss([weight.detach()], problem)[0], total)
    for name, start in layouts(torch.ones(weight.shape)):
        added = start.clone(memory_format=torch.preserve_format) if name != "sliced" else start
        again, _ = orthogonality.accumulate_grad_([weight], [added], problem, 3.0)
        assert torch.equal(again, total)
        torch.testing.assert_close(added, 3 * grad + 1, rtol=1e-6, atol=1e-6, msg=f"{message} {name}")


@pytest.fixture(autouse=True)
def kernel_calls(monkeypatch):
    """How many layers the kernel was given, call by call."""
    calls: list[int] = []
    original = small_layers.members

    def counted(*arguments):
        calls.append(len(original(*arguments)))
        return original(*arguments)

    monkeypatch.setattr(small_layers, "members", counted)
    return calls


@both_forms
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape, stride, dilation, groups", LAYERS + EMPTY_LAYERS)
def test_against_the_reference(shape, stride, dilation, groups, penalty, kernel_calls):
    check(random_weight(shape), stride, dilation, groups, penalty)
    assert set(kernel_calls) == {1}


@both_forms
def test_every_layout_of_the_weight():
    for shape in ((12, 20, 3, 3), (6, 7, 2, 3, 2), (20, 12, 3)):
        for name, weight in layouts(random_weight(shape)):
            check(weight, 2, 1, 2, "isonet", message=name)


@both_forms
def test_every_tail_of_rows_and_columns_is_right():
    """Rows and columns around whole vectors of 8, pairs of vectors, and tiles of 6 rows."""
    for outputs in range(1, 20):
        for inputs in (1, 2, 3, 5, 13, outputs, outputs + 1):
            check(random_weight((outputs, inputs, 3)), 1, 1, 1, "lorth", message=f"{outputs} {inputs}")


def test_the_gradient_near_the_optimum():
    """A residual of a thousandth is the difference of a sum of hundreds of products and 1."""
    for shape in ((16, 1000), (24, 16, 3, 3, 3), (128, 128)):
        weight = torch.nn.init.orthogonal_(torch.empty(shape)) + 1e-3 * random_weight(shape)
        grad, problem = torch.zeros(shape), problem_of([weight], [(1, 1, 1, "matrix")])
        orthogonality.accumulate_grad_([weight], [grad], problem, 1.0)
        (_, exact), (_, plain) = (
            expected(weight, 1, 1, 1, "matrix", dtype) for dtype in (torch.float64, torch.float32)
        )
        assert_accurate(grad, exact, plain, shape)


@pytest.mark.parametrize(
    "channels, kernel, tap, stride",
    [
        *[(16, 3, 1, 1), (64, 3, 1, 1), (128, 3, 1, 1), (32, 5, 2, 1), (16, 6, 3, 1)],
        *[(16, 3, 0, 1), (64, 3, 0, 1), (32, 5, 1, 1)],
        *[(64, 4, 2, 2), (64, 7, 3, 2)],
    ],
)
def test_the_gradient_near_the_optimum_is_at_least_as_exact_over_frequencies(channels, kernel, tap, stride):
    """Wherever the orthogonal tap lies: only a central one has the same phase at all frequencies."""
    errors = dict.fromkeys(["overlap", "frequency"], 0.0)
    shape = (channels, channels, kernel, kernel)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight, noise = torch.zeros(shape), torch.randn(shape, generator=generator)
        torch.nn.init.orthogonal_(weight[:, :, tap, tap], generator=generator)
        weight += 1e-3 * noise * weight.norm() / noise.norm()
        _, exact = expected(weight, stride, 1, 1, "isonet", torch.float64)
        layer = checked_layer(weight, stride, 1, 1, "isonet")
        for form in errors:
            grad = torch.empty(shape)
            plan, waves, _ = small_layers.kernel_arguments([layer], [(form, layer.units(form))])
            ops.orthogonality_small_([weight], [grad], plan, waves, [1.0], False)
            errors[form] += ((grad - exact).norm() / exact.norm()).item()
    assert errors["frequency"] <= errors["overlap"] < (1e-3 if stride == 1 else 3e-3)


@pytest.mark.parametrize(
    "shape, served", [((128, 128), 1), ((129, 129), 0), ((64, 256, 1, 1), 1), ((64, 257, 1, 1), 0), ((257, 64), 0)]
)
def test_below_and_above_the_limit(shape, served, kernel_calls):
    check(random_weight(shape), 1, 1, 1, "isonet")
    assert set(kernel_calls) == {served}


def network():
    """Small layers with larger and equal ones between them."""
    specs = [LAYERS[n] for n in (0, 15, 5, 0, 11, 20, 10)]
    specs[3:3] = [((160, 130, 1, 1), 1, 1, 1)]
    assert specs[1][0] == (20, 4, 3, 3)  # its penalty is "lorth", with a constant that one share subtracts
    geometry = [(s, e, g, tuple(PENALTIES)[n % 3]) for n, (_, s, e, g) in enumerate(specs)]
    return [random_weight(spec[0]).requires_grad_() for spec in specs], geometry


@both_forms
def test_small_and_large_layers_mix_in_one_list(kernel_calls):
    weights, geometry = network()
    coefficients = [0.1 * (n + 1) for n in range(len(weights))]
    total, losses = orthogonality.loss(weights, problem_of(weights, geometry, coefficients=coefficients))
    assert kernel_calls and 0 < sum(kernel_calls) < len(weights)
    grads = torch.autograd.grad(total, weights)
    for n, (weight, rest, c) in enumerate(zip(weights, geometry, coefficients)):
        (exact, exact_grad), (plain, plain_grad) = (
            expected(weight, *rest, dtype) for dtype in (torch.float64, torch.float32)
        )
        assert_accurate(losses[n], exact, plain, n)
        assert_accurate(grads[n], c * exact_grad, c * plain_grad, n)
    torch.testing.assert_close(total.double(), (losses.double() * torch.tensor(coefficients)).sum(), rtol=1e-6, atol=0)


@both_forms
def test_other_dtypes_in_the_list_are_left_to_the_closed_form(kernel_calls):
    weights = [random_weight((8, 8, 3, 3)).to(d) for d in (torch.float64, torch.float32, torch.bfloat16)]
    _, losses = orthogonality.loss(weights, problem_of(weights, [(1, 1, 1, "isonet")] * 3))
    assert kernel_calls == [1] and losses.dtype == torch.float64
    for loss, weight in zip(losses, weights):
        torch.testing.assert_close(loss, expected(weight, 1, 1, 1, "isonet", torch.float64)[0], rtol=1e-5, atol=0)


@both_forms
@pytest.mark.parametrize("ranks", [2, 5, 200])
def test_shares_of_all_ranks_add_up(ranks):
    weights, geometry = network()
    total, losses = orthogonality.loss(weights, problem_of(weights, geometry))
    grads = torch.autograd.grad(total, weights)
    shared = [torch.zeros_like(w) for w in weights]
    summed, shared_losses = torch.zeros_like(total), torch.zeros_like(losses)
    for rank in range(ranks):
        part = problem_of(weights, geometry, (rank, ranks))
        share, share_losses = orthogonality.loss(weights, part)
        summed, shared_losses = summed + share.detach(), shared_losses + share_losses
        for sum_, g in zip(shared, torch.autograd.grad(share, weights)):
            sum_.add_(g)
    torch.testing.assert_close(summed, total.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_losses, losses, rtol=1e-5, atol=1e-5)
    for got, want in zip(shared, grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@both_forms
def test_the_number_of_threads_changes_no_bit():
    weights, geometry = network()
    small = small_layers.members(weights, problem_of(weights, geometry).layers)
    weights, geometry = [weights[n] for n in small], [geometry[n] for n in small]
    problem, threads, results = problem_of(weights, geometry), torch.get_num_threads(), []
    for count in (threads, 1, 2, 3, 16):
        torch.set_num_threads(count)
        grads = [torch.zeros_like(w) for w in weights]
        results.append([*orthogonality.accumulate_grad_(weights, grads, problem, 1.0), *grads])
    torch.set_num_threads(threads)
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again))


@both_forms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_in_its_group(value):
    weight = random_weight((10, 5, 3, 3))
    weight[2, 3, 1, 1] = value
    problem = problem_of([weight], [(1, 1, 2, "isonet")])
    grad = torch.zeros_like(weight)
    total, _ = orthogonality.accumulate_grad_([weight], [grad], problem, 1.0)
    assert not total.isfinite()
    assert not grad[:5].isfinite().any() and grad[5:].isfinite().all()
    _, other = expected(weight[5:], 1, 1, 1, "isonet", torch.float64)
    torch.testing.assert_close(grad[5:].double(), other, rtol=1e-5, atol=1e-5)


def arguments_of_the_op():
    weights = [random_weight((8, 6, 3, 3)), random_weight((5, 7))]
    layers = problem_of(weights, [(1, 1, 1, "isonet")] * 2).layers
    work = [(form, layer.units(form)) for layer, form in zip(layers, ("frequency", "overlap"))]
    plan, waves, _ = small_layers.kernel_arguments(layers, work)
    return weights, [torch.zeros_like(w) for w in weights], plan, waves, [1.0, 2.0], True


def test_opcheck():
    checks = ("test_schema", "test_faketensor")
    opcheck(ops.orthogonality_small_.default, arguments_of_the_op(), test_utils=checks)


def test_wrong_arguments_are_refused():
    weights, grads, plan, waves, scale, add = arguments_of_the_op()
    assert plan[:10].tolist() == [1, 1, 1, 1, 3, 3, 1, 1, 1, 13] and plan[49:].tolist() == [1, 0, 0, *[1] * 7, 0, 0, 0]

    def changed(place, value):
        return torch.cat([plan[:place], plan.new_tensor([value]), plan[place + 1 :]])

    call = ops.orthogonality_small_
    for message, arguments in {
        "grads must be as many as weights": (weights, grads[:1], plan, waves, scale, add),
        "scale must be as many as weights": (weights, grads, plan, waves, scale[:1], add),
        "plan must be contiguous int64": (weights, grads, plan.int(), waves, scale, add),
        "plan must describe every weight": (weights, grads, plan[:-1], waves, scale, add),
        "plan must hold the kernel": ([weights[0][..., :2], weights[1]], grads, plan, waves, scale, add),
        "waves must be contiguous float32": (weights, grads, plan, waves.double(), scale, add),
        "waves must hold every frequency": (weights, grads, plan, waves[:-1], scale, add),
        "phases must be positive": (weights, grads, changed(7, 0), waves, scale, add),
        "phases must be 1 for offsets": (weights, grads, changed(55, 2), waves, scale, add),
        "weights must be float32": ([weights[0].double(), weights[1]], grads, plan, waves, scale, add),
        "grads must have the shape": (weights, [grads[0][:4], grads[1]], plan, waves, scale, add),
        "grads must have the dtype": (weights, [grads[0].double(), grads[1]], plan, waves, scale, add),
        "offsets must be smaller than the kernel": (weights, grads, changed(60, 1), waves, scale, add),
        r"weights must be \(groups \* rows": (weights, grads, changed(0, 3), waves, scale, add),
    }.items():
        with pytest.raises(RuntimeError, match=message):
            call(*arguments)


@both_forms
def test_a_gradient_that_is_added_to_counts_as_changed() -> None:
    """Autograd knows of the change: a backward pass that has kept the gradient must not go on with it."""
    weight, grad = torch.randn(4, 4, 3, 3), torch.zeros(4, 4, 3, 3)
    x = torch.ones(4, 4, 3, 3, requires_grad=True)
    y = (x * grad).sum()
    orthogonality.accumulate_grad_([weight], [grad], problem_of([weight], [(1, 1, 1, "isonet")]), 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_a_gradient_whose_elements_share_memory_is_refused() -> None:
    weight, grad = torch.randn(4, 4, 3, 3), torch.zeros(4, 4, 1, 1).expand(4, 4, 3, 3)
    weights, grads, *rest = arguments_of_the_op()
    with pytest.raises(ValueError, match="has elements that share memory"):
        orthogonality.accumulate_grad_([weight], [grad], problem_of([weight], [(1, 1, 1, "isonet")]), 1.0)
    grads[0] = grads[0][..., :1].expand(grads[0].shape)
    with pytest.raises(RuntimeError, match="elements of grads must not share memory"):  # the bare op
        ops.orthogonality_small_(weights, grads, *rest)
