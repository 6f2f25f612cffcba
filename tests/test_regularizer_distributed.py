"""OrthoRegularizer with real processes: DDP = FSDP2 = one process, in float64.

The shares of the ranks: test_regularizer_work_group.py. Here 2 and 3 processes start once each, and every check
is a test of its own.
"""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from isonet_fast import OrthoConv2d, OrthoLinear, OrthoRegularizer, SReLU, reference, sharded
from isonet_fast.geometry import Layer
from isonet_fast.problem import read

from .processes import outcomes

DOUBLE = torch.float64
COEFF = 0.1
STEPS = 3


def network(dtype=DOUBLE):
    """Over 3 ranks 16 outputs lie 6, 6, 4, 4 lie 2, 2, 0, and 2 lie 1, 1, 0."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3),
        SReLU(16),
        OrthoConv2d(16, 16, 3, padding=1, penalty="lorth"),
        SReLU(16),
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
            stride = getattr(module, "stride", 1)
            kind = getattr(module, "penalty", "isonet")
            total = total + reference.orthogonality_loss(module.weight.double(), stride=stride, penalty=kind)
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


# DDP


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


# FSDP2


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
    with mock.patch(f"{__name__}.task", lambda model, rank: 0 * model(torch.ones(1, 3, 9, 9)).float().sum()):
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
    """Which leaves the outermost module gathered."""
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
    """By one that is not sharded: refused. By one that is: followed."""
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
    with pytest.raises(ValueError, match=r"either all .* are sharded by fully_shard or none is.*\(4, 16, 3, 3\)"):
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


def named(check, **options):
    """Every combination of the options' values: {name: check}."""
    out = {}
    for values in itertools.product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        label = ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in chosen.items())
        out[f"{check.__name__}({label})"] = partial(check, **chosen)
    return out


def by_frequency(steps_of, **options):
    """Ranks share (layer, frequency) units of some layers and (layer, offset) units of the others."""
    with mock.patch.object(Layer, "form", property(lambda layer: "overlap" if layer.rows == 4 else "frequency")):
        read.cache_clear()
        steps_of(**options)
        read.cache_clear()


BOTH, DDP_FORMS = [False, True], [loss_plus_reg, reg_plus_loss, before_backward, between]
ONE_OF_EACH = [loss_plus_reg, before_backward]
FSDP_FORMS = [*DDP_FORMS, after_backward]
CHECKS = {
    **named(ddp_steps, form=DDP_FORMS, gradient_as_bucket_view=BOTH),
    **named(ddp_steps, form=ONE_OF_EACH, gradient_as_bucket_view=BOTH, static_graph=[True]),
    **named(ddp_accumulation, form=DDP_FORMS, gradient_as_bucket_view=BOTH),
    **named(ddp_accumulation, form=ONE_OF_EACH, gradient_as_bucket_view=[True], static_graph=[True]),
    **named(ddp_frozen, form=ONE_OF_EACH),
    **named(ddp_more_ranks_than_units, form=ONE_OF_EACH),
    **named(ddp_wrong_order, set_to_none=BOTH, gradient_as_bucket_view=BOTH),
    **named(ddp_wrong_order, set_to_none=BOTH, gradient_as_bucket_view=[True], static_graph=[True]),
    **named(ddp_wrong_order_after_no_sync),
    **named(last_total_before_the_first_call),
    **named(fsdp_steps, form=FSDP_FORMS, split=[True], each=BOTH),
    **named(fsdp_steps, form=FSDP_FORMS, split=[False], each=[True]),
    **named(fsdp_accumulation, form=FSDP_FORMS),
    **named(fsdp_frozen, form=FSDP_FORMS),
    **named(fsdp_more_ranks_than_units, form=ONE_OF_EACH),
    **named(by_frequency, steps_of=[ddp_steps], form=ONE_OF_EACH),
    **named(by_frequency, steps_of=[fsdp_steps], form=ONE_OF_EACH, split=[True], each=[True]),
    **named(fsdp_everything_frozen),
    **named(fsdp_scaled_gradients, split=BOTH),
    **named(fsdp_mixed_precision, form=FSDP_FORMS, each=BOTH),
    **named(fsdp_bfloat16_masters, split=BOTH),
    **named(fsdp_collectives, form=["autograd", "accumulate_grad_"], split=BOTH),
    **named(fsdp_comes_first, form=[loss_plus_reg, reg_plus_loss]),
    **named(fsdp_weights_exchanged),
    **named(fsdp_built_after_an_evaluation),
    **named(fsdp_interval),
    **named(fsdp_summary),
    **named(fsdp_layer_replaced),
    **named(fsdp_optimizer_in_the_backward),
    **named(sharded_otherwise),
    **named(made_before_fully_shard),
    **named(work_group_of_other_ranks),
}


@pytest.fixture(scope="module", params=[2, 3], ids="{} processes".format)
def outcome(request, tmp_path_factory):
    return outcomes(CHECKS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_with_real_processes(outcome, name):
    assert not outcome[name], outcome[name]
