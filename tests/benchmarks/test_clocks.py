"""The clocks on the device itself."""

import pytest
import torch

from benchmarks.clocks import Clock, CudaClock, Graphed


@pytest.fixture
def clock(device):
    return CudaClock() if device.type == "cuda" else Clock()


def test_twice_the_work_takes_longer(clock):
    small, large = (torch.ones(n, device=clock.device) for n in (1 << 20, 1 << 24))
    for how in (clock.sample, clock.cold, clock.host):
        how(large.exp, 2)
    for how in (clock.sample, clock.cold):
        assert 0 < min(how(small.exp, 5) for _ in range(3)) < min(how(large.exp, 5) for _ in range(3))
    assert clock.host(small.exp, 3) > 0


def test_a_graph_replays_on_the_buffers_that_it_captured(clock):
    x = torch.ones(5, device=clock.device, requires_grad=True)

    def gradient():
        return torch.autograd.grad((x * x).sum(), x)[0]

    call = Graphed(clock, gradient)
    assert call().tolist() == [2] * 5
    with torch.no_grad():
        x += 1
    assert call().tolist() == [4] * 5
    assert clock.sample(call, 3) > 0


def test_peak_counts_what_a_call_allocates(clock):
    def call():
        first = torch.empty(1 << 18, device=clock.device)  # 1 MiB
        second = first + 1
        del first
        return second * 2  # never more than two alive

    call()
    assert clock.peak(call) == pytest.approx(2 << 20, rel=0.01)
