"""OrthoRegularizer under data parallelism: the shares of the ranks, and the order that `accumulate_grad_` needs."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from isonet_fast import OrthoConv2d, OrthoLinear, OrthoRegularizer, models, reference, regularizer
from isonet_fast.ops import orthogonality
from isonet_fast.penalty_arguments import checked_layer
from isonet_fast.problem import Problem
from isonet_fast.regularizer import official_filter
from isonet_fast.split_work import split_work

DOUBLE = torch.float64


def network():
    net = nn.Sequential(
        nn.Conv2d(4, 2, 3, bias=False),
        OrthoConv2d(2, 12, 3, stride=2, padding=1, penalty="lorth", bias=False),  # its constant, 2, counts once
        OrthoConv2d(12, 4, 1, penalty="matrix", bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        OrthoLinear(4, 3, bias=False),
    ).double()
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=DOUBLE) * 0.3)
    return net


def full(net, coeff):
    """Value and gradients of the whole penalty, from the reference."""
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    a, b, c, d = weights
    total = coeff * (
        reference.orthogonality_loss(a)
        + reference.orthogonality_loss(b, stride=2, penalty="lorth")
        + reference.orthogonality_loss(c, penalty="matrix")
        + reference.orthogonality_loss(d)
    )
    total.backward()
    return total.item(), [w.grad for w in weights]


def assert_mean(per_rank, expected):
    for *shares, want in zip(*per_rank, expected, strict=True):
        mean = torch.stack(shares).mean(0)
        torch.testing.assert_close(mean, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())


class FakeGroup:
    """Stands for one rank of a process group that does not exist."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.fixture
def fake_ranks(monkeypatch):
    fake = SimpleNamespace(get_rank=lambda group: group.rank, get_world_size=lambda group: group.size)
    monkeypatch.setattr(regularizer, "dist", fake)


def test_a_group_that_this_process_is_not_in_is_refused(fake_ranks):
    with pytest.raises(ValueError, match="work_group must be a process group that this process belongs to"):
        OrthoRegularizer(network(), work_group=FakeGroup(-1, -1))


@pytest.mark.parametrize("group", ["world", 3, True])
def test_what_is_no_process_group_is_refused(group):
    with pytest.raises(ValueError, match=f"work_group must be a process group .* got {type(group).__name__}: "):
        OrthoRegularizer(network(), work_group=group)


def test_the_former_name_of_work_group_works_and_warns(fake_ranks):
    net, group = network(), FakeGroup(1, 3)
    with pytest.warns(DeprecationWarning, match="shard_group is now called work_group") as warned:
        old = OrthoRegularizer(net, 0.1, shard_group=group)
    assert warned[0].filename == __file__
    assert old().item() == OrthoRegularizer(net, 0.1, work_group=group)().item() != OrthoRegularizer(net, 0.1)().item()


def test_work_group_under_both_names_is_refused(fake_ranks):
    group = FakeGroup(0, 1)
    with pytest.raises(TypeError, match="one argument under two names, got both"):
        OrthoRegularizer(network(), work_group=group, shard_group=group)


RANKS = [1, 2, 3, 4, 5, 60]  # the network has 13 + 5 + 1 + 1 = 20 units


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("form", ["autograd", "accumulate_grad_"])
@pytest.mark.parametrize("interval", [1, 2])
def test_the_mean_over_ranks_is_the_whole(fake_ranks, ranks, form, interval):
    value, gradient = full(network(), 0.1)
    values, gradients = [], []
    for rank in range(ranks):
        net = network()
        reg = OrthoRegularizer(net, 0.1, work_group=FakeGroup(rank, ranks), interval=interval)
        for _ in range(interval):
            net.zero_grad()
            share = reg() if form == "autograd" else reg.accumulate_grad_()
            if form == "autograd":
                share.backward()
        values.append(share.item())
        gradients.append([p.grad for p in net.parameters()])
    assert sum(values) / ranks == pytest.approx(interval * value, rel=1e-12)
    assert_mean(gradients, [interval * g for g in gradient])


