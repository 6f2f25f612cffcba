"""srelu against the reference, in place and not, whoever computes it (PyTorch, C++ or CUDA)."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from isonet_fast import functional, reference
from isonet_fast.ops import library
from isonet_fast.ops.srelu import _srelu, _srelu_backward
from tests.cases import DTYPES, EMPTY, SHAPES, activations, assert_accurate, layouts

ops = torch.ops.isonet_fast


def value_and_grads(f, x, bias, grad):
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    y = f(x, bias)
    return y, *torch.autograd.grad(y, (x, bias), grad)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES + EMPTY, ids=str)
def test_against_the_reference(shape, dtype, inplace, device):
    values, bias = activations(shape, dtype, device)
    grad = torch.randn(shape, device=device).to(dtype)
    expected = value_and_grads(reference.srelu, values.double(), bias.double(), grad.double())
    plain = value_and_grads(reference.srelu, values, bias, grad)
    f = (
        (lambda x, b: functional.srelu(x.clone(memory_format=torch.preserve_format), b, inplace=True))
        if inplace
        else functional.srelu
    )
    for name, x in layouts(values):
        actual = value_and_grads(f, x, bias, grad)
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=0, atol=0, equal_nan=True, msg=name)
        torch.testing.assert_close(actual[1].double(), expected[1], rtol=0, atol=0, equal_nan=True, msg=name)
        assert_accurate(actual[2], expected[2], plain[2], name)
        assert actual[0].dtype == dtype and actual[2].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_bias_is_rounded_once_and_keeps_its_precision(dtype, device):
    """The master copy of autocast: the mask recomputed from a rounded y must be the one of the forward."""
    x, _ = activations((4, 16, 8, 8), dtype, device)
    bias = torch.randn(16, device=device)  # not representable in dtype
    x[:, 3] = bias[3].to(dtype)  # a tie only after rounding
    grad = torch.randn(x.shape, device=device).to(dtype)
    y, grad_x, grad_bias = value_and_grads(functional.srelu, x, bias, grad)
    exact = value_and_grads(reference.srelu, x.double(), bias.to(dtype).double(), grad.double())
    torch.testing.assert_close(y.double(), exact[0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(grad_x.double(), exact[1], rtol=0, atol=0)
    assert grad_bias.dtype == torch.float32
    torch.testing.assert_close(grad_bias.double(), exact[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "expanded"])
def test_gradients_in_another_layout(layout, device):
    """Under channels_last a gradient can arrive as NCHW, or expanded with stride 0; the result has y's strides."""
    x = torch.randn(2, 6, 5, 4, device=device).to(memory_format=torch.channels_last)
    bias = torch.randn(6, device=device)
    grad = torch.randn(2, 6, 5, 4, device=device)
    grad = {
        "nchw": grad,
        "channels_last": grad.to(memory_format=torch.channels_last),
        "expanded": grad[:, :, :1, :1].expand_as(x),
    }[layout]
    kept = grad.clone()
    y = ops.srelu(x, bias)
    grad_x, grad_bias = ops.srelu_backward(grad, y, bias)
    taken = y <= bias.view(-1, 1, 1)
    assert grad_x.stride() == y.stride() == x.stride()
    torch.testing.assert_close(grad_x, torch.where(taken, 0, grad), rtol=0, atol=0)
    torch.testing.assert_close(grad_bias, torch.where(taken, grad, 0).sum((0, 2, 3)))
    assert torch.equal(grad, kept), "grad_output may be shared: it must not be written"


def test_twice_the_same_bits(device):
    x = torch.randn(16, 32, 20, 20, device=device)
    bias, grad = torch.randn(32, device=device), torch.randn_like(x)
    for layout in (torch.contiguous_format, torch.channels_last):
        y = ops.srelu(x.contiguous(memory_format=layout), bias)
        first, second = (ops.srelu_backward(grad, y, bias)[1] for _ in range(2))
        assert torch.equal(first, second)


def test_the_pytorch_implementation_is_the_compiled_one(device):
    """Devices without a compiled kernel take the PyTorch path: same results."""
    x, bias = activations((4, 16, 8, 8), torch.float32, device)
    y = ops.srelu(x, bias)
    torch.testing.assert_close(_srelu(x, bias), y, rtol=0, atol=0, equal_nan=True)
    grad = torch.randn_like(x)
    for a, b in zip(_srelu_backward(grad, y, bias), ops.srelu_backward(grad, y, bias)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradcheck(inplace, device):
    x = torch.randn(2, 3, 4, 3, dtype=torch.double, device=device, requires_grad=True)
    bias = torch.randn(1, 3, 1, 1, dtype=torch.double, device=device, requires_grad=True)
    f = lambda x, b: functional.srelu(x * 1, b, inplace)
    assert torch.autograd.gradcheck(f, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, bias), fast_mode=True)


def test_a_gpu_is_served_by_its_kernels(device):
    """Else everything here would test PyTorch, and pass."""
    if device.type != "cuda":
        pytest.skip("no GPU")
    assert library.compiled_for("cuda"), library.why_not_compiled or "built without CUDA kernels"


