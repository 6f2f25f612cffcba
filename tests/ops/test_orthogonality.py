"""The penalty of lists of weights against the reference, whoever computes it (closed form or Triton)."""

import re

import pytest
import torch
from torch.library import opcheck

from isonet_fast import functional, init, reference
from isonet_fast.geometry import PENALTIES, Layer
from isonet_fast.ops import closed_form, orthogonality
from isonet_fast.penalty_arguments import checked_layer
from isonet_fast.problem import Problem
from isonet_fast.split_work import split_work
from tests.cases import LAYERS, LAYOUTS, OVER_FREQUENCIES, random_weight

ops = torch.ops.isonet_fast

both_forms = pytest.mark.usefixtures("form")  # where the closed form computes


def weights_like(shape, kind, device, dtype):
    """Dirac, near a dirac, and random weights of a trained layer's size."""
    if kind == "random":
        return random_weight(shape).to(device, dtype)
    delta = torch.zeros(shape)
    for i in range(min(shape[:2])):
        delta[(i, i, *(k // 2 for k in shape[2:]))] = 1
    noise = 1e-3 * torch.randn(shape) if kind == "near" else 0
    return (delta + noise).to(device, dtype)


def tolerance(device, dtype):
    """For a bf16x3 gram and a bf16 gradient by Triton (docs/design.md, "The penalty's precision"), or for float32 or
    float64 elsewhere."""
    if dtype == torch.float64:
        return 1e-12, 1e-12
    return (1e-4, 1e-2) if served_by_triton(device) else (1e-5, 1e-3)


def served_by_triton(device):
    return orthogonality.serves([torch.empty(1, 1, device=device)])


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def reference_value_and_grads(weights, **geometry):
    wide = [w.detach().double().requires_grad_() for w in weights]
    loss = reference.orthogonality_loss(wide, **geometry)
    return loss.detach(), torch.autograd.grad(loss, wide)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", ["dirac", "near", "random"])
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("shape, stride, dilation, groups", LAYERS)
def test_against_the_reference(shape, stride, dilation, groups, penalty, kind, dtype, device):
    weight = weights_like(shape, kind, device, dtype).requires_grad_()
    geometry = dict(stride=stride, dilation=dilation, groups=groups, penalty=penalty)
    loss = functional.orthogonality_loss(weight, **geometry)
    (grad,) = torch.autograd.grad(loss, weight)
    exact, (exact_grad,) = reference_value_and_grads([weight], **geometry)
    loss_error, grad_error = tolerance(device, dtype)
    assert loss.shape == () and loss.dtype == dtype and grad.dtype == dtype
    assert grad.stride() == weight.stride()
    torch.testing.assert_close(loss.double(), exact, rtol=loss_error, atol=1e-6)
    assert (grad.double() - exact_grad).norm() <= grad_error * exact_grad.norm() + 1e-5


@both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_weights_are_computed_in_float32(dtype, device):
    weight = weights_like((16, 16, 3, 3), "random", device, dtype).requires_grad_()
    loss = functional.orthogonality_loss(weight)
    (grad,) = torch.autograd.grad(loss, weight)
    exact, (exact_grad,) = reference_value_and_grads([weight])
    assert loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    assert relative(grad, exact_grad) < 1e-2


def network(device, dtype=torch.float64, more=()):
    """A list with repeated shapes, mixed ranks and geometries, as one call sees it; `more` of LAYERS."""
    specs = [LAYERS[n] for n in (0, 1, 0, 3, 8, 0, 13, 10, 11, *more)]
    weights = [weights_like(spec[0], "random", device, dtype).requires_grad_() for spec in specs]
    stride, dilation, groups = ([spec[i] for spec in specs] for i in (1, 2, 3))
    return weights, dict(stride=stride, dilation=dilation, groups=groups, penalty="lorth")


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_whole_list_is_the_sum(dtype, device):
    weights, geometry = network(device, dtype, more=[LAYERS.index(OVER_FREQUENCIES)])
    loss = functional.orthogonality_loss(weights, **geometry)
    grads = torch.autograd.grad(loss, weights)
    exact, exact_grads = reference_value_and_grads(weights, **geometry)
    loss_error, grad_error = tolerance(device, dtype)
    torch.testing.assert_close(loss.double(), exact, rtol=loss_error, atol=0)
    for grad, want in zip(grads, exact_grads):
        assert relative(grad, want) < grad_error


@both_forms
def test_two_forwards_before_a_backward(device):
    weights, geometry = network(device, torch.float32)
    first = functional.orthogonality_loss(weights, **geometry)
    with torch.no_grad():
        kept = [w.clone() for w in weights]
    other = [(2 * w.detach()).requires_grad_() for w in weights]
    functional.orthogonality_loss(other, **geometry)
    first.backward()
    _, exact = reference_value_and_grads(kept, **geometry)
    for w, want in zip(weights, exact):
        assert relative(w.grad, want) < 1e-2


@both_forms
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_of_any_layout(layout, device):
    weight = LAYOUTS[layout](torch.randn(8, 6, 3, 3, device=device)).requires_grad_()
    (grad,) = torch.autograd.grad(functional.orthogonality_loss(weight), weight)
    _, (exact,) = reference_value_and_grads([weight])
    assert relative(grad, exact) < 1e-2
    if layout != "sliced":
        assert grad.stride() == weight.stride()


@both_forms
def test_weights_that_need_no_gradient(device):
    weights, geometry = network(device, torch.float32)
    weights[1].requires_grad_(False)
    functional.orthogonality_loss(weights, **geometry).backward()
    assert [w.grad is not None for w in weights] == [n != 1 for n in range(len(weights))]
    with torch.no_grad():
        assert not functional.orthogonality_loss(weights, **geometry).requires_grad


@both_forms
def test_no_grad_keeps_nothing(device):
    weights, _ = network(device, torch.float32)
    problem = problem_of(weights[:1], "isonet")
    assert ops.orthogonality_loss([weights[0].detach()], problem.text, False)[2] == []


def problem_of(weights, penalty, part=(0, 1), coefficients=None, stride=1):
    layers = tuple(checked_layer(w, stride, 1, 1, penalty) for w in weights)
    return Problem(layers, tuple(coefficients or [1.0] * len(layers)), None, part)


@both_forms
def test_autocast_leaves_the_penalty_in_float32(device):
    """torch.mm inside a custom op obeys autocast unless it is disabled there."""
    weight = weights_like((32, 32, 3, 3), "near", device, torch.float32).requires_grad_()
    exact, (exact_grad,) = reference_value_and_grads([weight])
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = functional.orthogonality_loss(weight)
        (grad,) = torch.autograd.grad(loss, weight)
    loss_error, grad_error = tolerance(device, torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=loss_error, atol=0)
    assert relative(grad, exact_grad) < grad_error


@both_forms
def test_gradcheck(device):
    for penalty in PENALTIES:
        weight = torch.randn(4, 2, 3, 2, dtype=torch.double, device=device, requires_grad=True)
        other = torch.randn(3, 5, dtype=torch.double, device=device, requires_grad=True)
        f = lambda *w: functional.orthogonality_loss(w, stride=[2, 1], groups=[2, 1], penalty=penalty)  # noqa: B023
        assert torch.autograd.gradcheck(f, (weight, other), fast_mode=True)


@both_forms
def test_opcheck(device):
    # Triton's panels must be full: what pads them is never written, and opcheck compares everything
    shapes = [(128, 256, 1, 1), (256, 128)] if served_by_triton(device) else [(4, 4, 3, 3), (4, 6)]
    weights = [torch.randn(shape, device=device) for shape in shapes]
    problem = problem_of(weights, "isonet", coefficients=[0.5, 2.0])
    opcheck(ops.orthogonality_loss.default, (weights, problem.text, True))
    loss, _, saved = ops.orthogonality_loss(weights, problem.text, True)
    opcheck(ops.orthogonality_loss_backward.default, (loss, saved, weights, problem.text))


@both_forms
def test_opcheck_of_a_layer_that_triton_computes_over_frequencies(device):
    """Without the check that compares everything, padding included."""
    weights = [torch.randn(9, 12, 11, device=device)]
    problem = problem_of(weights, "isonet")
    assert problem.layers[0].triton_form == "frequency"
    checks = ("test_schema", "test_faketensor")
    opcheck(ops.orthogonality_loss.default, (weights, problem.text, True), test_utils=checks)
    loss, _, saved = ops.orthogonality_loss(weights, problem.text, True)
    opcheck(ops.orthogonality_loss_backward.default, (loss, saved, weights, problem.text), test_utils=checks)


def test_the_bare_op_refuses_to_lose_a_gradient(device):
    weight = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    problem = problem_of([weight], "isonet")
    with pytest.raises(RuntimeError, match=r"not differentiable by itself.*functional.orthogonality_loss"):
        ops.orthogonality_loss([weight], problem.text, True)
    with torch.no_grad():
        assert ops.orthogonality_loss([weight], problem.text, True)[0] > 0


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_compile_with_dynamic_shapes(layout, device):
    f = lambda w: functional.orthogonality_loss(w, stride=2)
    compiled = torch.compile(f, fullgraph=True, dynamic=True)
    for shape in ((6, 4, 3, 3), (5, 4, 3, 3)):
        weight = torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_()
        want, got = torch.autograd.grad(f(weight), weight), torch.autograd.grad(compiled(weight), weight)
        torch.testing.assert_close(got, want)


@both_forms
@pytest.mark.usefixtures("compiler")
def test_compile_fullgraph_forward_and_backward(device):
    weights, geometry = network(device, torch.float32)
    f = lambda *w: 3 * functional.orthogonality_loss([v * 1 for v in w], **geometry)
    compiled = torch.compile(f, fullgraph=True)
    want, got = torch.autograd.grad(f(*weights), weights), torch.autograd.grad(compiled(*weights), weights)
    for a, b in zip(want, got):
        torch.testing.assert_close(a, b)


@both_forms
def test_functional_call_sees_the_swapped_weight(device):
    conv = torch.nn.Conv2d(4, 4, 3, device=device)

    class Penalty(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv

        def forward(self):
            return functional.orthogonality_loss(self.conv.weight)

    swapped = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    loss = torch.func.functional_call(Penalty(), {"conv.weight": swapped}, ())
    (grad,) = torch.autograd.grad(loss, swapped)
    exact, (exact_grad,) = reference_value_and_grads([swapped])
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=0)
    assert relative(grad, exact_grad) < 1e-2


@both_forms
def test_a_second_derivative_is_refused(device):
    weight = torch.randn(4, 4, 3, 3, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*reference.orthogonality_loss"):
        torch.autograd.grad(functional.orthogonality_loss(weight), weight, create_graph=True)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_accumulate_grad_is_the_gradient_added(dtype, device):
    weights, geometry = network(device, dtype)
    layers = tuple(
        checked_layer(w, s, e, g, "lorth")
        for w, s, e, g in zip(weights, *[geometry[k] for k in ("stride", "dilation", "groups")])
    )
    problem = Problem(layers, tuple(0.1 * (n + 1) for n in range(len(weights))), None, (0, 1))
    total, losses = orthogonality.loss(weights, problem)
    expected = [3 * g + 1 for g in torch.autograd.grad(total, weights)]
    grads = [torch.ones_like(w) for w in weights]
    total_again, losses_again = orthogonality.accumulate_grad_(weights, grads, problem, 3.0)
    torch.testing.assert_close(total_again, total.detach())
    torch.testing.assert_close(losses_again, losses)
    for grad, want in zip(grads, expected):
        torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-5)


@both_forms
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 60])
def test_shares_of_all_ranks_add_up(ranks, device):
    """Over (layer, unit) pairs: loss, each layer's penalty and every gradient, also with more ranks than units."""
    weights, _ = network(device)
    weights = [w for w in weights if w.dim() == 4 and w.shape[1] > 1]
    whole = problem_of(weights, "lorth", stride=2)
    total, losses = orthogonality.loss(weights, whole)
    grads = torch.autograd.grad(total, weights)
    parts = [problem_of(weights, "lorth", (rank, ranks), stride=2) for rank in range(ranks)]
    shares = [orthogonality.loss(weights, part) for part in parts]
    torch.testing.assert_close(sum(s[0] for s in shares), total, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(s[1] for s in shares), losses, rtol=1e-12, atol=1e-12)
    share_grads = [torch.autograd.grad(s[0], weights) for s in shares]
    for n, grad in enumerate(grads):
        torch.testing.assert_close(sum(g[n] for g in share_grads), grad, rtol=1e-12, atol=1e-12)


def test_shares_are_balanced_for_isonet_50_on_eight_ranks(form):
    layers = []
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for n in range(blocks):
            inputs = (64 if width == 64 else 2 * width) if n == 0 else 4 * width
            for shape in ((width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                layers.append(Layer(shape, (1, 1), (1, 1), 1, "isonet"))
    layers = tuple(layers)
    shares = [split_work(layers, r, 8, [form] * len(layers)) for r in range(8)]
    work = [sum(layer.work(form, u) for layer, us in zip(layers, share) for u in us) for share in shares]
    assert max(work) <= 1.01 * sum(work) / 8 and min(work) >= 0.99 * sum(work) / 8
    units = [(n, u) for share in shares for n, us in enumerate(share) for u in us]
    assert sorted(units) == sorted((n, u) for n, layer in enumerate(layers) for u in layer.units(form))


def test_half_of_the_offsets_covers_all():
    layer = Layer((4, 4, 3, 5), (1, 2), (1, 1), 1, "isonet")
    half = layer.offsets
    assert half[0] == (0, 0)
    mirrored = {tuple(-x for x in t) for t in half}
    every = {(a, b) for a in range(-2, 3) for b in range(-4, 5) if b % 2 == 0}
    assert set(half) | mirrored == every and set(half) & mirrored == {(0, 0)}


@pytest.mark.parametrize("most, batches", [(2**19, [5, 1]), (3 * 576, [3, 2, 1]), (1, [1] * 6)])
def test_layers_of_one_shape_are_a_batch_as_far_as_the_limit(most, batches, form, monkeypatch, device):
    monkeypatch.setattr(closed_form, "BATCH", most)
    sizes = []
    module = closed_form.FORMS[form]
    original = module.batch
    monkeypatch.setattr(module, "batch", lambda taps, *rest: sizes.append(len(taps)) or original(taps, *rest))
    weights = [torch.randn(8, 8, 3, 3, dtype=torch.double, device=device) for _ in range(5)]
    functional.orthogonality_loss([*weights, weights[0].flatten(1)])
    assert sizes == batches


@both_forms
def test_tall_lorth_layers_take_float32(device):
    """At their optimum R is a projector, not zero: in bf16 the gradient would be noise."""
    tall = init.delta_(torch.empty(64, 3, 3, 3, device=device), stride=2)
    weights = [
        weights_like((16, 16, 3, 3), "near", device, torch.float32).requires_grad_(),
        (tall + 1e-3 * torch.randn(64, 3, 3, 3).to(device)).requires_grad_(),
    ]
    problem = problem_of(weights, "lorth", stride=2)
    assert [(members, part.precision) for members, part in problem.by_precision] == [([0], None), ([1], "highest")]
    total, losses = orthogonality.loss(weights, problem)
    grads = torch.autograd.grad(total, weights)
    added = [torch.zeros_like(w) for w in weights]
    again, losses_again = orthogonality.accumulate_grad_(weights, added, problem, 1.0)
    exact, exact_grads = reference_value_and_grads(weights, stride=2, penalty="lorth")
    torch.testing.assert_close(total.double(), exact, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.stack([total, losses.sum()]), torch.stack([again, losses_again.sum()]))
    for grad, same, want in zip(grads, added, exact_grads):
        assert relative(grad, want) < 1e-2
        torch.testing.assert_close(grad, same, rtol=1e-5, atol=1e-6)


@both_forms
@pytest.mark.parametrize("stride, precision", [(1, None), (2, "highest")])
def test_a_list_of_one_kind_is_one_call_in_its_precision(stride, precision, device, monkeypatch):
    weights = [torch.randn(64, 3, 3, 3, device=device) for _ in range(2)]
    problem = problem_of(weights, "lorth", stride=stride)
    seen = []
    read, add = orthogonality.read, orthogonality._accumulate_grad_
    monkeypatch.setattr(orthogonality, "read", lambda *args: seen.append(read(*args)) or seen[-1])
    monkeypatch.setattr(orthogonality, "_accumulate_grad_", lambda *args: seen.append(args[2]) or add(*args))
    orthogonality.loss(weights, problem)
    orthogonality.accumulate_grad_(weights, [torch.zeros_like(w) for w in weights], problem, 1.0)
    assert [(part.precision, len(part.layers)) for part in seen] == [(precision, 2)] * 2


def test_errors_name_the_argument(device):
    weight = torch.randn(4, 4, 3, 3, device=device)
    loss = functional.orthogonality_loss
    with pytest.raises(ValueError, match=r"weights must be \(O, I/groups, \*kernel\).*got shape \(4,\)"):
        loss(weight[:, 0, 0, 0])
    with pytest.raises(ValueError, match="0 to 3 kernel dimensions"):
        loss(weight.view(4, 4, 3, 3, 1, 1))
    with pytest.raises(TypeError, match="weights must be float32, .*got torch.int32"):
        loss(weight.int())
    with pytest.raises(TypeError, match="weights must be tensors, got int"):
        loss([3])
    with pytest.raises(ValueError, match=re.escape(f"penalty must be one of {tuple(PENALTIES)}, got 'conv'")):
        loss(weight, penalty="conv")
    with pytest.raises(ValueError, match=r"precision must be one of \(None, 'highest'\), got 'tf32'"):
        loss(weight, precision="tf32")
    with pytest.raises(ValueError, match="groups must be a positive divisor of the 4 output channels, got 3"):
        loss(weight, groups=3)
    with pytest.raises(ValueError, match="stride must be a positive int or a tuple of 2 of them, got 0"):
        loss(weight, stride=0)
    with pytest.raises(ValueError, match=r"dilation must be a positive int or a tuple of 2 of them, got \(1, 1, 1\)"):
        loss(weight, dilation=(1, 1, 1))
    with pytest.raises(ValueError, match="stride is a list of 2 entries for 1 weights"):
        loss([weight], stride=[1, 1])
    with pytest.raises(ValueError, match="every weight must be on the device of the first"):
        loss([weight, weight.to("meta")])


def test_an_empty_list_is_zero():
    assert functional.orthogonality_loss([]).item() == 0
