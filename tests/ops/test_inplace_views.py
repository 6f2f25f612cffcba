"""SReLU and the join in place over views of every kind: what torch.Tensor.copy_ of the reference gives."""

import pytest
import torch

from isonet_fast import ResidualSReLU, functional, reference

VIEWS = {  # of a base (4, 6, 5, 4)
    "itself": lambda t: t,
    "[:]": lambda t: t[:],
    "slice of the batch": lambda t: t[1:3],
    "slice of the channels": lambda t: t[:, 2:5],
    "strided slice": lambda t: t[:, :, ::2],
    "reshape": lambda t: t.view(4, 6, 20),
    "transpose": lambda t: t.transpose(2, 3),
    "batch and channels transposed": lambda t: t.transpose(0, 1),
    "view of a view": lambda t: t[1:].flatten(2)[:, 1:],
    "select": lambda t: t[2],
    "as_strided": lambda t: t.as_strided((2, 6, 4), (120, 20, 1), 3),
    "squeeze": lambda t: t[:, :, :1].squeeze(2),
    "diagonal": lambda t: t.diagonal(dim1=2, dim2=3),
}


def srelu(shortcut, x, bias):
    return functional.srelu(x, bias, inplace=True)


def join(shortcut, x, bias):
    return functional.residual_srelu(shortcut, x, bias, inplace=True)


def layer(shortcut, x, bias):
    parameters = {"srelu_bias": bias.view(1, -1, 1, 1)}
    return torch.func.functional_call(ResidualSReLU(x.shape[1], inplace=True), parameters, (shortcut, x))


def plain_srelu(shortcut, x, bias):
    return x.copy_(reference.srelu(x.clone(), bias))


def plain_join(shortcut, x, bias):
    return x.copy_(reference.residual_srelu(shortcut, x.clone(), bias))


PLAIN = {srelu: plain_srelu, join: plain_join, layer: plain_join}


def step(f, view, seed=0):
    """A loss that reads y and the base it was written into; the base, y, gradients of first and second order."""
    torch.manual_seed(seed)
    leaf = torch.randn(4, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    base = leaf.sin()
    x = view(base)
    bias = torch.randn(x.shape[1], dtype=torch.float64, requires_grad=True)
    shortcut = torch.randn(x.shape, dtype=torch.float64, requires_grad=True)
    y = f(shortcut, x, bias)
    loss = (y * torch.randn_like(y)).sum() + base.square().sum()
    inputs = [leaf, bias, shortcut]
    first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), inputs, allow_unused=True)
    return [base, y, *first, *second]


@pytest.mark.parametrize("f", PLAIN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", VIEWS)
def test_writing_over_a_view_gives_the_gradients_of_plain_pytorch(kind, f):
    for got, want in zip(step(f, VIEWS[kind]), step(PLAIN[f], VIEWS[kind]), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("f", [srelu, join], ids=lambda f: f.__name__)
def test_over_a_view_compiled(f):
    """One graph with a view of every kind, each written over in turn."""

    def every(f, leaf, bias, shortcut):
        total = 0
        for view in VIEWS.values():
            base = leaf.sin()
            x = view(base)
            y = f(shortcut.as_strided(x.shape, x.stride()) * 1, x, bias[: x.shape[1]])
            total = total + y.square().sum() + base.sum()
        return total

    inputs = [torch.randn(4, 6, 5, 4), torch.randn(6), torch.randn(4, 6, 5, 4)]
    inputs = [t.double().requires_grad_() for t in inputs]
    compiled = torch.compile(every, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(every(PLAIN[f], *inputs), inputs, allow_unused=True)
    for got, want in zip(torch.autograd.grad(compiled(f, *inputs), inputs, allow_unused=True), expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_over_a_view_that_is_given_to_compiled_code():
    """What the view is of, the graph does not know."""
    base, bias, shortcut = torch.randn(4, 6, 5), torch.zeros(6), torch.randn(3, 6, 5)
    expected = torch.maximum(shortcut + base[1:], torch.zeros(()))
    leaf = base.clone().requires_grad_()
    x = (leaf * 1)[1:]
    y = torch.compile(join, backend="aot_eager", fullgraph=True)(shortcut, x, bias)
    (grad,) = torch.autograd.grad(y.sum(), leaf)
    assert torch.equal(y, expected) and torch.equal(x, expected)
    assert torch.equal(grad[1:], (expected > 0).float()) and not grad[0].any()


def test_the_shortcut_itself_as_the_branch():
    """Overlapping wholly, as in x += x."""
    same = lambda f: lambda shortcut, x, bias: f(x, x, bias)
    view = lambda f: lambda shortcut, x, bias: f(x[:], x, bias)
    for how in (same, view):
        for got, want in zip(step(how(join), VIEWS["[:]"]), step(how(plain_join), VIEWS["[:]"]), strict=True):
            assert (got is None and want is None) or torch.allclose(got, want, rtol=1e-12, atol=1e-12)


OVERLAPS = {  # (shortcut, branch) of one base (6, 6, 6, 6)
    "shifted": lambda t: (t[:-1], t[1:]),
    "transposed": lambda t: (t.transpose(2, 3), t),
    "channels_last": lambda t: (t.view(-1).as_strided(t.shape, (216, 1, 36, 6)), t),
}


@pytest.mark.parametrize("kind", OVERLAPS)
def test_partly_overlapping_shortcut_and_branch(kind):
    base = torch.randn(6, 6, 6, 6)
    kept = base.clone()
    shortcut, branch = OVERLAPS[kind](base)
    with pytest.raises(RuntimeError, match="refer to a single memory location"):
        branch.add_(shortcut)
    with pytest.raises(ValueError, match="branch, which overlaps shortcut partly"):
        functional.residual_srelu(shortcut, branch, torch.zeros(6), inplace=True)
    assert torch.equal(base, kept)


def test_interleaved_shortcut_and_branch():
    """One storage, no element in common."""
    for split in (lambda t: (t[2:], t[:2]), lambda t: (t[:, :3], t[:, 3:]), lambda t: (t[..., ::2], t[..., 1::2])):
        base = torch.randn(4, 6, 5, 4)
        shortcut, branch = split(base)
        bias = torch.randn(branch.shape[1])
        expected = reference.residual_srelu(shortcut, branch, bias)
        assert torch.equal(functional.residual_srelu(shortcut, branch, bias, inplace=True), expected)
        assert torch.equal(branch, expected)
