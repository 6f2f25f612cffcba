"""The compiled kernels, called directly: every dtype, every memory order, awkward shapes, ties, NaN, infinities."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isonet_fast.ops import _library

if _library.why_not_compiled:
    pytest.skip(_library.why_not_compiled, allow_module_level=True)

ops = torch.ops.isonet_fast
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Memory orders of a 4-D or 5-D tensor; each maps a contiguous float64 (N, C, *) tensor to one with the same values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(
        memory_format=torch.channels_last
        if x.dim() == 4
        else torch.channels_last_3d
        if x.dim() == 5
        else torch.contiguous_format
    ),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),  # dense, N innermost
    "channels_first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),  # dense, C outermost
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],  # gaps
    "offset": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # dense, misaligned
}
SHAPES = [
    (2, 64, 8, 8),
    (3, 5, 7, 7),
    (4, 3, 33, 5),
    (2, 8, 1, 1),
    (1, 1, 3, 1),
    (2, 20, 3, 3),
    (1, 6, 40, 41),
    (5, 16),
    (3, 7, 29),
    (2, 6, 3, 4, 5),
]
EMPTY = [(0, 4, 3, 3), (2, 0, 3, 3), (2, 4, 0, 3), (0, 0)]


def special(shape: tuple, seed: int, bias: Tensor | None = None) -> Tensor:
    """Normal values with NaN, infinities, signed zeros and, if a bias is given, ties. float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    flat = x.view(-1)
    if bias is not None and flat.numel():
        flat[::3] = bias.double().view(-1, *[1] * (len(shape) - 2)).expand(shape).reshape(-1)[::3]
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=torch.float64)
        flat[1 : 1 + 7 * 5 : 7] = values[: len(flat[1 : 1 + 7 * 5 : 7])]
    return x


def laid(x: Tensor, layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return LAYOUTS[layout](x.to(dtype).to(device))


def per_channel(bias: Tensor, x: Tensor) -> Tensor:
    return bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


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


def bias_for(shape: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    return (
        (torch.randn(shape[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.5 - 0.2)
        .to(dtype)
        .to(device)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_srelu(device: torch.device, shape: tuple, layout: str) -> None:
    for dtype, master in itertools.product(DTYPES, (False, True)):
        bias = bias_for(shape, torch.float32 if master else dtype, device)
        x = laid(special(shape, 0, bias.to(dtype).cpu()), layout, dtype, device)
        before = x.clone()
        y = ops.srelu(x, bias)
        same(y, expected_srelu(x, bias))
        same(x, before)
        assert y.stride() == torch.empty_like(x).stride()

        inplace = laid(x.cpu().double().clone(), layout, dtype, device)
        ops.srelu_(inplace, bias)
        same(inplace, y)

        g = laid(special(shape, 2), layout, dtype, device)
        grad_x, grad_bias = ops.srelu_backward(g, y, bias)
        taken = y <= per_channel(bias, y)
        same(grad_x, torch.where(taken, 0, g))
        assert grad_x.stride() == y.stride() and grad_bias.shape == bias.shape and grad_bias.dtype == bias.dtype
        close_sum(grad_bias, torch.where(taken, g, 0), channel_dims(y), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_residual_srelu(device: torch.device, shape: tuple, layout: str) -> None:
    for dtype, master in itertools.product(DTYPES, (False, True)):
        parameters = torch.float32 if master else dtype
        wide = torch.promote_types(dtype, torch.float32)
        bias = bias_for(shape, parameters, device)
        scale = torch.tensor([0.7], dtype=parameters, device=device)
        shortcut = laid(special(shape, 0, bias.to(dtype).cpu()), layout, dtype, device)
        branch = laid(special(shape, 3), layout, dtype, device)
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

        over = laid(branch.cpu().double().clone(), layout, dtype, device)
        ops.residual_srelu_(shortcut, over, bias, scale)
        same(over, y)

        g = laid(special(shape, 4), layout, dtype, device)
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
def test_no_elements(device: torch.device, shape: tuple) -> None:
    for dtype in DTYPES:
        x, bias = torch.empty(shape, dtype=dtype, device=device), bias_for(shape, dtype, device)
        scale = torch.ones((), dtype=dtype, device=device)
        assert ops.srelu(x, bias).shape == x.shape and ops.residual_srelu(x, x.clone(), bias, scale).shape == x.shape
        ops.srelu_(x, bias)
        for grads in (ops.srelu_backward(x, x, bias), ops.residual_srelu_backward(x, x, x, bias, scale)):
            assert [g.shape for g in grads if g.numel()] == [bias.shape] * (shape[1] > 0) + [()] * (len(grads) == 4)
            assert not any(g.any() for g in grads)


def test_mixed_memory_orders(device: torch.device) -> None:
    """The gradient of a channels_last output may arrive contiguous or expanded; the join's inputs may differ too."""
    bias, scale = bias_for((2, 6), torch.float32, device), torch.tensor(0.5, device=device)
    x = special((2, 6, 5, 4), 0).float().to(device)
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
        bias, scale = bias_for((4, 32), dtype, device), torch.ones(1, dtype=dtype, device=device)
        y, g, branch = (laid(special((4, 32, 60, 60), seed), layout, dtype, device) for seed in (0, 1, 2))
        results = []
        for count in (threads, 1, 2, 3):
            torch.set_num_threads(count)
            results.append([*ops.srelu_backward(g, y, bias), *ops.residual_srelu_backward(g, y, branch, bias, scale)])
        torch.set_num_threads(threads)
        for again in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], again)), (dtype, layout)


def test_grad_output_is_left_alone(device: torch.device) -> None:
    """Autograd may share one gradient between two nodes."""
    bias = bias_for((2, 4), torch.float32, device)
    y, g = (special((2, 4, 3, 3), seed).float().to(device) for seed in (0, 1))
    before = g.clone()
    grad_x, _ = ops.srelu_backward(g, y, bias)
    ops.residual_srelu_backward(g, y, y, bias, torch.ones(1, device=device))
    assert torch.equal(g, before) and grad_x.data_ptr() != g.data_ptr()


def test_long_sums_stay_accurate(device: torch.device) -> None:
    """A million times 0.1 per channel: one float32 accumulator would be off by a part in a thousand, a half useless."""
    shape = (4, 2, 512, 512)
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            y = laid(torch.full(shape, -1.0, dtype=torch.float64), layout, dtype, device)
            bias = torch.zeros(2, dtype=torch.float32 if dtype != torch.float64 else dtype, device=device)
            g = torch.full_like(y, 0.1)
            _, grad_bias = ops.srelu_backward(g, y, bias)
            wanted = g[0, 0, 0, 0].double().item() * shape[0] * shape[2] * shape[3]
            assert abs(grad_bias[0].item() / wanted - 1) < 1e-6, (dtype, layout)


def test_wrong_arguments(device: torch.device) -> None:
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
    bias, scale = bias_for((4, 16), torch.float32, device), torch.ones(1, device=device)
    x, g = (special((4, 16, 32, 32), seed).float().to(device) for seed in (0, 1))

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


def test_a_second_device(device: torch.device) -> None:
    """Launched where the tensors are, whichever device is current, on that device's stream."""
    if device.type != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("no second GPU")
    bias, scale = bias_for((4, 16), torch.float32, device), torch.ones(1, device=device)
    x, g = (special((4, 16, 32, 32), seed).float().to(device) for seed in (0, 1))
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
