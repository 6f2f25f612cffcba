"""What the checks with several processes share: networks, tasks, and the orders in which a step may come."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from isonet_fast import OrthoConv2d, OrthoLinear, SReLU, reference

DOUBLE = torch.float64


COEFF = 0.1


STEPS = 3


def network(dtype=DOUBLE):
    """Over 3 ranks 16 outputs lie 6, 6, 4, 4 lie 2, 2, 0, and 2 lie 1, 1, 0. One 3x3 layer of stride 1 is computed
    over frequencies, and one, with fewer rows, over offsets."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        SReLU(16),
        OrthoConv2d(16, 16, 3, padding=1, penalty="lorth"),
        OrthoConv2d(16, 16, 3, padding=1, groups=2),
        nn.Conv2d(16, 4, 3, stride=2, bias=False),
        OrthoConv2d(4, 2, 1, penalty="matrix"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        OrthoLinear(2, 5),
    )
    return filled(net).to(dtype)


def one_unit():
    """One (layer, offset): with two ranks one has nothing to compute."""
    return filled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))).double()


def filled(net):
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.3)
    return net


def task(model, rank, dtype=DOUBLE):
    """A loss that differs from rank to rank."""
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(100 + rank))
    return model(x.to(dtype)).square().sum()


def penalty(net):
    """Unweighted, by the reference: every layer but those of three input channels."""
    total = torch.zeros((), dtype=DOUBLE)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, OrthoLinear)) and module.weight.shape[1] != 3:
            stride, groups = getattr(module, "stride", 1), getattr(module, "groups", 1)
            kind = getattr(module, "penalty", "isonet")
            weight = module.weight.double()
            total = total + reference.orthogonality_loss(weight, stride=stride, groups=groups, penalty=kind)
    return total


def single(net, tasks=1, scale=1.0):
    """What one process computes: the mean of the ranks' losses, `tasks` times, and the whole penalty."""
    ranks = range(dist.get_world_size())
    (scale * (tasks * sum(task(net, r) for r in ranks) / len(ranks) + COEFF * penalty(net))).backward()
    return net


def sgd(net):
    return torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same(model, expected):
    """Every gradient, to 1e-12 of its largest value."""
    for (name, p), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (p.grad is None) == (want.grad is None), name
        if want.grad is not None:
            atol = 1e-12 * want.grad.abs().max().item()
            torch.testing.assert_close(
                full(p.grad), want.grad, rtol=1e-12, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
            )


def steps(model, reg, form, expected=None):
    """A few steps of training, compared with one process at each; the penalty's value too.

    Gradients are missing, then zero, then missing again."""
    expected = expected or network()
    optimizers = sgd(model), sgd(expected)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=step != 1)
        want = penalty(expected).item()
        value = form(model, reg)
        single(expected)
        same(model, expected)
        assert reg.last_total().item() == pytest.approx(want, rel=1e-12)
        dist.all_reduce(value)
        assert value.item() / dist.get_world_size() == pytest.approx(COEFF * want, rel=1e-12)
        for optimizer in optimizers:
            optimizer.step()


# the orders in which a step may come


def loss_plus_reg(model, reg):
    loss = task(model, dist.get_rank())
    value = reg()
    (loss + value).backward()
    return value.detach().clone()


def reg_plus_loss(model, reg):
    value = reg()
    (value + task(model, dist.get_rank())).backward()
    return value.detach().clone()


def before_backward(model, reg):
    value = reg.accumulate_grad_()
    task(model, dist.get_rank()).backward()
    return value


def between(model, reg):
    loss = task(model, dist.get_rank())
    value = reg.accumulate_grad_()
    loss.backward()
    return value


def after_backward(model, reg):
    task(model, dist.get_rank()).backward()
    return reg.accumulate_grad_()
