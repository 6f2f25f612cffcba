"""The residual join against the reference, with and without a scale, in place and not."""

import pytest
import torch
from torch.library import opcheck

from isonet_fast import functional, reference
from isonet_fast.ops.residual_srelu import _residual_srelu, _residual_srelu_backward
from tests.cases import DTYPES, EMPTY, SHAPES, activations, assert_accurate, layouts, per_channel

ops = torch.ops.isonet_fast


def value_and_grads(f, tensors, grad):
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = f(*tensors)
    return y, *torch.autograd.grad(y, tensors, grad)


def inplace_join(shortcut, branch, bias):
    return functional.residual_srelu(shortcut, branch.clone(memory_format=torch.preserve_format), bias, inplace=True)


FORMS = {"plain": functional.residual_srelu, "inplace": inplace_join, "scaled": functional.residual_srelu}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_against_the_reference(shape, dtype, form, device):
    values, bias = activations(shape, dtype, device)
    branch = torch.randn(shape, device=device).to(dtype)
    scale = [torch.tensor(0.75, device=device, dtype=dtype)] if form == "scaled" else []
    grad = torch.randn(shape, device=device).to(dtype)
    # where the sum is rounded, the mask may differ from float64's: the reference gets the rounded sum's mask
    wide = [t.double() for t in (values, branch, bias, *scale)]
    expected = value_and_grads(reference.residual_srelu, wide, grad.double())
    plain = value_and_grads(reference.residual_srelu, [values, branch, bias, *scale], grad)
    near = (plain[0].double() - expected[0]).abs() > 0  # rounding moved y: at the bias it may move the mask too
    for name, x in layouts(values):
        actual = value_and_grads(FORMS[form], [x, branch, bias, *scale], grad)
        assert_accurate(actual[0], expected[0], plain[0], name)
        for got, want, rounded in zip(actual[1:3], expected[1:3], plain[1:3]):
            assert_accurate(got.where(~near, 0), want.where(~near, 0), rounded.where(~near, 0), name)
        assert_accurate(actual[3], plain_bias_grad(actual[0], bias, grad), plain[3], name)
        assert actual[0].dtype == dtype