@pytest.mark.parametrize("ranks", RANKS)
def test_problems_of_the_ranks_add_up(ranks):
    """One level below: a Problem per rank, its coefficients multiplied by the number of ranks."""
    net = network()
    value, gradient = full(net, 0.1)
    weights = [p.detach().clone().requires_grad_() for p in net.parameters()]
    layers = (
        checked_layer(weights[0], 1, 1, 1, "isonet"),
        checked_layer(weights[1], 2, 1, 1, "lorth"),
        checked_layer(weights[2], 1, 1, 1, "matrix"),
        checked_layer(weights[3], 1, 1, 1, "isonet"),
    )
    totals, gradients, accumulated, unweighted = [], [], [], torch.zeros(4, dtype=DOUBLE)
    for rank in range(ranks):
        problem = Problem(layers, (0.1 * ranks,) * 4, None, (rank, ranks))
        total, losses = orthogonality.loss(weights, problem)
        totals.append(total.item())
        unweighted += losses
        gradients.append(torch.autograd.grad(total, weights))
        buffers = [torch.zeros_like(w) for w in weights]
        again, _ = orthogonality.accumulate_grad_(weights, buffers, problem, 2.0)
        assert again.item() == pytest.approx(total.item(), rel=1e-12, abs=1e-15)
        accumulated.append(buffers)
    assert sum(totals) / ranks == pytest.approx(value, rel=1e-12)
    assert 0.1 * unweighted.sum().item() == pytest.approx(value, rel=1e-12)
    assert_mean(gradients, gradient)
    assert_mean(accumulated, [2 * g for g in gradient])


@pytest.mark.parametrize("ranks", RANKS)
def test_units_are_split_without_loss_or_repetition_and_evenly(ranks):
    layers = tuple(
        checked_layer(torch.empty(shape), stride, 1, 1, "isonet")
        for shape, stride in [((64, 64, 3, 3), 1), ((128, 64, 3, 3), 2), ((128, 128, 3, 3), 1), ((32, 32, 1, 1), 1)]
    )
    shares = [split_work(layers, rank, ranks) for rank in range(ranks)]
    for n, one in enumerate(layers):
        assert sorted(t for share in shares for t in share[n]) == sorted(one.offsets)
    work = [sum(one.work("overlap", t) for one, ts in zip(layers, share) for t in ts) for share in shares]
    largest = max(one.work("overlap", t) for one in layers for t in one.offsets)
    assert max(work) <= max(sum(work) / ranks * 1.1, largest)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", ["isonet18", "isonet34", "isonet50", "isonet_cifar"])
def test_without_a_gpu_ranks_multiply_equally(name, ranks):
    """What it costs the Triton kernels to touch a layer does not count there."""
    with torch.device("meta"):
        net = models.isonet_cifar(32) if name == "isonet_cifar" else getattr(models, name)()
    convolutions = [m for key, m in net.named_modules() if isinstance(m, OrthoConv2d) and official_filter(key, m)]
    weights = [m.weight for m in convolutions]
    layers = tuple(checked_layer(m.weight, m.stride, m.dilation, m.groups, "isonet") for m in convolutions)
    work = []
    for rank in range(ranks):
        shares = orthogonality._work(weights, Problem(layers, (1.0,) * len(layers), None, (rank, ranks)))
        work.append(sum(one.work(form, u) for one, (form, units) in zip(layers, shares) for u in units))
    assert max(work) <= 1.001 * sum(work) / ranks


def test_last_is_this_ranks_share_and_the_summary_is_whole(fake_ranks):
    net = network()
    value, _ = full(net, 1.0)
    lasts = []
    for rank in range(3):
        reg = OrthoRegularizer(net, 0.1, work_group=FakeGroup(rank, 3))
        reg()
        lasts.append(reg.last.item())
        assert sum(row.value for row in reg.summary()) == pytest.approx(value, rel=1e-12)
    assert sum(lasts) == pytest.approx(value, rel=1e-12) and 0 < lasts[0] < value


