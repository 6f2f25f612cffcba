"""OrthoRegularizer: the sum over a network of coeff * penalty, as a loss and straight into `.grad`.

Work split over ranks: test_regularizer_work_group.py. Which layers, coefficients, summary: test_regularizer_layers.py.
"""

import copy
import re
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear, OrthoRegularizer, SReLU, reference

DOUBLE = torch.float64
# loss and gradient against the float64 reference: DESIGN 2.4 on the GPU, rounding of float32 GEMMs on the CPU
TOLERANCE = {
    ("cpu", DOUBLE): (1e-12, 1e-12),
    ("cuda", DOUBLE): (1e-12, 1e-12),
    ("cpu", torch.float32): (1e-5, 1e-5),
    ("cuda", torch.float32): (1e-4, 1e-2),
}


def network(dtype=DOUBLE):
    """Every kind of layer that is covered, some of one shape, and a few that are not."""
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, bias=False),
        SReLU(8),
        OrthoConv2d(8, 8, 3, padding=1, penalty="lorth"),
        OrthoConv2d(8, 8, 3, padding=1, penalty="lorth"),
        nn.Conv2d(8, 8, 3, groups=4, dilation=2, padding=2),
        OrthoConv2d(8, 16, 1, stride=2, penalty="matrix"),
        nn.Flatten(2),
        OrthoConv1d(16, 8, 3, padding=1),
        nn.Unflatten(2, (1, 2, 2)),
        OrthoConv3d(8, 4, (1, 3, 3), padding=(0, 1, 1)),
        nn.Flatten(),
        OrthoLinear(16, 6),
        nn.Linear(6, 3),
    ).to(dtype)
    with torch.no_grad():
        for n, parameter in enumerate(net.parameters()):
            generator = torch.Generator().manual_seed(n)
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=DOUBLE) * 0.3)
    return net


def covered(net):
    return {
        name: module
        for name, module in net.named_modules()
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, OrthoLinear))
    }


def by_reference(net, coeff=1e-4, penalty=None):
    """Value and gradient by weight name, in float64: the sum over layers of coeff * reference penalty."""
    total, weights, unweighted = torch.zeros((), dtype=DOUBLE), {}, 0.0
    for name, module in covered(net).items():
        weight = module.weight.detach().double().cpu().requires_grad_()
        weights[f"{name}.weight"] = weight
        kind = penalty or getattr(module, "penalty", "isonet")
        geometry = [getattr(module, key, 1) for key in ("stride", "dilation", "groups")]
        stride, dilation, groups = (1, 1, 1) if isinstance(module, nn.Linear) else geometry
        loss = reference.orthogonality_loss(weight, stride=stride, dilation=dilation, groups=groups, penalty=kind)
        total = total + (coeff(name, module) if callable(coeff) else coeff) * loss
        unweighted += loss.item()
    total.backward()
    return total.detach(), {name: w.grad for name, w in weights.items()}, unweighted