def plain_bias_grad(y, bias, grad):
    """db from the op's own output, in float64."""
    taken = y.detach() <= per_channel(bias, y)
    return torch.where(taken, grad.double(), 0).sum([d for d in range(y.dim()) if d != 1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_scale(dtype, device):
    shortcut, branch, grad = (torch.randn(4, 16, 9, 9, device=device).to(dtype) for _ in range(3))
    bias, scale = torch.full((16,), -0.5, device=device), torch.full((1, 1, 1, 1), 0.3, device=device)
    if dtype == torch.float64:
        bias, scale = bias.double(), scale.double()
    tensors = [shortcut, branch, bias.to(dtype), scale]
    y, *grads = value_and_grads(functional.residual_srelu, tensors, grad)
    passed = ~(y <= bias.to(dtype).view(-1, 1, 1))
    exact = (grad.double() * passed * branch.double()).sum()
    assert grads[3].shape == scale.shape and grads[3].dtype == scale.dtype
    torch.testing.assert_close(grads[3].double().view(()), exact, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grads[1].double(), grad.double() * passed * scale.double(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_once(dtype, device):
    shortcut, branch = (torch.randn(2, 8, 16, 16, device=device).to(dtype) for _ in range(2))
    bias, scale = torch.full((8,), -9.0, device=device), torch.tensor(0.3, device=device)
    y = functional.residual_srelu(shortcut, branch, bias, scale)
    exact = (shortcut.double() + scale.double() * branch.double()).to(dtype)
    assert (y != exact).float().mean() < 0.002, "double rounding would differ in one value of a hundred"


def test_at_scale_zero_the_shortcut_passes(device):
    shortcut, branch = (torch.randn(2, 3, 4, 4, device=device, requires_grad=True) for _ in range(2))
    scale = torch.zeros((), device=device, requires_grad=True)
    y = functional.residual_srelu(shortcut, branch, torch.full((3,), -9.0, device=device), scale)
    assert torch.equal(y, shortcut)
    y.sum().backward()
    assert not branch.grad.any() and scale.grad != 0


def test_inputs_and_gradients_may_differ_in_layout(device):
    nchw = torch.randn(2, 6, 5, 4, device=device)
    last = torch.randn(2, 6, 5, 4, device=device).to(memory_format=torch.channels_last)
    bias, scale = torch.randn(6, device=device), torch.tensor(0.5, device=device)
    for shortcut, branch in ((nchw, last), (last, nchw), (last[:, :, :1, :1].expand(2, 6, 5, 4), nchw)):
        y = functional.residual_srelu(shortcut, branch, bias, scale)
        torch.testing.assert_close(y, reference.residual_srelu(shortcut, branch, bias, scale))
        for grad in (nchw, last, nchw[:, :, :1, :1].expand(2, 6, 5, 4)):
            got = ops.residual_srelu_backward(grad, y, branch, bias, scale)
            want = _residual_srelu_backward(grad, y, branch, bias, scale)
            for a, b in zip(got, want):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert got[0].stride() == got[1].stride() == y.stride()


def test_the_pytorch_implementation_is_the_compiled_one(device):
    x, bias = activations((4, 16, 8, 8), torch.float32, device)
    branch, scale = torch.randn_like(x), torch.tensor(0.5, device=device)
    for s in (None, scale):
        torch.testing.assert_close(
            _residual_srelu(x, branch, bias, s), ops.residual_srelu(x, branch, bias, s), equal_nan=True
        )


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form, device):
    make = lambda *shape: torch.randn(shape, dtype=torch.double, device=device, requires_grad=True)
    inputs = [make(2, 3, 4, 3), make(2, 3, 4, 3), make(1, 3, 1, 1)] + ([make(1, 1, 1, 1)] if form == "scaled" else [])
    assert torch.autograd.gradcheck(FORMS[form], inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(FORMS[form], inputs, fast_mode=True)


def test_opcheck(device):
    make = lambda *shape: torch.randn(shape, device=device)
    shortcut, branch = make(2, 3, 4, 5), make(2, 3, 4, 5)
    for bias, scale in ((make(3), make()), (make(1, 3, 1, 1), make(1, 1, 1, 1))):
        opcheck(ops.residual_srelu.default, (shortcut, branch, bias, scale))
        opcheck(ops.residual_srelu.default, (shortcut, branch, bias, None))
        opcheck(ops.residual_srelu_.default, (shortcut, branch.clone(), bias, None))
        opcheck(ops.residual_srelu_backward.default, (shortcut, branch, shortcut, bias, scale))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("form", FORMS)
def test_compile_fullgraph_forward_and_backward(form, device):
    make = lambda *shape: torch.randn(shape, device=device, requires_grad=True)
    inputs = [make(2, 3, 4, 3), make(2, 3, 4, 3), make(1, 3, 1, 1)] + ([make(1, 1, 1, 1)] if form == "scaled" else [])
    f = lambda *inputs: FORMS[form](*inputs).square().sum()
    compiled = torch.compile(f, fullgraph=True)
    for a, b in zip(torch.autograd.grad(f(*inputs), inputs), torch.autograd.grad(compiled(*inputs), inputs)):
        torch.testing.assert_close(a, b)


def test_inputs_that_need_no_gradient(device):
    values = [
        torch.randn(2, 3, 4, device=device),
        torch.randn(2, 3, 4, device=device),
        torch.randn(3, device=device),
        torch.tensor(0.5, device=device),
    ]
    for n in range(4):
        inputs = [v.clone().requires_grad_(i == n) for i, v in enumerate(values)]
        functional.residual_srelu(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == n for i in range(4)]


def test_twice_the_same_bits(device):
    shortcut, branch, grad = (torch.randn(16, 32, 20, 20, device=device) for _ in range(3))
    bias, scale = torch.randn(32, device=device), torch.tensor(0.5, device=device)
    y = ops.residual_srelu(shortcut, branch, bias, scale)
    first, second = (ops.residual_srelu_backward(grad, y, branch, bias, scale) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_errors_name_the_argument(device):
    x, bias = torch.randn(2, 3, 4, device=device), torch.zeros(3, device=device)
    join = functional.residual_srelu
    with pytest.raises(ValueError, match=r"branch must have the shape of shortcut, \(2, 3, 4\), got \(2, 3, 1\)"):
        join(x, x[..., :1], bias)
    with pytest.raises(TypeError, match="branch must be float32, .*, got torch.int64"):
        join(x, x.long(), bias)
    with pytest.raises(ValueError, match="branch must be on the device of shortcut"):
        join(x, x.to("meta"), bias)
    with pytest.raises(ValueError, match=r"bias must have one value for each of the 3 channels of shortcut"):
        join(x, x, bias[:2])
    with pytest.raises(ValueError, match=r"scale must have one value, got shape \(3,\)"):
        join(x, x, bias, bias)
    with pytest.raises(TypeError, match="shortcut must be float32"):
        join(x.int(), x.int(), bias)
    with pytest.raises(ValueError, match="inplace=True needs scale=None"):
        join(x, x.clone(), bias, torch.ones(1, device=device), inplace=True)
    kept = x.clone()
    with pytest.raises(ValueError, match="leaf that requires grad"):
        join(x.clone(), x.requires_grad_(), bias, inplace=True)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("where", ["branch", "scale", "gradient"])
@pytest.mark.parametrize("wanted", [("branch", "scale"), ("shortcut",)], ids="+".join)
def test_second_derivatives_where_something_is_not_finite(where, wanted, device):
    """A gradient that nobody asked for is no zero: times NaN or infinity it would be NaN."""
    results = []
    for f in (functional.residual_srelu, reference.residual_srelu):
        leaves = {
            name: torch.tensor([[1.0, 2.0]], device=device, dtype=torch.double) for name in ("shortcut", "branch")
        }
        leaves |= {"bias": torch.zeros(2, device=device).double(), "scale": torch.ones(1, device=device).double()}
        gradient = torch.ones(1, 2, device=device, dtype=torch.double)
        (leaves[where] if where in leaves else gradient).view(-1)[0] = torch.nan
        for tensor in (*leaves.values(), gradient):
            tensor.requires_grad_()
        first = torch.autograd.grad(f(*leaves.values()), [leaves[n] for n in wanted], gradient, create_graph=True)
        everything = [*leaves.values(), gradient]
        second = torch.autograd.grad(first, everything, [torch.ones_like(t) for t in first], allow_unused=True)
        results.append([torch.zeros_like(t) if s is None else s for s, t in zip(second, everything, strict=True)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, equal_nan=True)


@pytest.mark.parametrize("served", ["kernel", "PyTorch"])
def test_a_sum_that_cancels_is_rounded_once(served):
    """In float32 the last term is lost in each of the three sums: beside 2**20 it is below half a unit."""
    backward = {"kernel": ops.residual_srelu_backward.default, "PyTorch": _residual_srelu_backward}[served]
    terms = torch.tensor([2.0**20, 1.0, 2.0**-20, -(2.0**20)])
    for shape in ((4, 1), (1, 1, 4), (4, 1, 1, 1)):
        grad, branch = terms.view(shape), torch.ones(shape)
        passed, blocked, bias, scale = torch.ones(shape), -torch.ones(shape), torch.zeros(1), torch.ones(())
        assert backward(grad, blocked, branch, bias, scale)[2].item() == 1 + 2.0**-20
        assert backward(grad, passed, branch, bias, scale)[3].item() == 1 + 2.0**-20


def test_a_sum_that_cancels_in_the_second_backward_is_rounded_once():
    terms = torch.tensor([[2.0**20, 1.0, 2.0**-20, -(2.0**20)]]).T
    shortcut, branch = torch.ones(4, 1), torch.ones(4, 1, requires_grad=True)
    scale = torch.ones((), requires_grad=True)
    y = functional.residual_srelu(shortcut, branch, torch.zeros(1), scale)
    (grad_branch,) = torch.autograd.grad(y, branch, torch.ones(4, 1), create_graph=True)
    assert torch.autograd.grad(grad_branch, scale, terms)[0].item() == 1 + 2.0**-20


def test_three_terms_that_cancel_in_the_second_backward_are_rounded_once():
    """dg = ddshortcut + s ddbranch + dds branch: a product that is rounded before the sum would be off by 3 %."""
    leaves = [torch.full((1, 1), value, requires_grad=True) for value in (1.0, 1e-6, -1.0)]
    shortcut, branch, bias = leaves
    scale, grad = torch.tensor(1 / 3, requires_grad=True), torch.ones(1, 1, requires_grad=True)
    y = functional.residual_srelu(shortcut, branch, bias.view(1), scale)
    firsts = torch.autograd.grad(y, [shortcut, branch, scale], grad, create_graph=True)
    seconds = [torch.tensor([[1.0]]), torch.tensor([[-3.0]]), torch.tensor(1.0)]
    (found,) = torch.autograd.grad(firsts, grad, seconds)
    expected = 1 - 3 * scale.double() + branch.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-7, atol=0)
