"""What the penalty and `accumulate_grad_` take and refuse: kinds of tensors, gradients, scales, geometry; rounding."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer, functional, init, reference
from isonet_fast.geometry import PENALTIES
from isonet_fast.ops import library

loss = functional.orthogonality_loss

both_forms = pytest.mark.usefixtures("form")


def matrix():
    return torch.randn(4, 6)


@pytest.mark.parametrize(
    "make, message",
    {
        "sparse": (lambda: matrix().to_sparse(), "weights must be dense, got the layout sparse_coo"),
        "sparse rows": (lambda: matrix().to_sparse_csr(), "weights must be dense, got the layout sparse_csr"),
        "mkldnn": (lambda: torch.randn(4, 4, 3, 3).to_mkldnn(), "weights must be dense, got the layout mkldnn"),
        "nested": (lambda: torch.nested.nested_tensor([matrix()]), "weights must be dense, got a nested tensor"),
        "complex": (lambda: matrix().to(torch.complex64), "weights must be float32, .*got torch.complex64"),
        "none": (lambda: None, "weights must be a tensor or a list of tensors, got NoneType"),
        "none in a list": (lambda: [None], "weights must be tensors, got NoneType"),
        "number": (lambda: 5, "weights must be a tensor or a list of tensors, got int"),
        "text": (lambda: "weight", "weights must be a tensor or a list of tensors, got str"),
        "dict": (lambda: {"weight": matrix()}, "weights must be a tensor or a list of tensors, got dict"),
        "module": (lambda: nn.Linear(2, 2), "weights must be a tensor or a list of tensors, got Linear"),
    }.values(),
)
def test_what_is_no_dense_floating_point_tensor_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        loss(make())


@pytest.mark.parametrize("size", [4, 140], ids=["small", "large"])
def test_negative_bit_and_conjugate_views_count_with_their_values(size):
    other = torch.randn(size, size, dtype=torch.complex64).conj()
    for view in (torch._neg_view(torch.randn(size, size)), other.imag, other.real):
        weight = view.detach().requires_grad_()
        assert torch.equal(loss(view), loss(view.clone()))
        (grad,) = torch.autograd.grad(loss(weight), weight)
        plain = weight.detach().clone().requires_grad_()
        torch.testing.assert_close(grad, torch.autograd.grad(loss(plain), plain)[0])


@pytest.mark.parametrize("name", ["stride", "dilation"])
@pytest.mark.parametrize(
    "value",
    [None, 1.5, True, (True, 1), "11", {1: 1}, iter((1, 1)), torch.tensor(1), (1, 1, 1), 0, [None]],
    ids=lambda value: re.sub(" object at .*", "", str(value)),  # no address: every test process must use the same name
)
def test_steps_that_are_no_ints_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive int or a tuple of 2 of them, got "):
        loss([torch.randn(4, 4, 3, 3)], **{name: value})


@pytest.mark.parametrize("value", [None, True, 2.0, "2", (2,), torch.tensor(2), 0, 3])
def test_groups_that_are_no_divisor_are_refused(value):
    with pytest.raises(ValueError, match="groups must be a positive divisor of the 4 output channels, got "):
        loss(torch.randn(4, 4, 3, 3), groups=value)


@pytest.mark.parametrize(
    "value", [None, 3, b"isonet", ["isonet"], {}, np.zeros(2), torch.nested.nested_tensor([torch.ones(2)]), "conv"]
)
def test_a_penalty_that_is_no_known_name_is_refused(value):
    for weights in (torch.randn(4, 4), []):
        with pytest.raises(ValueError, match=re.escape(f"penalty must be one of {tuple(PENALTIES)}, got ")):
            loss(weights, penalty=value)


@pytest.mark.parametrize("value", [3, [], np.zeros(2), "tf32"])
def test_a_precision_that_is_no_known_name_is_refused(value):
    for weights in (torch.randn(4, 4), []):
        with pytest.raises(ValueError, match=r"precision must be one of \(None, 'highest'\), got "):
            loss(weights, precision=value)


def test_ints_of_numpy_and_weights_from_a_generator():
    weights = [torch.randn(4, 4, 3, 3), torch.randn(6, 4, 3, 3)]
    expected = loss(weights, stride=2, groups=2, dilation=[1, 3])
    assert loss((w for w in weights), stride=np.int64(2), groups=np.int32(2), dilation=[1, np.int64(3)]) == expected
    assert loss(iter(weights), stride=(2, np.int64(2)), groups=2, dilation=[1, 3]) == expected


def test_delta_takes_the_same_geometry():
    with pytest.raises(TypeError, match="weights must be dense, got the layout sparse_coo"):
        init.delta_(torch.zeros(4, 4).to_sparse())
    with pytest.raises(ValueError, match="stride must be a positive int"):
        init.delta_(torch.zeros(4, 4, 3, 3), stride=True)


def network():
    """A small layer, one above the limit of the compiled kernel, one without a gradient yet."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 160, 3), nn.Conv2d(160, 130, 1), nn.Conv2d(4, 4, 1))


def put(weight, grad):
    weight.grad_dtype = None  # lets `.grad` have another dtype
    weight.grad = grad