def grads(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def assert_grads(net, expected, tolerance=1e-12, scale=1.0, base=None):
    """`base` is what the gradients were before."""
    base = base or {}
    assert grads(net).keys() == expected.keys() | base.keys()
    for name, grad in grads(net).items():
        want = scale * expected.get(name, 0) + base.get(name, torch.zeros(())).double().cpu()
        largest = want.abs().max().item()
        torch.testing.assert_close(grad.double().cpu(), want, rtol=0, atol=tolerance * largest, msg=name)


def loss_form(reg):
    value = reg()
    value.backward()
    return value


def grad_form(reg):
    return reg.accumulate_grad_()


both_forms = pytest.mark.parametrize("form", [loss_form, grad_form])


@both_forms
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
@pytest.mark.parametrize("penalty", [None, "isonet", "lorth", "matrix"])
def test_is_the_sum_of_coeff_times_the_reference(form, dtype, penalty, device):
    """penalty=None: each layer's own, "isonet" for plain convolutions; else the given one for all."""
    net = network(dtype).to(device)
    value_tolerance, grad_tolerance = TOLERANCE[device.type, dtype]
    expected, expected_grads, unweighted = by_reference(net, 3e-3, penalty)
    reg = OrthoRegularizer(net, 3e-3, penalty=penalty)
    value = form(reg)
    assert value.shape == () and value.dtype == dtype and value.device == next(net.parameters()).device
    torch.testing.assert_close(value.detach().double().cpu(), expected, rtol=value_tolerance, atol=0)
    assert_grads(net, expected_grads, grad_tolerance)
    assert reg.last.item() == pytest.approx(unweighted, rel=value_tolerance)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_precision_highest(dtype, device):
    net = network(dtype).to(device)
    expected, expected_grads, _ = by_reference(net)
    value = OrthoRegularizer(net, precision="highest").accumulate_grad_()
    torch.testing.assert_close(value.double().cpu(), expected, rtol=1e-5 if dtype != DOUBLE else 1e-12, atol=0)
    assert_grads(net, expected_grads, 1e-3 if dtype != DOUBLE else 1e-12)


def test_both_forms_agree_with_a_criterion():
    """loss = criterion + reg() against accumulate_grad_ before or after the criterion's own backward."""
    nets = [network() for _ in range(3)]
    x = torch.randn(2, 4, 9, 9, dtype=DOUBLE)
    regs = [OrthoRegularizer(net, 0.1) for net in nets]
    (nets[0](x).square().mean() + regs[0]()).backward()
    nets[1](x).square().mean().backward()
    regs[1].accumulate_grad_()
    regs[2].accumulate_grad_()
    nets[2](x).square().mean().backward()
    for other in nets[1:]:
        for (name, p), q in zip(nets[0].named_parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-12, atol=1e-12, msg=name)


def test_the_gradient_reaches_whatever_multiplies_the_loss():
    """A loss scale, or weight / accumulation steps, multiplies the gradient of the autograd form."""
    net = network()
    _, expected, _ = by_reference(net)
    (1024 * OrthoRegularizer(net)() / 4).backward()
    assert_grads(net, expected, scale=256)


@pytest.mark.parametrize("grad_scale", [1.0, 65536.0, 0.25])
@pytest.mark.parametrize("existing", [False, True])
def test_accumulate_adds_to_existing_gradients_and_makes_missing_ones(grad_scale, existing, device):
    net = network().to(device)
    expected_value, expected, unweighted = by_reference(net)
    before = {}
    if existing:
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        before = {name: g.clone() for name, g in grads(net).items()}
    buffers = {name: g.data_ptr() for name, g in grads(net).items()}
    reg = OrthoRegularizer(net)
    value = reg.accumulate_grad_(grad_scale=grad_scale)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-12)  # without the scale
    assert not value.requires_grad
    assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)
    assert_grads(net, expected, scale=grad_scale, base=before)
    assert all(grads(net)[name].data_ptr() == pointer for name, pointer in buffers.items())  # in place


def test_accumulate_adds_at_every_call():
    net = network()
    _, expected, _ = by_reference(net)
    reg = OrthoRegularizer(net)
    for _ in range(3):
        reg.accumulate_grad_()
    assert_grads(net, expected, scale=3)


def test_accumulate_keeps_strides_of_channels_last_weights():
    net = network()
    net[2].to(memory_format=torch.channels_last)
    assert not net[2].weight.is_contiguous()
    _, expected, _ = by_reference(net)
    OrthoRegularizer(net).accumulate_grad_()
    assert net[2].weight.grad.stride() == net[2].weight.stride()
    assert_grads(net, expected)


@both_forms
def test_frozen_layers_count_but_receive_no_gradient(form):
    net = network()
    net[0].weight.requires_grad_(False)
    net[4].weight.requires_grad_(False).grad = torch.ones_like(net[4].weight)  # left from before it was frozen
    expected, expected_grads, _ = by_reference(net)
    value = form(OrthoRegularizer(net))
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert net[0].weight.grad is None
    assert net[4].weight.grad.eq(1).all()
    for name in ("0.weight", "4.weight"):
        del expected_grads[name]
    net[4].weight.grad = None
    assert_grads(net, expected_grads)


@both_forms
def test_everything_frozen(form):
    net = network().requires_grad_(False)
    expected, *_ = by_reference(net)
    reg = OrthoRegularizer(net)
    value = reg() if form is loss_form else form(reg)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12) and not grads(net)


