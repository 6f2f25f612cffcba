"""The closed form's two ways to compute a layer: what each multiplies, which one is taken, scratch memory, rounding.

That both compute the penalty is tested where the penalty is: test_orthogonality.py runs for both.
"""

import itertools
import math
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.clocks import Clock
from isonet_fast import OrthoRegularizer, functional, models, reference
from isonet_fast.geometry import Layer
from isonet_fast.models.official import official_penalty
from isonet_fast.ops import closed_form, frequency_form, orthogonality
from isonet_fast.problem import Problem
from isonet_fast.split_work import split_work

FORMS = ["overlap", "frequency"]


def layer_of(shape, stride=1, dilation=1, groups=1, penalty="isonet"):
    dims = len(shape) - 2
    return Layer(shape, (stride,) * dims, (dilation,) * dims, groups, penalty)


def evaluate(weights, layer, form, units=None):
    """Losses and gradients by one form."""
    grads = [torch.zeros_like(w) for w in weights]
    work = [(form, layer.units(form) if units is None else units)] * len(weights)
    losses = closed_form.evaluate(weights, [layer] * len(weights), work, lambda n, g: grads[n].copy_(g))
    return losses, grads


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        name = function.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "bmm", "addmm", "baddbmm"):
            left = arguments[-2]
            self.total += result.numel() * left.shape[-1]
        return result


GEOMETRIES = [
    layer_of((6, 4, 3, 3)),
    layer_of((6, 4, 3, 3), 2),
    layer_of((6, 4, 4, 5), 2, penalty="lorth"),
    layer_of((6, 4, 3, 3), 2, 2, penalty="lorth"),
    layer_of((6, 4, 3, 3), 3, 2),
    layer_of((12, 4, 3, 3), groups=3),
    layer_of((6, 4, 5, 5)),
    layer_of((6, 4, 2, 3, 2), 2),
    layer_of((6, 4, 7), 3),
    layer_of((6, 4, 1, 1)),
    layer_of((6, 4, 3), 5),
    layer_of((6, 4, 3, 3), penalty="matrix"),
    layer_of((6, 4)),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
def test_the_geometry_counts_every_multiplication(layer, form):
    weights = [torch.randn(layer.shape, dtype=torch.float64) for _ in range(2)]
    evaluate(weights, layer, form)  # cosines and sines are computed once
    with Multiplications() as counted:
        evaluate(weights, layer, form)
    assert counted.total == 2 * layer.multiplications(form)
    with Multiplications() as counted:
        closed_form.evaluate(weights, [layer] * 2, [(form, layer.units(form))] * 2, None)
    assert counted.total == 2 * layer.multiplications(form, gradient=False)
    for unit in layer.units(form)[:5]:
        evaluate(weights[:1], layer, form, (unit,))
        with Multiplications() as counted:
            evaluate(weights[:1], layer, form, (unit,))
        assert counted.total == layer.work(form, unit)


def test_half_of_the_frequencies_covers_all():
    for layer in GEOMETRIES:
        half = layer.frequencies
        opposite = {tuple(-x % n for x, n in zip(w, layer.grid)) for w in half}
        zero = (0,) * len(layer.kernel)
        assert half[0] == zero and set(half) & opposite == {zero}
        assert set(half) | opposite == set(itertools.product(*map(range, layer.grid)))


@pytest.mark.parametrize(
    "layer, form",
    [
        (layer_of((256, 256, 3, 3)), "frequency"),
        (layer_of((129, 129, 3, 3)), "frequency"),
        (layer_of((16, 16, 3, 3)), "frequency"),
        (layer_of((14, 14, 3, 3)), "overlap"),  # small, and frequencies save less than SMALL_FACTOR
        (layer_of((128, 128, 2, 2)), "overlap"),
        (layer_of((129, 129, 2, 2)), "frequency"),
        (layer_of((32, 32, 5, 5)), "frequency"),
        (layer_of((64, 64, 3, 3, 3)), "frequency"),
        (layer_of((160, 160, 3, 3, 3)), "frequency"),
        (layer_of((512, 512, 3, 3), 2), "overlap"),  # strided: fewer taps overlap
        (layer_of((512, 512, 1, 1)), "overlap"),  # a tie
        (layer_of((512, 512)), "overlap"),
        (layer_of((512, 512, 2, 2), 2), "overlap"),
        (layer_of((8, 4096, 5, 5)), "overlap"),  # thin: summed in float64
        (layer_of((512, 512, 3, 3), penalty="matrix"), "overlap"),
        (layer_of((512, 1, 5, 5), groups=512), "overlap"),
    ],
    ids=str,
)
def test_the_form_with_fewer_multiplications_is_taken(layer, form):
    assert layer.form == form
    fewer = layer.multiplications("frequency") < layer.multiplications("overlap")
    assert fewer or form == "overlap"


@pytest.mark.parametrize("form", FORMS)
def test_a_kernel_without_taps_has_nothing_to_compute(form):
    layer = layer_of((8, 4, 0, 3))
    assert layer.units(form) == () and layer.form == "overlap"
    assert functional.orthogonality_loss([torch.empty(8, 4, 0, 3), torch.eye(3)]) == 0


@pytest.mark.parametrize("cache", [1, 1000, 2**19])
@pytest.mark.parametrize("scratch", [1, 10000, 2**22])
def test_slices_of_the_frequencies_add_up(scratch, cache, monkeypatch):
    """Whatever fits, and no tensor is larger than the scratch memory that a slice may take."""
    monkeypatch.setattr(frequency_form, "SCRATCH", scratch)
    monkeypatch.setattr(frequency_form, "CACHE", cache)
    layer = layer_of((12, 10, 5, 3), groups=2)
    weights = [torch.randn(layer.shape, dtype=torch.float64) / 10 for _ in range(3)]
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, (list, tuple)) else [result]))
            return result

    blocks = torch.stack([frequency_form.pack(w.unflatten(0, (2, -1)), layer) for w in weights]).flatten(0, 1)
    with Sizes():
        frequency_form.batch(blocks, layer, layer.frequencies, True)
    pair = len(blocks) * layer.rows * max(layer.rows, layer.columns)
    assert max(sizes) <= max(blocks.numel(), scratch / 2, pair)
    losses, grads = evaluate(weights, layer, "frequency")
    for weight, loss, grad in zip(weights, losses, grads):
        weight.requires_grad_()
        exact = reference.orthogonality_loss(weight, groups=2)
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, torch.autograd.grad(exact, weight)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "shape", [(256, 256, 3, 3), (160, 192, 5, 5), (64, 512, 3, 3), (32, 1024, 3, 3), (64, 1024, 3, 3), (128, 512, 3, 3)]
)
def test_a_layer_needs_no_more_memory_than_the_official_form(shape):
    conv = nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    regularizer = OrthoRegularizer(nn.Sequential(conv))
    conv.weight.grad = torch.zeros_like(conv.weight)
    assert layer_of(shape).form == "frequency"

    def official():
        torch.autograd.grad(official_penalty(nn.Sequential(conv)), conv.weight)

    assert 0 < Clock().peak(regularizer.accumulate_grad_) <= Clock().peak(official)