@pytest.fixture(scope="module")
def group():
    """A real process group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def loss_of(model):
    return model(torch.linspace(-1, 1, 2 * 4 * 81, dtype=DOUBLE).view(2, 4, 9, 9)).square().sum()


def expected_gradient(batches=1):
    net = network()
    loss_of(net).backward()
    return [batches * p.grad + g for p, g in zip(net.parameters(), full(net, 0.1)[1], strict=True)]


def assert_gradient(model, expected):
    for p, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-12, atol=1e-12)


WRONG_ORDER = r"accumulate_grad_\(\) with work_group must come before the backward .* call it before loss.backward\(\)"


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_before_backward_it_is_right_step_after_step(group, bucket_view, set_to_none):
    model = DistributedDataParallel(network(), gradient_as_bucket_view=bucket_view)
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for step in range(3):
        optimizer.zero_grad(set_to_none=set_to_none)
        reg.accumulate_grad_()
        loss_of(model).backward()
        if step == 0:
            assert_gradient(model, expected_gradient())
        optimizer.step()


def test_the_autograd_form_is_right_with_ddp(group):
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    (loss_of(model) + reg()).backward()
    assert_gradient(model, expected_gradient())


@pytest.mark.parametrize("wrap", [DistributedDataParallel, lambda net: net], ids=["DDP", "bare"])
def test_after_backward_it_raises_and_changes_nothing(group, wrap):
    model = wrap(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    loss_of(model).backward()
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=WRONG_ORDER):
        reg.accumulate_grad_()
    assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))


def test_wrong_order_is_noticed_at_a_later_step_too(group):
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    reg.accumulate_grad_()
    loss_of(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=WRONG_ORDER):
        reg.accumulate_grad_()


def test_accumulation_under_no_sync_may_come_first(group):
    """Two micro-batches that do not synchronise, the penalty, then the one that does."""
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    with model.no_sync():
        for _ in range(2):
            loss_of(model).backward()
    reg.accumulate_grad_()
    loss_of(model).backward()
    assert_gradient(model, expected_gradient(batches=3))
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        reg.accumulate_grad_()


@pytest.mark.parametrize("zero_grad", [True, False])
def test_after_an_optimizer_step_it_may_come_again(group, zero_grad):
    """The gradients of the last step, still there or set to zero, are not taken for this step's."""
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        reg.accumulate_grad_()
        loss_of(model).backward()
        optimizer.step()
        if zero_grad:
            optimizer.zero_grad(set_to_none=False)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("kind", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str)
def test_every_kind_of_optimizer_may_have_stepped(group, optimizer, kind, set_to_none):
    """A fused one does not change the version counters of the weights."""
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    stepper = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, **kind)
    for _ in range(2):
        stepper.zero_grad(set_to_none=set_to_none)
        reg.accumulate_grad_()
        loss_of(model).backward()
        stepper.step()
    stepper.zero_grad(set_to_none=set_to_none)
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=WRONG_ORDER):
        reg.accumulate_grad_()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_skipped_by_a_gradient_scaler_is_no_wrong_order(group, set_to_none):
    """After an overflow there is no optimizer step, only the gradients are cleared."""
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group)
    for _ in range(2):
        reg.accumulate_grad_()
        loss_of(model).backward()
        model.zero_grad(set_to_none=set_to_none)
    reg.accumulate_grad_()


def test_a_call_that_is_not_due_may_come_at_any_time(group):
    model = DistributedDataParallel(network())
    reg = OrthoRegularizer(model, 0.1, work_group=group, interval=2)
    loss_of(model).backward()
    assert reg.accumulate_grad_().item() == 0


def test_without_a_work_group_it_may_come_after_backward():
    net = network()
    reg = OrthoRegularizer(net, 0.1)
    loss_of(net).backward()
    reg.accumulate_grad_()
    assert_gradient(net, expected_gradient())