@pytest.mark.parametrize("method", ["__call__", "accumulate_grad_"])
def test_no_grad_and_inference_mode_give_the_value(method):
    net = network()
    expected, *_ = by_reference(net)
    for mode in (torch.no_grad, torch.inference_mode) if method == "__call__" else (torch.no_grad,):
        with mode():
            value = getattr(OrthoRegularizer(net), method)()
        assert value.item() == pytest.approx(expected.item(), rel=1e-12) and not value.requires_grad


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


@pytest.mark.parametrize("interval", [0, -1, 1.5, "2", None])
def test_interval_must_be_a_positive_int(interval):
    with pytest.raises(ValueError, match="interval must be a positive int, got " + repr(interval)):
        OrthoRegularizer(network(), interval=interval)


def replaced(conv, change):
    """The ways in which a weight is exchanged between two calls."""
    new = torch.randn_like(conv.weight)
    change(conv, new)
    assert torch.equal(conv.weight, new)


@both_forms
@pytest.mark.parametrize(
    "change",
    [
        lambda conv, new: conv.load_state_dict({"weight": new}, assign=True),
        lambda conv, new: setattr(conv, "weight", nn.Parameter(new.clone())),
        lambda conv, new: setattr(conv.weight, "data", new.clone()),
        lambda conv, new: torch.utils.swap_tensors(conv.weight, nn.Parameter(new.clone())),
        lambda conv, new: conv.weight.detach().copy_(new),
    ],
    ids=["assign=True", "new Parameter", "data", "swap_tensors", "copy_"],
)
def test_weights_are_looked_up_at_each_call(form, change):
    net = network()
    reg = OrthoRegularizer(net)
    reg()
    net.zero_grad()
    replaced(net[0], change)
    expected, expected_grads, _ = by_reference(net)
    assert form(reg).item() == pytest.approx(expected.item(), rel=1e-12)
    assert_grads(net, expected_grads)


def test_moved_and_converted_after_construction():
    net = network()
    reg = OrthoRegularizer(net)
    expected, expected_grads, _ = by_reference(net)
    net.float()
    value = reg()
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_grads(net, expected_grads, 1e-5)


def test_averaged_weights_swapped_in_and_out():
    """EMA: the values of the moment are penalised, and the live ones again afterwards."""
    net = network()
    average = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    average.update_parameters(net)
    reg = OrthoRegularizer(net)
    live, other = by_reference(net)[0].item(), by_reference(average.module)[0].item()
    assert abs(live - other) > 0.1 * live
    values = [reg().item()]
    kept = {name: p.detach().clone() for name, p in net.named_parameters()}
    net.load_state_dict(average.module.state_dict())
    values.append(reg().item())
    net.load_state_dict(kept, assign=True)
    values.append(reg().item())
    assert values == pytest.approx([live, other, live], rel=1e-12)


def test_functional_call_is_seen():
    """Inside `torch.func.functional_call` the given weights are penalised and receive the gradient."""

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.reg = OrthoRegularizer(self.net)

        def forward(self):
            return self.reg()

    module = Penalised()
    given = {n: (2 * p.detach()).requires_grad_() for n, p in module.named_parameters()}
    value = torch.func.functional_call(module, given, ())
    twice = network()
    with torch.no_grad():
        for p in twice.parameters():
            p.mul_(2)
    expected, expected_grads, _ = by_reference(twice)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    value.backward()
    assert not grads(module)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(given[f"net.{name}"].grad, grad, rtol=1e-10, atol=1e-12)


