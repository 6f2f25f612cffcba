"""Checks of OrthoRegularizer under FSDP2, each run by every rank."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, Shard

from isonet_fast import OrthoRegularizer, sharded

from . import ranks
from .ranks import (
    COEFF,
    filled,
    full,
    loss_plus_reg,
    network,
    one_unit,
    penalty,
    same,
    single,
    steps,
    task,
)


def fsdp(net=None, split=True, each=True, **options):
    model = net or network()
    if each:
        for n in (2, 4, 8) if len(model) > 2 else (1,):
            fully_shard(model[n], **options)
    fully_shard(model, **options)
    return model, OrthoRegularizer(model, COEFF, work_group=dist.group.WORLD if split else None)


def fsdp_steps(form, split, each):
    steps(*fsdp(split=split, each=each), form)


def fsdp_accumulation(form):
    model, reg = fsdp()
    for _ in range(2):
        model.zero_grad()
        model.set_requires_gradient_sync(False)
        for _ in range(2):
            task(model, dist.get_rank()).backward()
        model.set_requires_gradient_sync(True)
        form(model, reg)
        same(model, single(network(), tasks=3))


def fsdp_frozen(form):
    net, expected = network(), network()
    for one in (net, expected):
        one[4].weight.requires_grad_(False)
    steps(*fsdp(net), form, expected=expected)


def fsdp_more_ranks_than_units(form):
    steps(*fsdp(one_unit()), form, expected=one_unit())


def fsdp_everything_frozen():
    model, reg = fsdp(network().requires_grad_(False))
    value = reg()
    assert not value.requires_grad and reg.accumulate_grad_().item() == value.item()
    assert reg.last_total().item() == pytest.approx(penalty(network()).item(), rel=1e-12)
    assert all(p.grad is None for p in model.parameters())


def fsdp_scaled_gradients(split):
    """A loss scale reaches the gradient of both forms."""
    expected = single(network(), scale=1024.0)
    model, reg = fsdp(split=split)
    (1024 * (task(model, dist.get_rank()) + reg())).backward()
    same(model, expected)
    model.zero_grad()
    (1024 * task(model, dist.get_rank())).backward()
    reg.accumulate_grad_(grad_scale=1024.0)
    same(model, expected)


def fsdp_mixed_precision(form, each):
    """The layers see bfloat16, the penalty the float32 masters; also after a forward that leaves them gathered."""
    expected = network(torch.float32).double()
    (COEFF * penalty(expected)).backward()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, reg = fsdp(network(torch.float32), each=each, mp_policy=policy)
    with mock.patch.object(ranks, "task", lambda model, rank: 0 * model(torch.ones(1, 3, 9, 9)).float().sum()):
        value = form(model, reg)
    assert value.dtype == torch.float32
    assert reg.last_total().item() == pytest.approx(penalty(expected).item(), rel=1e-5)
    for p, want in zip(model.parameters(), expected.parameters(), strict=True):
        if want.grad is not None:
            assert p.grad.dtype == torch.float32
            atol = 1e-5 * want.grad.abs().max().item()
            torch.testing.assert_close(full(p.grad).double(), want.grad, rtol=0, atol=atol)


def fsdp_bfloat16_masters(split):
    """Weights kept in bfloat16: computed in float32, the gradient rounded once."""
    expected = network(torch.bfloat16).double()
    (COEFF * penalty(expected)).backward()
    model, reg = fsdp(network(torch.bfloat16), split)
    assert reg.accumulate_grad_().dtype == torch.float32
    for p, want in zip(model.parameters(), expected.parameters(), strict=True):
        if want.grad is not None:
            assert p.grad.dtype == torch.bfloat16
            torch.testing.assert_close(full(p.grad), want.grad.bfloat16(), rtol=2**-7, atol=1e-5)


def fsdp_collectives(form, split):
    """One all-gather; one reduce-scatter where the work is split, none where it is not."""
    _, reg = fsdp(split=split)
    with mock.patch.object(sharded, "_collective", wraps=sharded._collective) as collective:
        reg().backward() if form == "autograd" else reg.accumulate_grad_()
    names = [call.args[0] for call in collective.call_args_list]
    assert names == ["all_gather_single", "reduce_scatter_single"][: 1 + split]


def fsdp_comes_first(form):
    """The autograd form adds after the callback in which FSDP waits for the stream on which it writes gradients."""
    model, reg = fsdp()
    events = []
    finish = FSDPState._root_post_backward_final_callback

    def fsdp_is_done(state):
        finish(state)
        events.append("FSDP")

    with (
        mock.patch.object(FSDPState, "_root_post_backward_final_callback", fsdp_is_done),
        mock.patch.object(sharded.Shards, "add_", lambda *_: events.append("penalty")),
    ):
        form(model, reg)
    assert events == ["FSDP", "penalty"]


def fsdp_weights_exchanged():
    """load_state_dict(assign=True) makes new Parameters; a forward puts gathered copies in their place."""
    model, reg = fsdp(each=False)
    model.load_state_dict({name: (2 * p).detach() for name, p in model.state_dict().items()}, assign=True)
    expected = network()
    with torch.no_grad():
        for p in expected.parameters():
            p.mul_(2)
    loss_plus_reg(model, reg)
    same(model, single(expected))


def fsdp_built_after_an_evaluation():
    """An evaluation leaves the outermost module gathered."""
    model = fsdp(each=False)[0]
    with torch.no_grad():
        task(model, 0)
    assert not isinstance(model[2].weight, DTensor)
    steps(model, OrthoRegularizer(model, COEFF, work_group=dist.group.WORLD), loss_plus_reg)


def fsdp_interval():
    model = fsdp()[0]
    reg = OrthoRegularizer(model, COEFF, interval=2, work_group=dist.group.WORLD)
    assert reg.accumulate_grad_().item() == 0 and all(p.grad is None for p in model.parameters())
    reg.accumulate_grad_()
    expected = network()
    (2 * COEFF * penalty(expected)).backward()
    same(model, expected)


def fsdp_summary():
    rows = fsdp()[1].summary()
    assert sum(row.value for row in rows) == pytest.approx(penalty(network()).item(), rel=1e-12)
    assert [row.shape for row in rows][1] == (16, 16, 3, 3)


def fsdp_layer_replaced():
    """A layer that is not sharded is refused in its place, a sharded one is followed."""
    model, reg = fsdp()
    reg()

    def new():
        return filled(nn.Conv2d(16, 4, 3, stride=2, bias=False)).double()

    model[4] = new()
    with pytest.raises(ValueError, match=r"either all .* are sharded by fully_shard or none is.*\(4, 16, 3, 3\)"):
        reg.accumulate_grad_()
    model[4] = fully_shard(new())
    expected = network()
    expected[4] = new()
    (COEFF * penalty(expected)).backward()
    reg.accumulate_grad_()
    same(model, expected)
    assert reg.last_total().item() == pytest.approx(penalty(expected).item(), rel=1e-12)


def fsdp_optimizer_in_the_backward():
    """Hooks that step as each gradient arrives see what accumulate_grad_() added before; reg() comes too late."""
    model, reg = fsdp()
    expected = single(network())
    with torch.no_grad():
        for p in expected.parameters():
            p.sub_(0.01 * p.grad)

    def step(p):
        with torch.no_grad():
            p.sub_(0.01 * p.grad)
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with pytest.raises(RuntimeError, match=r"call accumulate_grad_\(\) before loss.backward\(\) instead"):
        reg()
    reg.accumulate_grad_()
    task(model, dist.get_rank()).backward()
    for p, want in zip(model.parameters(), expected.parameters(), strict=True):
        assert p.grad is None
        torch.testing.assert_close(full(p), want, rtol=1e-12, atol=1e-12)


def sharded_otherwise():
    """What is not supported is refused with a reason."""
    ranks = dist.get_world_size()
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (1, ranks), mesh_dim_names=("replicate", "shard")))
    with pytest.raises(ValueError, match=r"must be Shard\(0\) on a one-dimensional mesh.*Replicate\(\), Shard"):
        OrthoRegularizer(model)()
    model = filled(nn.Sequential(nn.Conv2d(6, 6, 1)))
    fully_shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)
    with pytest.raises(ValueError, match=r"must be Shard\(0\) on a one-dimensional mesh.*dim=1.*\(6, 6, 1, 1\)"):
        OrthoRegularizer(model)()
    model = network()
    fully_shard(model[2])
    with pytest.raises(ValueError, match=r"either all .* are sharded by fully_shard or none is.*\(16, 8, 3, 3\)"):
        OrthoRegularizer(model)()


def made_before_fully_shard():
    reg = OrthoRegularizer(model := network())
    fully_shard(model)
    with pytest.raises(RuntimeError, match="was made before fully_shard; make it afterwards"):
        reg()


def work_group_of_other_ranks():
    model = network()
    fully_shard(model)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with pytest.raises(ValueError, match=r"work_group must have the ranks .*\[0, 1.*got \[\d\]"):
        OrthoRegularizer(model, work_group=alone)
