"""What in-place SReLU is for: half the activations of the official form stay alive during training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from isonet_fast import functional

LAYERS, CHANNELS = 20, 8


def peak_live_bytes(step: Callable[[], None]) -> int:
    """The most that tensors made by `step` occupied at one time, from the allocator's events."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def stack(activation: Callable[[Tensor, Tensor], Tensor], bias_shape: tuple, x: Tensor) -> int:
    weights = [torch.randn(CHANNELS, CHANNELS, 3, 3).mul_(0.05).requires_grad_() for _ in range(LAYERS)]
    biases = [torch.full(bias_shape, -1.0, requires_grad=True) for _ in range(LAYERS)]

    def step() -> None:
        y = x
        for weight, bias in zip(weights, biases):
            y = activation(torch.conv2d(y, weight, padding=1), bias)
        y.sum().backward()
        for parameter in weights + biases:
            parameter.grad = None

    return peak_live_bytes(step)


def test_peak_of_a_training_step() -> None:
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(4, CHANNELS, 48, 48).contiguous(memory_format=memory_format)
        official = stack(lambda y, b: torch.relu(y - b) + b, (1, CHANNELS, 1, 1), x)
        ours = stack(lambda y, b: functional.srelu(y, b, inplace=True), (CHANNELS,), x)
        activations = LAYERS * x.numel() * x.element_size()
        assert activations <= ours <= 0.6 * official, (ours, official, activations, ours / official)
        print(f"{memory_format}: {ours / 2**20:.1f} MB against {official / 2**20:.1f}, ratio {ours / official:.3f}")