def test_opcheck(device):
    x = torch.randn(2, 3, 4, 5, device=device)
    bias = torch.randn(3, device=device)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = x.contiguous(memory_format=layout)
        for b in (bias, bias.view(1, 3, 1, 1)):
            opcheck(ops.srelu.default, (x, b))
            opcheck(ops.srelu_.default, (x.clone(), b))
            opcheck(ops.srelu_backward.default, (x, x, b))


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_fullgraph_forward_and_backward(inplace, device):
    f = lambda x, b: functional.srelu(torch.sin(x), b, inplace).square().sum()
    x = torch.randn(4, 6, 5, 5, device=device, requires_grad=True)
    bias = torch.randn(1, 6, 1, 1, device=device, requires_grad=True)
    compiled = torch.compile(f, fullgraph=True)
    for a, b in zip(torch.autograd.grad(f(x, bias), (x, bias)), torch.autograd.grad(compiled(x, bias), (x, bias))):
        torch.testing.assert_close(a, b)


def test_inputs_that_need_no_gradient(device):
    x, bias = torch.randn(2, 3, 4, device=device), torch.randn(3, device=device)
    for x_needs, b_needs in ((True, False), (False, True)):
        for inplace in (False, True):
            xi, bi = x.clone().requires_grad_(x_needs), bias.clone().requires_grad_(b_needs)
            y = functional.srelu(xi * 1, bi, inplace)
            y.sum().backward()
            assert (xi.grad is not None) == x_needs and (bi.grad is not None) == b_needs
    with torch.no_grad():
        y = functional.srelu(x.clone().requires_grad_(), bias, inplace=True)
        assert y.grad_fn is None


def test_autocast_keeps_the_activations_dtype(device):
    x = torch.randn(2, 3, 4, 4, device=device, dtype=torch.bfloat16)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert functional.srelu(x, torch.zeros(3, device=device)).dtype == torch.bfloat16


def test_inplace_saves_only_the_output_and_the_bias(device):
    saved = []
    conv = torch.nn.Conv2d(3, 4, 3, device=device)
    bias = torch.zeros(4, device=device, requires_grad=True)
    h = conv(torch.randn(1, 3, 8, 8, device=device))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = functional.srelu(h, bias, inplace=True)
    assert y.data_ptr() == h.data_ptr()
    assert sorted(t.numel() for t in saved) == [4, y.numel()]
    assert {t.data_ptr() for t in saved} == {y.data_ptr(), bias.data_ptr()}


def test_inplace_is_right_behind_a_convolution(device):
    conv = torch.nn.Conv2d(3, 4, 3, device=device, dtype=torch.double)
    bias = torch.randn(4, device=device, dtype=torch.double, requires_grad=True)
    x = torch.randn(2, 3, 8, 8, device=device, dtype=torch.double, requires_grad=True)
    leaves = (x, bias, *conv.parameters())
    for a, b in zip(
        torch.autograd.grad(functional.srelu(conv(x), bias, inplace=True).square().sum(), leaves),
        torch.autograd.grad(reference.srelu(conv(x), bias).square().sum(), leaves),
    ):
        torch.testing.assert_close(a, b)


def test_inplace_over_a_tensor_that_a_backward_needs_is_noticed(device):
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    h = x.exp()  # its backward reads h
    functional.srelu(h, torch.zeros(3, device=device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        h.sum().backward()


def test_inplace_on_a_leaf_is_refused_before_the_data_changes(device):
    for make in (lambda t: t, lambda t: t[:1], lambda t: t.view(2, 3, 4, 1)):
        x = torch.randn(2, 3, 4, device=device)
        kept = x.clone()
        with pytest.raises(ValueError, match="leaf that requires grad"):
            functional.srelu(make(x.requires_grad_()), torch.zeros(3, device=device), inplace=True)
        assert torch.equal(x, kept)
    with pytest.raises(ValueError, match="share memory"):
        functional.srelu(
            torch.zeros(1, 3, 1, device=device).expand(2, 3, 4), torch.zeros(3, device=device), inplace=True
        )


def test_inplace_on_a_slice_changes_the_slice_alone(device):
    x = torch.randn(4, 6, 5, device=device)
    kept = x.clone()
    functional.srelu(x[:, ::2], torch.zeros(3, device=device), inplace=True)
    assert torch.equal(x[:, ::2], F.relu(kept[:, ::2])) and torch.equal(x[:, 1::2], kept[:, 1::2])


def test_gradient_of_a_sum_that_shares_its_gradient(device):
    """srelu(a) + srelu(b): both receive the same grad_output tensor."""
    bias = torch.zeros(3, device=device)
    a, b = (torch.randn(2, 3, 4, device=device, requires_grad=True) for _ in range(2))
    grad = torch.randn(2, 3, 4, device=device)
    (functional.srelu(a, bias) + functional.srelu(b, bias)).backward(grad)
    for t in (a, b):
        assert torch.equal(t.grad, torch.where(t > 0, grad, 0))


def test_errors_name_the_argument(device):
    x, bias = torch.randn(2, 3, 4, device=device), torch.zeros(3, device=device)
    with pytest.raises(ValueError, match=r"bias must have one value for each of the 3 channels of x, got shape \(4,\)"):
        functional.srelu(x, torch.zeros(4, device=device))
    with pytest.raises(ValueError, match=r"x must be \(N, C, ...\), at least two dimensions, got shape \(3,\)"):
        functional.srelu(x[0, :, 0], bias)
    with pytest.raises(TypeError, match=r"x must be float32, .*got torch.int64"):
        functional.srelu(x.long(), bias)
    with pytest.raises(TypeError, match=r"bias must be float32, .*got torch.int64"):
        functional.srelu(x, bias.long())
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        functional.srelu([1.0], bias)
    with pytest.raises(ValueError, match=f"bias must be on the device of x, {device}.*got meta"):
        functional.srelu(x, bias.to("meta"))