REFUSED = {
    "sparse": (lambda w: torch.ones_like(w).to_sparse(), TypeError, "must be dense, got the layout sparse_coo"),
    "int": (lambda w: torch.ones_like(w).int(), TypeError, "must be float32, .*got torch.int32"),
    "complex": (lambda w: torch.ones_like(w).to(torch.complex64), TypeError, "got torch.complex64"),
    "expanded": (lambda w: torch.ones(1, 1, 1, 1).expand(w.shape), ValueError, "share memory"),
    "overlapping": (lambda w: torch.ones(9999).as_strided(w.shape, (1, 1, 1, 1)), ValueError, "share memory"),
}


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("make, error, message", REFUSED.values(), ids=REFUSED)
def test_a_gradient_that_nothing_can_be_added_to_is_refused_before_any_changes(make, error, message, position):
    net = network()
    weights = [conv.weight for conv in net]
    for weight in weights[:3]:
        put(weight, torch.ones_like(weight))
    put(weights[position], make(weights[position]))
    shape = ", ".join(map(str, weights[position].shape))
    with pytest.raises(error, match=rf"the \.grad of the weight of shape \({shape}\).*{message}"):
        OrthoRegularizer(net).accumulate_grad_()
    assert weights[3].grad is None
    for n, weight in enumerate(weights[:3]):
        assert n == position or (weight.grad == 1).all()


ADDED_TO = {
    "double": lambda w: torch.ones_like(w).double(),
    "half": lambda w: torch.ones_like(w).half(),
    "bfloat16": lambda w: torch.ones_like(w).bfloat16(),
    "negative bit": lambda w: torch._neg_view(-torch.ones_like(w)),
    "with gaps": lambda w: torch.ones(*w.shape[:3], 2 * w.shape[3])[..., ::2],
    "interleaved": lambda w: (
        torch.ones(w.numel() * 7).as_strided(w.shape, (*w.stride()[:2], 2, 3))
        if w.shape[2:] == (2, 2)
        else torch.ones_like(w).transpose(2, 3).clone().transpose(2, 3)
    ),
    "channels_last": lambda w: torch.ones_like(w, memory_format=torch.channels_last),
}


@both_forms
@pytest.mark.parametrize("make", ADDED_TO.values(), ids=ADDED_TO)
def test_a_gradient_of_another_kind_is_added_to(make):
    net, plain = network(), network()
    for conv in net:
        put(conv.weight, make(conv.weight))
    for reg in (OrthoRegularizer(net), OrthoRegularizer(plain)):
        reg.accumulate_grad_(1e3)
    for conv, other in zip(net, plain):
        error = torch.finfo(conv.weight.grad.dtype).eps * (1 + other.weight.grad.abs().max()) + 1e-6
        torch.testing.assert_close(conv.weight.grad.double(), 1 + other.weight.grad.double(), rtol=0, atol=error.item())


@pytest.mark.parametrize(
    "scale, error",
    [(None, TypeError), ("2", TypeError), (1j, TypeError), (True, TypeError), ([2], TypeError),
     (torch.ones(2), TypeError), (torch.tensor(1j), TypeError), (10**400, ValueError), (1e39, ValueError),
     (float("nan"), ValueError), (-float("inf"), ValueError)],
    ids=str,
)  # fmt: skip
def test_a_scale_that_is_no_finite_real_number_is_refused_before_any_gradient_changes(scale, error):
    net = network()
    reg = OrthoRegularizer(net, interval=2)
    with pytest.raises(error, match="grad_scale must be "):
        reg.accumulate_grad_(scale)
    assert all(conv.weight.grad is None for conv in net) and reg.state_dict() == {"calls": 0}


@both_forms
@pytest.mark.parametrize("scale", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor([2])], ids=str)
def test_a_scale_may_be_any_real_number(scale):
    net, plain = network(), network()
    OrthoRegularizer(net).accumulate_grad_(scale)
    OrthoRegularizer(plain, coeff=2e-4).accumulate_grad_()
    torch.testing.assert_close(net[1].weight.grad, plain[1].weight.grad)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled kernel", "closed form"])
@pytest.mark.parametrize("shape", [(16, 3), (3, 16), (16, 1), (64, 2), (128, 8), (5, 129), (2, 4, 3, 3), (16, 1, 5)])
def test_the_gradient_of_few_rows_is_exact_near_the_optimum(shape, compiled, monkeypatch):
    """G - I is a small difference, and with few rows its rounding errors do not average out."""
    if compiled and library.why_not_compiled:
        pytest.skip(library.why_not_compiled)
    if not compiled:
        monkeypatch.setattr(library, "compiled_for", lambda device: False)
    for seed in range(100):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for weight in (init.delta_(torch.empty(shape)), nn.init.orthogonal_(torch.empty(shape)), 0 * noise):
            weight = (weight + 1e-3 * noise).requires_grad_()
            (grad,) = torch.autograd.grad(loss(weight, penalty="isonet"), weight)
            wide = weight.detach().double().requires_grad_()
            (exact,) = torch.autograd.grad(reference.orthogonality_loss(wide), wide)
            scale = max(exact.norm(), 1e-2 * wide.norm())
            assert (grad - exact).norm() <= 1e-4 * exact.norm() and (grad - exact).norm() <= 1e-6 * scale
