"""The compiled kernels, called directly: every dtype, every memory order, awkward shapes, ties, NaN, infinities."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from isonet_fast.ops import library
from tests.cases import DTYPES, EMPTY, LAYOUTS, SHAPES, activations, per_channel

if library.why_not_compiled:
    pytest.skip(library.why_not_compiled, allow_module_level=True)

ops = torch.ops.isonet_fast


def normal(shape: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(device, dtype)


def expected_srelu(x: Tensor, bias: Tensor) -> Tensor:
    b = per_channel(bias, x)
    return torch.where((x > b) | x.isnan(), x, b)


def same(a: Tensor, b: Tensor) -> None:
    assert (
        a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))
    )


def close_sum(got: Tensor, terms: Tensor, dims: list[int], dtype: torch.dtype) -> None:
    """`got` is the sum of `terms` accumulated in float32 (float64 for float64) and rounded once."""
    exact, magnitude = terms.double().sum(dims), terms.double().abs().sum(dims)
    unit = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    bound = 16 * unit * magnitude + torch.finfo(got.dtype).eps / 2 * exact.abs() + torch.finfo(got.dtype).tiny
    error = (got.double().reshape(exact.shape) - exact).abs()
    assert (error <= bound).all(), (error.max(), bound)


def channel_dims(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_srelu_and_its_gradients_are_those_of_the_formula(device: torch.device, shape: tuple, layout: str) -> None:
    for dtype, master in itertools.product(DTYPES, (False, True)):
        values, bias = activations(shape, dtype, device, torch.float32 if master else dtype)
        x = LAYOUTS[layout](values)
        before = x.clone()
        y = ops.srelu(x, bias)
        same(y, expected_srelu(x, bias))
        same(x, before)
        assert y.stride() == torch.empty_like(x).stride()

        inplace = LAYOUTS[layout](values.clone())
        ops.srelu_(inplace, bias)
        same(inplace, y)

        g = LAYOUTS[layout](normal(shape, dtype, device))
        grad_x, grad_bias = ops.srelu_backward(g, y, bias)
        taken = y <= per_channel(bias, y)
        same(grad_x, torch.where(taken, 0, g))
        assert grad_x.stride() == y.stride() and grad_bias.shape == bias.shape and grad_bias.dtype == bias.dtype
        close_sum(grad_bias, torch.where(taken, g, 0), channel_dims(y), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_join_and_its_gradients_are_those_of_the_formula(device: torch.device, shape: tuple, layout: str) -> None:
    for dtype, master in itertools.product(DTYPES, (False, True)):
        parameters = torch.float32 if master else dtype
        wide = torch.promote_types(dtype, torch.float32)
        values, bias = activations(shape, dtype, device, parameters)
        scale = torch.tensor([0.7], dtype=parameters, device=device)
        shortcut, branch = LAYOUTS[layout](values), LAYOUTS[layout](normal(shape, dtype, device))
        y = ops.residual_srelu(shortcut, branch, bias, None)
        same(y, expected_srelu((shortcut.to(wide) + branch.to(wide)).to(dtype), bias))
        y = ops.residual_srelu(shortcut, branch, bias, scale)
        # With a scale the sum may be one fused multiply-add: up to one rounding from the two-step sum.
        product = scale.to(wide) * branch.to(wide)
        two_step = expected_srelu((shortcut.to(wide) + product).to(dtype), bias)
        assert torch.equal(y.isnan(), two_step.isnan())
        finite = two_step.isfinite()
        size = (shortcut.double().abs() + product.double().abs())[finite]
        difference = (y - two_step)[finite].double().abs()
        step = torch.finfo(dtype).eps * two_step[finite].double().abs() if wide != dtype else 0
        assert (difference <= torch.finfo(wide).eps * size + step).all()
        assert torch.equal(y[~finite].nan_to_num(), two_step[~finite].nan_to_num())
        assert y.stride() == torch.empty_like(shortcut).stride()

        over = LAYOUTS[layout](branch.clone())
        ops.residual_srelu_(shortcut, over, bias, scale)
        same(over, y)

        g = LAYOUTS[layout](normal(shape, dtype, device))
        grads = ops.residual_srelu_backward(g, y, branch, bias, scale)
        grad_shortcut, grad_branch, grad_bias, grad_scale = grads
        taken = y <= per_channel(bias, y)
        masked = torch.where(taken, 0, g)
        same(grad_shortcut, masked)
        same(grad_branch, (scale.to(wide) * masked.to(wide)).to(dtype))
        close_sum(grad_bias, torch.where(taken, g, 0), channel_dims(y), dtype)
        close_sum(grad_scale, masked.double() * branch.double(), list(range(y.dim())), dtype)
        assert grad_scale.shape == scale.shape and grad_scale.dtype == scale.dtype and grad_bias.dtype == bias.dtype
        assert grad_shortcut.stride() == grad_branch.stride() == y.stride()


@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_without_elements_the_gradients_of_the_parameters_are_zero(device: torch.device, shape: tuple) -> None:
    for dtype in DTYPES:
        x, bias = activations(shape, dtype, device)
        scale = torch.ones((), dtype=dtype, device=device)
        assert ops.srelu(x, bias).shape == x.shape and ops.residual_srelu(x, x.clone(), bias, scale).shape == x.shape
        ops.srelu_(x, bias)
        for grads in (ops.srelu_backward(x, x, bias), ops.residual_srelu_backward(x, x, x, bias, scale)):
            assert [g.shape for g in grads if g.numel()] == [bias.shape] * (shape[1] > 0) + [()] * (len(grads) == 4)
            assert not any(g.any() for g in grads)


def test_memory_orders_of_inputs_and_gradients_may_differ(device: torch.device) -> None:
    """The gradient of a channels_last output may arrive contiguous or expanded; the join's inputs may differ too."""
    bias, scale = torch.randn(6, device=device), torch.tensor(0.5, device=device)
    x = torch.randn(2, 6, 5, 4, device=device)
    last = x.contiguous(memory_format=torch.channels_last)
    y = ops.srelu(last, bias)
    grads = (
        x.clone(),
        torch.ones((), device=device).expand_as(y),
        torch.arange(6.0, device=device).view(6, 1, 1).expand_as(y),
    )
    for g in grads:
        got = ops.srelu_backward(g, y, bias)
        wanted = ops.srelu_backward(g.contiguous(memory_format=torch.channels_last), y, bias)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted)) and got[0].stride() == y.stride()
        got = ops.residual_srelu_backward(g, y, x, bias, scale)
        wanted = ops.residual_srelu_backward(g.contiguous(memory_format=torch.channels_last), y, last, bias, scale)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))
    assert torch.equal(ops.residual_srelu(x, last, bias, scale), ops.residual_srelu(last, x, bias, scale))
    over = x.clone()
    ops.residual_srelu_(last, over, bias, scale)
    assert torch.equal(over, ops.residual_srelu(x, x, bias, scale))


