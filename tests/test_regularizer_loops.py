"""OrthoRegularizer in training loops: intervals, gradient accumulation, an optimizer in the backward pass."""

import copy
import warnings

import pytest
import torch
from torch import nn

from isonet_fast import OrthoConv2d, OrthoRegularizer

from .regularized import DOUBLE, assert_grads, both_forms, by_reference, grads, network


def test_accumulate_adds_at_every_call():
    net = network()
    _, expected, _ = by_reference(net)
    reg = OrthoRegularizer(net)
    for _ in range(3):
        reg.accumulate_grad_()
    assert_grads(net, expected, scale=3)


@both_forms
def test_interval_computes_every_kth_time_and_multiplies(form):
    net = network()
    expected, expected_grads, unweighted = by_reference(net)
    reg = OrthoRegularizer(net, interval=3)
    for call in range(1, 7):
        net.zero_grad()
        value = form(reg)
        assert value.shape == ()
        if call % 3:
            assert value.item() == 0 and not grads(net)
            assert (reg.last.item() == 0) == (call < 3)
        else:
            assert value.item() == pytest.approx(3 * expected.item(), rel=1e-12)
            assert_grads(net, expected_grads, scale=3)
            assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)


def test_interval_with_a_grad_scale():
    net = network()
    expected, expected_grads, _ = by_reference(net)
    reg = OrthoRegularizer(net, interval=2)
    values = [reg.accumulate_grad_(grad_scale=8.0).item() for _ in range(2)]
    assert values == [0, pytest.approx(2 * expected.item(), rel=1e-12)]
    assert_grads(net, expected_grads, scale=16)


def test_interval_counter_is_in_the_state_dict():
    net = network()
    reg = OrthoRegularizer(net, interval=4)
    due = [reg().item() != 0 for _ in range(6)]
    assert due == [False, False, False, True, False, False]
    state = copy.deepcopy(reg.state_dict())
    resumed = OrthoRegularizer(net, interval=4)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == reg.state_dict() == state
    assert [resumed().item() != 0 for _ in range(3)] == [reg().item() != 0 for _ in range(3)] == [False, True, False]


def test_training_with_it_makes_the_layers_orthogonal():
    net = nn.Sequential(
        OrthoConv2d(6, 6, 3, bias=False), OrthoConv2d(4, 12, 3, stride=2, penalty="lorth", bias=False)
    ).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1), dtype=DOUBLE) * 0.05)
    reg = OrthoRegularizer(net, 1.0)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    start = reg().item()
    for _ in range(40):
        optimizer.zero_grad()
        reg.accumulate_grad_()
        optimizer.step()
    assert start > 0.1 and reg().item() < 0.02 * start


def test_calls_under_no_grad_do_not_count_for_the_interval():
    """Validation reads the value of now, not multiplied, and leaves the schedule of training as it is."""
    net = network()
    expected, *_, unweighted = by_reference(net)
    reg = OrthoRegularizer(net, interval=3)
    values = []
    for call in range(6):
        values.append(reg().item())
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                value = reg()
            assert not value.requires_grad and value.item() == pytest.approx(expected.item(), rel=1e-12)
        assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)
        assert reg.state_dict() == {"calls": call + 1}
    once = pytest.approx(3 * expected.item(), rel=1e-12)
    assert values == [0, 0, once, 0, 0, once]


@pytest.mark.parametrize("form", ["reg() on every micro-batch", "reg() on one, undivided", "accumulate_grad_()"])
def test_gradient_accumulation_counts_the_penalty_once(form):
    """A framework divides every micro-batch's loss by their number (as Accelerate and Lightning do), so reg() belongs
    to every one. Where the loss of one is not divided, reg() on that one does; accumulate_grad_() always, once."""
    steps, batches = 2, torch.randn(4, 2, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    expected, net = network(), network()
    reg = OrthoRegularizer(net, 0.1)
    for step in range(2):
        for p, name in zip(expected.parameters(), dict(expected.named_parameters()), strict=True):
            p.grad = by_reference(expected, 0.1)[1].get(name)
        for x in batches[2 * step : 2 * step + 2]:
            (expected(x).square().mean() / steps).backward()
        for n, x in enumerate(batches[2 * step : 2 * step + 2]):
            loss = net(x).square().mean()
            if form == "reg() on every micro-batch":
                ((loss + reg()) / steps).backward()
            elif form == "reg() on one, undivided":
                (loss / steps + (reg() if n == steps - 1 else 0)).backward()
            else:
                (loss / steps).backward()
        if form == "accumulate_grad_()":
            reg.accumulate_grad_()
        for one in (expected, net):
            torch.optim.SGD(one.parameters(), 1e-4).step()
            one.zero_grad()
    for p, want in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, want, rtol=1e-12, atol=1e-12)


def in_the_backward(net, lr=1e-4):
    """An optimizer that steps as each gradient arrives and clears it."""

    def step(p):
        with torch.no_grad():
            p.sub_(lr * p.grad)
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(step)
    return net


def three_steps(net, order, optimizer=None):
    reg = OrthoRegularizer(net, 0.1)
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    for _ in range(3):
        net.zero_grad()
        if order == "before":
            reg.accumulate_grad_()
        (net(x).square().mean() + (reg() if order == "autograd" else 0)).backward()
        if order == "after":
            reg.accumulate_grad_()
        if optimizer is not None:
            optimizer.step()
    return [p.detach() for p in net.parameters()]


@pytest.mark.parametrize("order", ["before", "autograd"])
def test_an_optimizer_in_the_backward_sees_the_penalty(order):
    plain = network()
    expected = three_steps(plain, "after", torch.optim.SGD(plain.parameters(), 1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = three_steps(in_the_backward(network()), order)
    for p, want in zip(got, expected, strict=True):
        torch.testing.assert_close(p, want, rtol=1e-12, atol=1e-12)


def test_a_penalty_that_an_optimizer_in_the_backward_never_sees_is_warned_of():
    with pytest.warns(UserWarning, match=r"accumulate_grad_\(\) after zero_grad\(\) and before loss.backward\(\)"):
        three_steps(in_the_backward(network()), "after")


def test_hooks_that_only_look_are_not_warned_of():
    """After a backward pass and an optimizer step the gradients may be cleared, in place too."""
    net, norms = network(), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: norms.append(p.grad.norm()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        three_steps(net, "before", torch.optim.SGD(net.parameters(), 1e-4))
    assert norms
