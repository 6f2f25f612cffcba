"""Checks of OrthoRegularizer under DistributedDataParallel, each run by every rank."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from isonet_fast import OrthoRegularizer

from .ranks import (
    COEFF,
    network,
    one_unit,
    same,
    sgd,
    single,
    steps,
    task,
)


def ddp(net=None, **options):
    model = DistributedDataParallel(net or network(), **options)
    return model, OrthoRegularizer(model, COEFF, work_group=dist.group.WORLD)


def ddp_steps(form, **options):
    steps(*ddp(**options), form)


def ddp_accumulation(form, **options):
    """Micro-batches without synchronising, then one with: none (a static graph must synchronise first), two, two."""
    model, reg = ddp(**options)
    for count in (0, 2, 2):
        model.zero_grad()
        with model.no_sync():
            for _ in range(count):
                task(model, dist.get_rank()).backward()
        form(model, reg)
        same(model, single(network(), tasks=1 + count))


def ddp_frozen(form):
    net = network()
    net[4].weight.requires_grad_(False)
    expected = network()
    expected[4].weight.requires_grad_(False)
    steps(*ddp(net), form, expected=expected)


def ddp_more_ranks_than_units(form):
    steps(*ddp(one_unit()), form, expected=one_unit())


def ddp_wrong_order(set_to_none, **options):
    """Noticed in the first step and after right ones, and nothing is changed."""
    model, reg = ddp(**options)
    optimizer = sgd(model)
    for right in (False, True, False):
        optimizer.zero_grad(set_to_none=set_to_none)
        if right:
            reg.accumulate_grad_()
        task(model, dist.get_rank()).backward()
        if not right:
            before = [p.grad.clone() for p in model.parameters()]
            with pytest.raises(RuntimeError, match=r"must come before the backward that synchronises"):
                reg.accumulate_grad_()
            assert all(torch.equal(p.grad, b) for p, b in zip(model.parameters(), before, strict=True))
        optimizer.step()


def ddp_wrong_order_after_no_sync():
    model, reg = ddp(gradient_as_bucket_view=True)
    with model.no_sync():
        task(model, dist.get_rank()).backward()
    task(model, dist.get_rank()).backward()
    with pytest.raises(RuntimeError, match=r"no_sync\(\)"):
        reg.accumulate_grad_()


def last_total_before_the_first_call():
    assert ddp()[1].last_total().item() == 0