def test_not_a_number_stays_in_its_group():
    weights = [torch.randn(24, 12, 5, 5) for _ in range(2)]
    weights[0][2, 3, 1, 1] = float("nan")
    losses, grads = evaluate(weights, layer_of((24, 12, 5, 5), groups=2), "frequency")
    assert losses[0].isnan() and losses[1].isfinite()
    assert grads[0][:12].isnan().all() and grads[0][12:].isfinite().all() and grads[1].isfinite().all()


@pytest.mark.parametrize(
    "channels, kernel, stride",
    [
        *[(16, 3, 1), (16, 4, 1), (16, 6, 1), (16, 7, 1), (32, 6, 1), (64, 2, 1), (64, 3, 1), (48, 5, 1), (160, 3, 1)],
        *[(64, 4, 2), (64, 7, 2), (128, 3, 2)],
    ],
)
def test_the_gradient_near_the_optimum_is_at_least_as_exact(channels, kernel, stride):
    """An orthogonal middle tap, moved by 1e-3 of its norm: G - I is a small difference of large numbers."""
    errors = dict.fromkeys(FORMS, 0.0)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.zeros(channels, channels, kernel, kernel)
        torch.nn.init.orthogonal_(weight[:, :, kernel // 2, kernel // 2], generator=generator)
        noise = torch.randn(weight.shape, generator=generator)
        weight += 1e-3 * noise * weight.norm() / noise.norm()
        layer = layer_of(weight.shape, stride)
        exact = evaluate([weight.double()], layer, "overlap")[1][0]
        for form in FORMS:
            (grad,) = evaluate([weight], layer, form)[1]
            errors[form] += ((grad - exact).norm() / exact.norm()).item()
    assert errors["frequency"] <= errors["overlap"]


MIXED = [((40, 40, 5, 5), 1), ((16, 16, 3, 3), 1), ((20, 24, 7, 7), 1), ((24, 24, 7, 7), 1), ((12, 6, 3, 3), 2)]


def mixed_problem(share=(0, 1)):
    layers = tuple(layer_of(shape, stride, penalty="lorth") for shape, stride in MIXED)
    return Problem(layers, (1.0, 0.5, 2.0, 1.0, 3.0), None, share)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_network_of_both_forms(dtype):
    problem = mixed_problem()
    assert {layer.form for layer in problem.layers} == set(FORMS)
    weights = [torch.randn(shape).to(dtype) / math.prod(shape[1:]) ** 0.5 for shape, _ in MIXED]
    grads = [torch.ones_like(w) for w in weights]
    _, losses = orthogonality.accumulate_grad_(weights, grads, problem, 2.0)
    again = functional.orthogonality_loss(weights, stride=[stride for _, stride in MIXED], penalty="lorth")
    torch.testing.assert_close(losses.sum(), again)
    rtol = 1e-12 if dtype == torch.float64 else 1e-4
    for weight, (_, stride), coefficient, loss, grad in zip(weights, MIXED, problem.coefficients, losses, grads):
        wide = weight.double().requires_grad_()
        exact = reference.orthogonality_loss(wide, stride=stride, penalty="lorth")
        wanted = 1 + 2 * coefficient * torch.autograd.grad(exact, wide)[0]
        torch.testing.assert_close(loss.double(), exact.detach(), rtol=rtol, atol=rtol)
        assert (grad - wanted).norm() <= rtol * wanted.norm()


@pytest.mark.parametrize("ranks", [2, 5, 60])
def test_shares_of_a_network_of_both_forms_add_up(ranks):
    weights = [(torch.randn(shape, dtype=torch.float64) / 10).requires_grad_() for shape, _ in MIXED]
    total, losses = orthogonality.loss(weights, mixed_problem())
    grads = torch.autograd.grad(total, weights)
    shares = [orthogonality.loss(weights, mixed_problem((rank, ranks))) for rank in range(ranks)]
    torch.testing.assert_close(sum(s for s, _ in shares), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(part for _, part in shares), losses, rtol=1e-12, atol=1e-12)
    share_grads = [torch.autograd.grad(s, weights) for s, _ in shares]
    for n, grad in enumerate(grads):
        torch.testing.assert_close(sum(g[n] for g in share_grads), grad, rtol=1e-12, atol=1e-12)


def test_ranks_on_a_gpu_share_the_units_of_the_triton_kernels():
    """One of them may have only the closed form."""
    problem, weight = mixed_problem((1, 2)), types.SimpleNamespace(is_cuda=True, dtype=torch.float32)
    forms, units = zip(*orthogonality._work([weight] * len(MIXED), problem))
    assert forms == ("frequency", "overlap", "frequency", "frequency", "overlap")
    kernels = pytest.importorskip("isonet_fast.kernels.packed")
    assert tuple(p.units for p in kernels.pack_layers(problem)) == units


@pytest.mark.parametrize("ranks", [2, 8, 16, 32])
@pytest.mark.parametrize("network", ["isonet18", "risonet50"])
def test_units_of_both_forms_are_split_without_loss_and_evenly(network, ranks):
    """No rank multiplies more than the busiest would by offsets. Up to 8 ranks all multiply as much."""
    with torch.device("meta"):
        modules = getattr(models, network)().modules()
    layers = tuple(layer_of(tuple(m.weight.shape), m.stride[0]) for m in modules if isinstance(m, nn.Conv2d))
    busiest = {}
    for name, forms in (("count", [layer.form for layer in layers]), ("offsets", ["overlap"] * len(layers))):
        shares = [split_work(layers, rank, ranks, forms) for rank in range(ranks)]
        for n, (layer, form) in enumerate(zip(layers, forms)):
            assert sorted(unit for share in shares for unit in share[n]) == sorted(layer.units(form))
        work = [sum(one.work(f, u) for one, f, units in zip(layers, forms, share) for u in units) for share in shares]
        busiest[name] = max(work)
        assert ranks > 8 or max(work) * ranks < 1.001 * sum(work)
    assert busiest["count"] <= busiest["offsets"]