@both_forms
def test_autocast_does_not_touch_the_penalty(form, device):
    """Computed from the float32 masters: the same bits as without autocast."""
    net = network(torch.float32).to(device)
    reg = OrthoRegularizer(net, 0.1)
    expected = form(reg).detach().clone()
    expected_grads = {name: g.clone() for name, g in grads(net).items()}
    net.zero_grad()
    with torch.autocast(device.type, torch.bfloat16):
        assert net(torch.randn(2, 4, 9, 9, device=device)).dtype == torch.bfloat16  # autocast is on
        value = form(reg)
    assert value.dtype == torch.float32 and torch.equal(value.detach(), expected)
    assert grads(net).keys() == expected_grads.keys()
    assert all(torch.equal(grad, expected_grads[name]) for name, grad in grads(net).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    net = network(torch.float32).to(dtype)
    expected, expected_grads, _ = by_reference(net, 0.1)
    value = OrthoRegularizer(net, 0.1).accumulate_grad_()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert_grads(net, expected_grads, tolerance=2 * torch.finfo(dtype).eps)


def test_a_graph_of_the_gradient_is_refused_with_the_way_out():
    net = network()
    value = OrthoRegularizer(net)()
    with pytest.raises(RuntimeError, match=r"differentiable once.*create_graph=True.*reference\.orthogonality_loss"):
        torch.autograd.grad(value, net[0].weight, create_graph=True)


def test_create_graph_of_the_network_alone_still_works():
    """A gradient penalty of a GAN beside the regularizer."""
    net = network()
    x = torch.randn(2, 4, 9, 9, dtype=DOUBLE, requires_grad=True)
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (slope.square().sum() + OrthoRegularizer(net)()).backward()
    alone = network()
    (slope,) = torch.autograd.grad(alone(x).sum(), x, create_graph=True)
    slope.square().sum().backward()
    _, expected, _ = by_reference(net)
    base = grads(alone)
    for name in base.keys() & expected.keys():
        torch.testing.assert_close(grads(net)[name], base[name] + expected[name], rtol=1e-10, atol=1e-12)


def test_last_is_unweighted_detached_and_of_the_last_computed_call():
    net = network()
    reg = OrthoRegularizer(net, coeff=lambda name, module: 0.5 if name == "0" else 2.0)
    assert reg.last.shape == () and reg.last.item() == 0 and not reg.computed  # a number, for loggers
    assert reg.last_total().item() == 0
    *_, unweighted = by_reference(net)
    value = reg()
    assert reg.last.shape == () and not reg.last.requires_grad and reg.last.grad_fn is None
    assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)  # not computed again
    value.detach_()
    reg.summary()
    assert reg.last.item() == pytest.approx(unweighted, rel=1e-12)


def test_two_forwards_before_a_backward_do_not_mix():
    net = network()
    reg = OrthoRegularizer(net)
    _, first, _ = by_reference(net)
    early = reg()
    with torch.no_grad():
        for p in net.parameters():
            p.data.mul_(2)  # unseen by autograd's version counter, as an optimizer of another network would be
    _, second, _ = by_reference(net)
    late = reg()
    early.backward()
    assert_grads(net, first)
    net.zero_grad()
    late.backward()
    assert_grads(net, second)


NOTHING = {
    "the model has no convolution or linear layer": nn.Sequential(nn.ReLU()),
    r"it leaves out the model itself \(linear, not in include\)": nn.Linear(3, 3),
    r"'up' \(transposed, not in include\)": nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3)}),
    r"'a', 'b' \(filter official_filter\); 'c' \(penalty=None\)": nn.ModuleDict(
        {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 7), "c": OrthoConv2d(4, 4, 3, penalty=None)}
    ),
    r"'0', '1', '2', '3', '4' and 4 more \(filter": nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(9)]),
}


@pytest.mark.parametrize("why", NOTHING)
def test_nothing_to_penalise_is_said_with_what_was_left_out_and_why(why):
    net = NOTHING[why]
    with pytest.warns(UserWarning, match="OrthoRegularizer has nothing to penalise: .*" + why) as caught:
        reg = OrthoRegularizer(net)
    assert caught[0].filename == __file__
    for _ in range(2):
        value = reg()
        assert value.item() == 0 and value.shape == ()
        value.backward()
    assert reg.accumulate_grad_().item() == 0
    assert reg.last.item() == 0
    assert all(row.excluded for row in reg.summary()) and "total" in str(reg.summary())
    assert not grads(net)