def test_same_bits_twice(device: torch.device) -> None:
    """No atomics; and on the CPU the number of threads does not matter either."""
    threads = torch.get_num_threads()
    for dtype, layout in itertools.product(DTYPES, ("contiguous", "channels_last")):
        bias, scale = normal((32,), dtype, device), torch.ones(1, dtype=dtype, device=device)
        y, g, branch = (LAYOUTS[layout](normal((4, 32, 60, 60), dtype, device)) for _ in range(3))
        results = []
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append([*ops.srelu_backward(g, y, bias), *ops.residual_srelu_backward(g, y, branch, bias, scale)])
        torch.set_num_threads(threads)
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again)), (dtype, layout)


def test_grad_output_is_left_alone(device: torch.device) -> None:
    """Autograd may share one gradient between two nodes."""
    bias = torch.randn(4, device=device)
    y, g = torch.randn(2, 2, 4, 3, 3, device=device)
    before = g.clone()
    grad_x, _ = ops.srelu_backward(g, y, bias)
    ops.residual_srelu_backward(g, y, y, bias, torch.ones(1, device=device))
    assert torch.equal(g, before) and grad_x.data_ptr() != g.data_ptr()


def test_long_sums_stay_accurate(device: torch.device) -> None:
    """A million times 0.1 per channel: one float32 accumulator would be off by a part in a thousand, a half useless."""
    shape = (4, 2, 512, 512)
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            y = LAYOUTS[layout](torch.full(shape, -1.0, dtype=dtype, device=device))
            bias = torch.zeros(2, dtype=torch.float32 if dtype != torch.float64 else dtype, device=device)
            g = torch.full_like(y, 0.1)
            _, grad_bias = ops.srelu_backward(g, y, bias)
            wanted = g[0, 0, 0, 0].double().item() * shape[0] * shape[2] * shape[3]
            assert abs(grad_bias[0].item() / wanted - 1) < 1e-6, (dtype, layout)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x, bias = torch.zeros(2, 3, 4, device=device), torch.zeros(3, device=device)
    with pytest.raises(RuntimeError, match="bias must have one value per channel, C = 3"):
        ops.srelu(x, torch.zeros(4, device=device))
    with pytest.raises(RuntimeError, match="bias must have the dtype of the input or be float32"):
        ops.srelu(x, bias.half())
    with pytest.raises(RuntimeError, match="must be float32, float64, float16 or bfloat16"):
        ops.srelu(x.int(), bias)
    with pytest.raises(RuntimeError, match="1 dimensions"):
        ops.srelu(bias, bias)
    with pytest.raises(RuntimeError, match="shortcut must have the shape"):
        ops.residual_srelu(x[:1], x, bias, None)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype"):
        ops.srelu_backward(x.half(), x, bias)
    with pytest.raises(RuntimeError, match="scale must have one element"):
        ops.residual_srelu(x, x, bias, torch.zeros(2, device=device))


