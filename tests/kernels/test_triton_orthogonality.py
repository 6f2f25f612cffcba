"""The Triton kernels against the float64 reference: every geometry, layout and precision, several layers a call.

Tolerances are those of a bf16x3 gram with a bf16 gradient product, or of float32 (docs/design.md, docs/gpu-notes.md).
"""

import contextlib
import statistics
import weakref

import pytest
import torch

from isonet_fast import reference
from isonet_fast.geometry import Layer
from isonet_fast.problem import Problem

LOSS, GRADIENT = {None: 6e-5, "highest": 6e-6}, {None: 1e-2, "highest": 3e-4}

# shape, stride, dilation, groups, penalty: a list is one call
CASES = {
    "3x3": [((20, 20, 3, 3), 1, 1, 1, "isonet"), ((24, 8, 3, 3), 2, 1, 1, "isonet"), ((8, 24, 3, 3), 3, 1, 1, "lorth")],
    "dilation": [
        ((6, 10, 3, 3), 1, 2, 1, "isonet"),
        ((12, 6, 3, 3), 2, 2, 1, "lorth"),
        ((9, 7, 3, 3), 3, 2, 1, "isonet"),
    ],
    "5x5": [((7, 5, 5, 5), 2, 1, 1, "isonet"), ((5, 5, 5, 1), 1, 2, 1, "lorth")],
    "7x7": [((6, 9, 7, 7), 3, 1, 1, "isonet")],
    "2x2": [((70, 30, 2, 2), 1, 1, 1, "lorth"), ((12, 16, 2, 2), 2, 1, 1, "isonet"), ((16, 3, 2, 2), 2, 1, 1, "lorth")],
    "1-d": [((18, 33, 1), 1, 1, 1, "isonet"), ((33, 18, 3), 1, 1, 1, "isonet"), ((9, 9, 5), 2, 1, 1, "isonet")],
    "1x3": [((11, 13, 1, 3), 1, 1, 1, "isonet"), ((13, 11, 3, 1), 2, 1, 1, "isonet")],
    "3-d": [
        ((6, 5, 2, 2, 3), 1, 1, 1, "isonet"),
        ((5, 6, 3, 1, 2), 2, 1, 1, "isonet"),
        ((4, 4, 1, 3, 2), 1, 1, 1, "lorth"),
    ],
    "groups": [
        ((24, 6, 3, 3), 1, 1, 2, "isonet"),
        ((90, 1, 3, 3), 1, 1, 90, "isonet"),
        ((140, 70, 1, 1), 1, 1, 2, "lorth"),
        ((18, 4, 2), 2, 1, 3, "lorth"),
    ],
    "matrix": [
        ((20, 6, 3, 3), 1, 1, 1, "matrix"),
        ((40, 3, 2, 2), 2, 1, 1, "matrix"),
        ((12, 4, 3), 1, 1, 2, "matrix"),
        ((30, 50), 1, 1, 1, "isonet"),
        ((50, 30), 1, 1, 1, "lorth"),
    ],
    "frequencies": [
        ((9, 12, 11), 1, 1, 1, "isonet"),
        ((20, 9, 12), 2, 2, 1, "lorth"),
        ((27, 9, 11, 1), 1, 1, 3, "isonet"),
    ],
    "many frequencies": [
        ((70, 9, 12), 1, 1, 1, "isonet"),
        ((9, 12, 5, 5), 1, 1, 1, "isonet"),
        ((10, 9, 7, 7), 1, 2, 1, "lorth"),
        ((10, 9, 3, 3, 3), 1, 1, 1, "isonet"),
    ],
    "wide": [
        ((100, 300, 1, 1), 1, 1, 1, "isonet"),
        ((200, 260, 1), 1, 1, 1, "isonet"),
        ((256, 128, 2), 1, 1, 1, "isonet"),
        ((300, 200, 1), 1, 1, 1, "matrix"),
        ((64, 256, 1), 1, 1, 1, "isonet"),
    ],
}
# near an optimum, where G - I is a small difference: benchmarks/results/accuracy.csv has errors by size
NEAR = [
    ((64, 64, 3, 3), 1, 1, 1, "isonet"),
    ((128, 128, 1, 1), 1, 1, 1, "isonet"),
    ((256, 128, 1), 1, 1, 1, "lorth"),
    ((64, 16, 2, 2), 1, 1, 1, "matrix"),
    ((256, 256, 1, 1), 1, 1, 1, "isonet"),
    ((32, 32, 5, 5), 1, 1, 1, "isonet"),
]