def test_a_users_filter_is_named_where_it_leaves_nothing():
    def only_heads(name, module):
        return "head" in name

    with pytest.warns(UserWarning, match=r"filter .*only_heads"):
        OrthoRegularizer(network(), filter=only_heads)


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


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"penalty": "soft"}, ValueError, r"penalty must be one of .*or None.* got 'soft'"),
        ({"penalty": np.array(["lorth", "isonet"])}, ValueError, r"penalty must be one of .*got array"),
        ({"precision": "high"}, ValueError, r"precision must be one of .*'highest'.*got 'high'"),
        ({"filter": "conv"}, TypeError, r"filter must be callable\(name, module\) or None, got str"),
        ({"filter": lambda name: True}, TypeError, r"filter must take two arguments, \(name, module\), got .*\(name\)"),
        ({"filter": lambda *, name: True}, TypeError, r"filter must take two arguments"),
        (
            {"filter": lambda name, module: module.weight > 0},
            TypeError,
            "filter must return True or False, got a Tensor",
        ),
        ({"coeff": "1e-4"}, TypeError, r"coeff must be a number.* got '1e-4'"),
        ({"coeff": None}, TypeError, "coeff must be a number.* got None"),
        ({"coeff": 1e-4j}, TypeError, "coeff must be a number.* got 0.0001j"),
        ({"coeff": True}, TypeError, "coeff must be a number.* got True"),
        ({"coeff": torch.ones(2)}, TypeError, "coeff must be a number"),
        ({"coeff": torch.ones((), device="meta")}, TypeError, "coeff must be a number"),
        ({"coeff": lambda name, module: None}, TypeError, r"coeff must be a number or give one.* got None for '0'"),
        ({"coeff": lambda module: 1.0}, TypeError, r"coeff must take two arguments, \(name, module\)"),
        ({"coeff": float("nan")}, ValueError, "coeff must be finite and at least 0, got nan"),
        ({"coeff": float("inf")}, ValueError, "coeff must be finite and at least 0, got inf"),
        ({"coeff": 10**400}, ValueError, "coeff must be finite and at least 0, got inf"),
        ({"coeff": -1}, ValueError, "coeff must be finite and at least 0, got -1"),
        ({"coeff": lambda name, module: -0.5}, ValueError, "coeff must be finite.* got -0.5 for '0'"),
        ({"model": None}, TypeError, "model must be a torch.nn.Module, got NoneType"),
        ({"model": OrthoConv2d}, TypeError, "model must be a torch.nn.Module, got type"),
        ({"include": "linear"}, TypeError, "include must be a class or a tuple of classes.* got 'linear'"),
        ({"include": (nn.Linear, nn.ReLU)}, TypeError, "include must be .*nn.Linear.*ReLU"),
        ({"interval": True}, ValueError, "interval must be a positive int, got True"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=message):
        OrthoRegularizer(**{"model": network()} | arguments)


@pytest.mark.parametrize(
    "number",
    [
        torch.tensor(0.5),
        torch.tensor([0.5], requires_grad=True),
        np.float32(0.5),
        np.array(0.5),
        Fraction(1, 2),
        Decimal("0.5"),
    ],
    ids=lambda number: type(number).__name__,
)
def test_coeff_may_be_a_number_of_any_kind(number):
    net = network()
    expected, *_ = by_reference(net, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for coeff in (number, lambda name, module: number):
            assert OrthoRegularizer(net, coeff)().item() == pytest.approx(expected.item(), rel=1e-12)
    assert OrthoRegularizer(net, 3)().item() == pytest.approx(6 * expected.item(), rel=1e-12)


def test_interval_may_be_an_integer_of_any_kind():
    for interval in (np.int64(2), torch.tensor(2)):
        assert OrthoRegularizer(network(), interval=interval).interval == 2


def test_what_a_filter_raises_says_about_which_layer_it_was_asked():
    with pytest.raises(AttributeError) as caught:
        OrthoRegularizer(network(), filter=lambda name, module: module.kernel_size == (3, 3))
    assert caught.value.__notes__ == ["raised by filter= of OrthoRegularizer, asked about '11', a OrthoLinear"]


def test_a_filter_may_return_what_is_true_or_false():
    """A match of a regular expression, None, a number, an array's bool."""
    answers = {"0": re.match("0", "0"), "2": np.bool_(True), "3": torch.tensor(True)}
    reg = OrthoRegularizer(network(), filter=lambda name, module: answers.get(name))
    assert [row.name for row in reg.summary() if not row.excluded] == ["0", "2", "3"]


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
def test_gradient_accumulation(form):
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


@pytest.mark.parametrize("state", [{}, None, {"calls": "3"}, {"calls": -1}, {"calls": True}, [("calls", 3)]])
def test_a_state_of_something_else_is_refused(state):
    reg = OrthoRegularizer(network(), interval=2)
    with pytest.raises(ValueError, match=r'state must be what state_dict\(\) returned, \{"calls": N\}, got '):
        reg.load_state_dict(state)
    assert reg.state_dict() == {"calls": 0}