def test_every_activation_has_a_kernel_for_this_device(device: torch.device) -> None:
    """Else everything here would test PyTorch, and pass."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("isonet_fast::") and "srelu" in n]
    assert len(names) >= 6
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, device.type.upper()), name


def test_cuda_graph_and_streams(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("graphs and streams are CUDA's")
    bias, scale = torch.randn(16, device=device), torch.ones(1, device=device)
    x, g = torch.randn(2, 4, 16, 32, 32, device=device)

    def step() -> list[Tensor]:
        y = ops.residual_srelu(x, x, bias, scale)
        return [y, *ops.srelu_backward(g, y, bias), *ops.residual_srelu_backward(g, y, x, bias, scale)]

    eager = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(eager, other, captured):
        same(a, b)
        same(a, c)


def test_a_second_device_runs_its_own_launches(device: torch.device) -> None:
    """Launched where the tensors are, whichever device is current, on that device's stream."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("no second GPU")
    bias, scale = torch.randn(16, device=device), torch.ones(1, device=device)
    x, g = torch.randn(2, 4, 16, 32, 32, device=device)
    first = [ops.srelu(x, bias), *ops.residual_srelu_backward(g, x, x, bias, scale)]
    there = torch.device("cuda", 1)
    x, g, bias, scale = (tensor.to(there) for tensor in (x, g, bias, scale))
    with torch.cuda.stream(torch.cuda.Stream(there)), torch.cuda.device(0):
        second = [ops.srelu(x, bias), *ops.residual_srelu_backward(g, x, x, bias, scale)]
        assert torch.cuda.current_device() == 0
    torch.cuda.synchronize(there)
    for a, b in zip(first, second):
        assert b.device == there
        same(a.cpu(), b.cpu())
