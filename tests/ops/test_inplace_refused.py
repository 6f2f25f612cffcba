"""What an in-place SReLU or join must not be written over is refused before anything changes, as torch refuses it."""

from functools import partial

import pytest
import torch

from isonet_fast import ResidualSReLU, SReLU, functional, reference


def srelu(shortcut, x, bias):
    return functional.srelu(x, bias, inplace=True)


def join(shortcut, x, bias):
    return functional.residual_srelu(shortcut, x, bias, inplace=True)


def srelu_layer(shortcut, x, bias):
    return torch.func.functional_call(SReLU(6, inplace=True), {"srelu_bias": bias.view(1, 6, 1, 1)}, (x,))


def join_layer(shortcut, x, bias):
    return torch.func.functional_call(
        ResidualSReLU(6, inplace=True), {"srelu_bias": bias.view(1, 6, 1, 1)}, (shortcut, x)
    )


FORMS = pytest.mark.parametrize("f", [srelu, join, srelu_layer, join_layer], ids=lambda f: f.__name__)


def leaf():
    return torch.randn(4, 6, 5, 4, requires_grad=True)


def without_grad(make):
    with torch.no_grad():
        return make()


def in_inference_mode(make):
    with torch.inference_mode():
        return make()


REFUSED = {
    "leaf": (leaf, "leaf"),
    "view of a leaf": (lambda: leaf()[1:], "leaf"),
    "chunk": (lambda: (leaf() * 1).chunk(2)[0], "several views"),
    "chunk of a tensor without gradients": (lambda: torch.randn(4, 6, 5, 4).chunk(2, 3)[1], "several views"),
    "unbind": (lambda: (leaf() * 1)[None].unbind()[0], "several views"),
    "slice of a split": (lambda: (leaf() * 1).split(2)[0][1:], "several views"),
    "view under no_grad": (lambda: without_grad(partial(torch.narrow, leaf() * 1, 0, 1, 2)), "view made under no_grad"),
    "inference tensor": (lambda: in_inference_mode(lambda: torch.randn(4, 6, 5, 4)), "an inference tensor"),
    "view in inference mode": (
        lambda: in_inference_mode(partial(torch.narrow, torch.randn(4, 6, 5, 4), 0, 1, 2)),
        "view made in inference mode",
    ),
    "expanded": (lambda: (leaf() * 1)[:1].expand(4, 6, 5, 4), "share memory"),
}


@FORMS
@pytest.mark.parametrize("kind", REFUSED)
def test_refused_before_anything_changes(kind, f):
    make, message = REFUSED[kind]
    x = make()
    base = x if x._base is None else x._base
    kept, version = base.detach().clone(), base._version if not base.is_inference() else 0
    bias = torch.randn(6, requires_grad=True)
    shortcut = torch.randn(x.shape)
    with pytest.raises(RuntimeError):  # PyTorch's own in-place operation refuses it too
        make().mul_(bias[0])
    with pytest.raises(ValueError, match=f"inplace=True on (x|branch), .*{message}"):
        f(shortcut, x, bias)
    assert torch.equal(base, kept)
    if not base.is_inference():
        assert base._version == version


@FORMS
def test_overlapping_windows_are_refused(f):
    x = torch.zeros(40).as_strided((2, 6, 4), (20, 3, 1))
    kept = x.clone()
    with pytest.raises(ValueError, match="share memory"):
        f(torch.ones(2, 6, 4), x, torch.ones(6))
    assert torch.equal(x, kept)


@FORMS
def test_an_inference_bias_is_refused_before_x_changes(f):
    x = leaf() * 1
    kept, bias = x.detach().clone(), in_inference_mode(lambda: torch.ones(6))
    with pytest.raises(ValueError, match="bias is an inference tensor"):
        f(torch.ones_like(x), x, bias)
    assert torch.equal(x, kept)


ALLOWED = {
    "chunk, nothing recorded": lambda: torch.randn(4, 6, 5, 4).chunk(2)[0],
    "no_grad": lambda: (leaf() * 1).detach().chunk(2)[0],
    "slice with gaps": lambda: torch.randn(4, 6, 5, 8)[..., ::2],
}


@FORMS
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("kind", ALLOWED)
def test_written_over_where_nothing_is_recorded(kind, mode, f):
    x, bias = ALLOWED[kind](), torch.randn(6)
    shortcut = torch.randn(x.shape)
    version = x._version
    expected = reference.srelu(x, bias) if "srelu" in f.__name__ else reference.residual_srelu(shortcut, x, bias)
    with mode():
        y = f(shortcut, x, bias)
    assert torch.equal(y, expected) and torch.equal(x, expected) and x._version > version


@FORMS
def test_a_change_after_the_fact_is_noticed(f):
    """The saved output counts its versions: written over afterwards, backward raises instead of computing wrongly."""
    x, bias = leaf() * 1, torch.randn(6, requires_grad=True)
    y = f(torch.randn(x.shape), x, bias)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@FORMS
def test_over_a_view_of_a_custom_function_a_new_tensor_is_returned(f):
    """Full backward hooks make such views. Autograd lets nobody write over them."""
    leaf_, bias = leaf(), torch.randn(6, requires_grad=True)
    shortcut = torch.randn(leaf_.shape)
    module = torch.nn.Identity()
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    hooked = module(leaf_ * 1)
    kept = hooked.detach().clone()
    y = f(shortcut, hooked, bias)
    expected = reference.srelu(kept, bias) if "srelu" in f.__name__ else reference.residual_srelu(shortcut, kept, bias)
    assert torch.equal(y, expected) and torch.equal(hooked, kept)
    y.sum().backward()
    assert torch.equal(leaf_.grad, (~(y <= bias.view(6, 1, 1))).float())