def near_orthogonal(shape, penalty):
    """Orthogonal (matrix: flattened; else: the middle tap), then moved by 1e-3 of its norm."""
    weight = torch.zeros(shape)
    if penalty == "matrix":
        torch.nn.init.orthogonal_(weight)
    else:
        torch.nn.init.orthogonal_(weight[(slice(None), slice(None), *(k // 2 for k in shape[2:]))])
    noise = torch.randn(shape)
    return weight + 1e-3 * noise * (weight.norm() / noise.norm())


def make(cases, device, near=False, dtype=torch.float32, layout=torch.contiguous_format):
    torch.manual_seed(len(cases))
    layers, weights = [], []
    for shape, stride, dilation, groups, penalty in cases:
        dims = len(shape) - 2
        layers.append(Layer(shape, (stride,) * dims, (dilation,) * dims, groups, penalty))
        fan = shape[1] * max(1, torch.Size(shape[2:]).numel())
        weight = near_orthogonal(shape, penalty) if near else torch.randn(shape) / fan**0.5
        weight = weight.to(device, dtype)
        if len(shape) == 4 or (len(shape) == 5 and layout != torch.contiguous_format):
            weight = weight.to(memory_format=layout if len(shape) == 4 else torch.channels_last_3d)
        weights.append(weight)
    return tuple(layers), weights


def expected(weight, layer):
    """Penalty and gradient in float64, on the CPU."""
    weight = weight.detach().double().cpu().requires_grad_()
    loss = reference.orthogonality_loss(
        weight, stride=layer.stride, dilation=layer.dilation, groups=layer.groups, penalty=layer.penalty
    )
    (grad,) = torch.autograd.grad(loss, weight)
    return loss.item(), grad


def relative(actual, wanted):
    return ((actual.cpu().double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def check(layers, weights, precision=None):
    """Loss, gradient, their dtypes and strides; returns the relative errors of the losses."""
    from isonet_fast.kernels import orthogonality as kernels

    coefficients = tuple(0.5 + n for n in range(len(layers)))
    problem = Problem(tuple(layers), coefficients, precision)
    loss, losses, saved = kernels.forward(weights, problem, True)
    scale = torch.tensor(3.0, device=weights[0].device)
    grads = kernels.backward(scale, saved, weights, problem)
    total, errors = 0.0, []
    for weight, layer, coefficient, actual, grad in zip(weights, layers, coefficients, losses, grads, strict=True):
        penalty, wanted = expected(weight, layer)
        # `lorth` subtracts a constant: what it is subtracted from decides the rounding
        errors.append(abs(actual.item() - penalty) / (penalty + layer.constant))
        assert relative(grad, 3 * coefficient * wanted) <= GRADIENT[precision] + 4e-3 * (weight.dtype.itemsize == 2)
        assert (grad.dtype, grad.stride()) == (weight.dtype, torch.empty_like(weight).stride())
        total += coefficient * actual.item()
    assert abs(loss.item() - total) <= 1e-6 * abs(total)
    for empty, tensor in zip(kernels.saved_like(weights, problem), saved, strict=True):
        assert (empty.shape, empty.dtype) == (tensor.shape, tensor.dtype)
    return errors


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_match_the_reference(name, device):
    assert max(check(*make(CASES[name], device))) <= LOSS[None]


@pytest.mark.parametrize("precision", [None, "highest"])
def test_near_an_optimum(precision, device):
    """The error of one loss has a random sign, hence the median."""
    assert statistics.median(check(*make(NEAR, device, near=True), precision=precision)) <= LOSS[precision]


@pytest.mark.parametrize("name", ["2x2", "groups", "wide", "frequencies"])
def test_both_ways_of_loading(name, variant, device):
    if variant == "tma" and device.type == "cpu":
        pytest.skip("the default of the interpreter")
    assert max(check(*make(CASES[name][:3], device))) <= LOSS[None]


@pytest.mark.parametrize("name", ["2x2", "matrix", "1x3", "frequencies"])
def test_highest_precision_matches_the_reference(name, device):
    assert max(check(*make(CASES[name], device), precision="highest")) <= LOSS["highest"]


@pytest.mark.parametrize("name", ["1x3", "3-d", "matrix", "frequencies"])
def test_channels_last_weights_match_the_reference(name, device):
    assert max(check(*make(CASES[name], device, layout=torch.channels_last))) <= LOSS[None]


@pytest.mark.parametrize(
    ("shapes", "layout", "paths"),
    [
        ([(64, 128, 1, 1), (128, 64, 1, 1)], torch.contiguous_format, [1, 2]),
        ([(64, 128, 1, 3), (128, 64, 1, 3)], torch.channels_last, [1, 2]),
        ([(256, 128, 1), (128, 256, 1)], torch.contiguous_format, [2, 1]),
    ],
)
def test_whole_tiles_are_stored_in_vectors(shapes, layout, paths, device):
    """Both 16-byte paths, stored and added to: contiguous columns (1), and contiguous rows (2). Gradients elsewhere, as
    DDP's buckets place them, are contiguous too, 4 bytes at a time (3, 4). The same bits each time."""
    from isonet_fast.kernels import orthogonality as kernels
    from isonet_fast.kernels.layout import VIEW

    layers, weights = make([(shape, 1, 1, 1, "isonet") for shape in shapes], device, layout=layout)
    assert max(check(layers, weights)) <= LOSS[None]
    problem = Problem(layers, (1.0, 1.0))
    tables = kernels.tables_of(problem, weights[0].device)
    path = VIEW.fields["path"][1] // 8
    assert tables.flat(weights)[1].tensor[:, path].tolist() == paths
    aligned = [torch.ones_like(w) for w in weights]
    elsewhere = [torch.ones(w.numel() + 1, device=device)[1:].as_strided(w.shape, w.stride()) for w in weights]
    for grads, chosen in ((aligned, paths), (elsewhere, [n + 2 for n in paths])):
        again = [g.clone(memory_format=torch.preserve_format) for g in grads]
        kernels.accumulate_grad_(weights, again, problem, 0.5)
        kernels.accumulate_grad_(weights, grads, problem, 0.5)
        assert all(torch.equal(a, b) for a, b in zip(again, grads, strict=True))
        assert tables._views["add"][0].table.tensor[:, path].tolist() == chosen
        for weight, layer, grad in zip(weights, layers, grads, strict=True):
            assert relative(2 * (grad - 1), expected(weight, layer)[1]) <= GRADIENT[None]


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3), (4, 4, 0, 3), (0, 0)])
def test_an_empty_weight_beside_another(shape, device):
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make([(shape, 1, 1, 1, "isonet"), CASES["1x3"][0]], device)
    problem = Problem(layers, (1.0, 1.0))
    _, losses, saved = kernels.forward(weights, problem, True)
    empty, grad = kernels.backward(torch.ones((), device=device), saved, weights, problem)
    assert losses[0].item() == reference.orthogonality_loss(weights[0]).item() and empty.shape == shape
    assert relative(grad, expected(weights[1], layers[1])[1]) <= GRADIENT[None]


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_plays_no_part(default, device):
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make(CASES["1-d"][:1] + CASES["matrix"][:1], device)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert max(check(layers, weights)) <= LOSS[None]
        grads = [torch.zeros_like(w, dtype=torch.bfloat16) for w in weights]
        kernels.accumulate_grad_(weights, grads, Problem(layers, (1.0, 1.0)), 1.0)
    finally:
        torch.set_default_dtype(before)
    for weight, layer, grad in zip(weights, layers, grads, strict=True):
        assert relative(grad, expected(weight, layer)[1]) <= GRADIENT[None] + 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(dtype, device):
    assert max(check(*make(CASES["3x3"][:2], device, dtype=dtype))) <= LOSS[None]


def test_weights_of_mixed_dtypes_match_the_reference(device):
    layers, weights = make(CASES["1-d"], device)
    check(layers, [weights[0].bfloat16(), weights[1], weights[2].half()])
    layers, weights = make(CASES["frequencies"], device)
    check(layers, [weights[0].bfloat16(), weights[1], weights[2].half()])


def test_weights_of_any_strides_match_the_reference(device):
    layers, _ = make([((12, 8, 3, 1), 1, 1, 1, "isonet"), ((12, 4, 3), 1, 1, 2, "matrix")], device)
    sliced = torch.randn(24, 16, 6, 1, device=device)[::2, ::2, ::2] / 5
    check(layers, [sliced, torch.randn(3, 4, 12, device=device).permute(2, 1, 0) / 4])
    layers, _ = make([((12, 9, 12), 1, 1, 1, "isonet")] * 2, device)  # over frequencies
    sliced = torch.randn(24, 18, 24, device=device)[::2, ::2, ::2] / 9
    check(layers, [sliced, torch.randn(12, 9, 12, device=device).permute(2, 1, 0) / 9])


def test_dirac_is_exactly_zero(device):
    from isonet_fast.kernels import orthogonality as kernels

    cases = [((16, 16, 3, 1), 1), ((8, 24, 3, 3), 2), ((9, 9, 5, 5), 1)]
    layers, weights = make([(shape, stride, 1, 1, "isonet") for shape, stride in cases], device)
    weights = [torch.nn.init.dirac_(w) for w in weights]
    problem = Problem(layers, (1.0,) * 3)
    loss, losses, saved = kernels.forward(weights, problem, True)
    assert loss.item() == 0 and losses.tolist() == [0, 0, 0]
    for grad in kernels.backward(torch.ones((), device=device), saved, weights, problem):
        assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulates_into_gradients(dtype, device):
    from isonet_fast.kernels import orthogonality as kernels

    cases = [CASES["groups"][3], CASES["1x3"][0], CASES["wide"][-1], CASES["frequencies"][0]]
    layers, weights = make(cases, device, dtype=dtype)
    coefficients = 0.5, 1.0, 2.0, 3.0
    problem = Problem(layers, coefficients)
    grads = [torch.randn_like(w) for w in weights]
    before = [g.clone().double().cpu() for g in grads]
    loss, losses = kernels.accumulate_grad_(weights, grads, problem, 0.25)
    plain, plain_losses, _ = kernels.forward(weights, problem, False)
    assert torch.equal(loss, plain) and torch.equal(losses, plain_losses)
    for weight, layer, coefficient, grad, old in zip(weights, layers, coefficients, grads, before, strict=True):
        wanted = 0.25 * coefficient * expected(weight, layer)[1]
        rounding = 8e-3 * old.norm() if dtype == torch.bfloat16 else 1e-6 * old.norm()
        assert ((grad.cpu().double() - old) - wanted).norm() <= 1e-2 * wanted.norm() + rounding


@pytest.mark.parametrize("fails", [False, True])
def test_what_the_side_stream_reads_is_kept_until_the_caller_waits(fails, device, monkeypatch):
    """Freed earlier, its memory would go to the next tensor of the caller's stream, while `finish` still reads it."""
    from isonet_fast.kernels import orthogonality as kernels
    from isonet_fast.kernels.launch import Launches
    from isonet_fast.kernels.tables import DeviceArrays

    kept = []

    class Stream:
        def wait_stream(self, other):
            if self is caller:
                kept.extend(tensor() is not None for tensor in read)

    caller, read, launch = Stream(), [], Launches.__call__

    def watched(self, key, kernel, programs, arguments, options):
        if key == "finish":
            read.extend(weakref.ref(tensor) for tensor in arguments if isinstance(tensor, torch.Tensor))
        elif fails and key[0] == "grad":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        launch(self, key, kernel, programs, arguments, options)

    layers, weights = make(CASES["1x3"], device)
    problem = Problem(layers, (1.0, 1.0))
    kernels.tables_of(problem, weights[0].device).aside = Stream()
    monkeypatch.setattr(kernels, "_on", lambda tables: contextlib.nullcontext(caller))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(DeviceArrays, "use_on", lambda self, stream: None)
    monkeypatch.setattr(Launches, "__call__", watched)
    with pytest.raises(torch.cuda.OutOfMemoryError) if fails else contextlib.nullcontext():
        kernels.accumulate_grad_(weights, [torch.zeros_like(w) for w in weights], problem, 1.0)
    assert len(kept) >= 3 and all(kept)


@pytest.mark.parametrize("count", [2, 3])
def test_shards_add_up(count, device):
    """Any subset of the units, also none, also without the unit 0 (only its rank subtracts the constant)."""
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make([CASES["2x2"][2], CASES["3-d"][0], CASES["matrix"][3], CASES["frequencies"][0]], device)
    coefficients = (1.0, 0.5, 2.0, 1.5)
    losses = torch.zeros(4, dtype=torch.float64)
    sums = [torch.zeros(w.shape, dtype=torch.float64) for w in weights]
    for rank in range(count):
        problem = Problem(layers, coefficients, None, (rank, count))
        _, part, saved = kernels.forward(weights, problem, True)
        losses += part.double().cpu()
        for total, grad in zip(sums, kernels.backward(torch.ones((), device=device), saved, weights, problem)):
            total += grad.double().cpu()
    for weight, layer, coefficient, penalty, grad in zip(weights, layers, coefficients, losses, sums, strict=True):
        loss, wanted = expected(weight, layer)
        assert abs(penalty.item() - loss) <= LOSS[None] * (loss + layer.constant)
        assert relative(grad, coefficient * wanted) <= GRADIENT[None]


def test_pieces_of_tiles_add_up_in_any_order(device):
    """Split sums are right, and have the same bits whichever program comes last: on a GPU, that is chance."""
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make([((256, 256, 5), 1, 1, 1, "isonet")], device)
    results = []
    for backwards in (False, True):
        problem = Problem(layers, (1.0,))
        tables = kernels.tables_of(problem, weights[0].device)
        assert tables.plan.gram_parts and tables.plan.grad_parts
        assert (tables.plan.runs["first"] % (256 // 64)).any()  # a piece begins within a pair of taps
        for table in (*tables.gram.values(), *tables.grad.values()) if backwards else ():
            table.copy_(table.flip(0))
        loss, _, saved = kernels.forward(weights, problem, True)
        results.append([loss, *kernels.backward(torch.ones((), device=device), saved, weights, problem)])
    added = torch.zeros_like(weights[0])
    results[0].append(added)
    kernels.accumulate_grad_(weights, [added], problem, 1.0)
    loss, *grads = results[0]
    assert torch.equal(loss, results[1][0]) and torch.equal(grads[0], results[1][1])
    wanted, gradient = expected(weights[0], layers[0])
    assert abs(loss.item() - wanted) <= LOSS[None] * wanted
    assert all(relative(grad, gradient) <= GRADIENT[None] for grad in grads)


def test_two_forwards_before_a_backward_and_same_bits(device):
    from isonet_fast.kernels import orthogonality as kernels

    layers, first = make(CASES["1-d"][:2], device)
    second = [torch.randn_like(w) for w in first]
    problem = Problem(layers, (1.0, 1.0))
    one = torch.ones((), device=device)
    saved = [kernels.forward(weights, problem, True)[2] for weights in (first, second)]
    together = [kernels.backward(one, s, w, problem) for s, w in zip(saved, (first, second))]
    for weights, grads in zip((first, second), together):
        loss, _, alone = kernels.forward(weights, problem, True)
        assert torch.equal(loss, kernels.forward(weights, problem, False)[0])
        for a, b in zip(grads, kernels.backward(one, alone, weights, problem)):
            assert torch.equal(a, b)


def test_notices_a_weight_that_moved(device):
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make(CASES["1x3"], device)
    problem = Problem(layers, (1.0, 1.0))
    loss = kernels.forward(weights, problem, False)[0]
    moved = [w.clone() for w in weights]
    for w in weights:
        w.fill_(float("nan"))
    assert torch.equal(kernels.forward(moved, problem, False)[0], loss)


def test_gradients_that_alternate_between_places_are_described_once(device, monkeypatch):
    """Described anew, they would cost 99 layers 165 microseconds of the host at every call."""
    from isonet_fast.kernels import orthogonality as kernels
    from isonet_fast.kernels.tables import Tables

    layers, weights = make(CASES["1-d"][:2], device)
    problem = Problem(layers, (1.0, 1.0))
    places = [[torch.zeros_like(w) for w in weights] for _ in range(4)]
    for grads in places:
        kernels.accumulate_grad_(weights, grads, problem, 1.0)
    monkeypatch.setattr(Tables, "_placed", None)
    for grads in places:
        kernels.accumulate_grad_(weights, grads, problem, 1.0)
    for grads in places:
        for weight, layer, grad in zip(weights, layers, grads, strict=True):
            assert relative(grad / 2, expected(weight, layer)[1]) <= GRADIENT[None]


def test_reads_nothing_that_was_not_written(device, monkeypatch):
    """Padding of the planes that no product needs is left unwritten: it must not reach a result."""
    from isonet_fast.kernels import orthogonality as kernels

    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(255)

    layers, weights = make(CASES["1x3"] + CASES["wide"][:1] + CASES["frequencies"][:1], device)
    monkeypatch.setattr(kernels.torch, "empty", poisoned)
    problem = Problem(layers, (1.0,) * 4)
    _, losses, saved = kernels.forward(weights, problem, True)
    grads = kernels.backward(torch.ones((), device=device), saved, weights, problem)
    assert losses.isfinite().all() and all(g.isfinite().all() for g in grads)


def test_nan_stays_in_its_layer(device):
    from isonet_fast.kernels import orthogonality as kernels

    layers, weights = make(CASES["1-d"], device)
    weights[1][3, 2, 1] = float("nan")
    problem = Problem(layers, (1.0,) * 3)
    loss, losses, saved = kernels.forward(weights, problem, True)
    assert loss.isnan() and losses.isnan().tolist() == [False, True, False]
    grads = kernels.backward(torch.ones((), device=device), saved, weights, problem)
    assert [bool(g.isnan().any()) for g in grads] == [False, True, False]


def test_serves_the_op_and_the_regularizer(device, monkeypatch):
    """Through autograd and through accumulate_grad_, as a model uses it."""
    import isonet_fast
    from isonet_fast.ops import orthogonality as op

    monkeypatch.setattr(op, "serves", lambda weights: True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 12, 3, 2), torch.nn.Conv2d(12, 6, 1)).to(device)
    model = model.to(memory_format=torch.channels_last)
    reg = isonet_fast.OrthoRegularizer(model, coeff=0.5)
    loss = reg()
    loss.backward()
    first = [m.weight.grad.clone() for m in model]
    assert torch.equal(reg.accumulate_grad_(), loss.detach())
    for module, grad in zip(model, first):
        penalty, wanted = expected(module.weight, Layer(tuple(module.weight.shape), module.stride, (1, 1), 1, "isonet"))
        assert relative(grad, 0.5 * wanted) <= GRADIENT[None]
        assert relative(module.weight.grad, wanted) <= GRADIENT[None]
        assert grad.stride() == module.weight.stride()
        loss = loss - 0.5 * penalty
    assert abs(loss.item()) < 1e-4
