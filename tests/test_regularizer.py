"""OrthoRegularizer: the sum over a network of coeff * penalty, as a loss and straight into `.grad`.

Work split over ranks: test_regularizer_work_group.py. Which layers, coefficients, summary: test_regularizer_layers.py.
"""

import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer

from .regularized import DOUBLE, assert_grads, both_forms, by_reference, forms_of_3x3, grads, loss_form, network

# Loss and gradient against the float64 reference: bf16x3 and bf16 products on the GPU (docs/design.md, "The penalty's
# precision"), rounding of float32 GEMMs on the CPU
TOLERANCE = {
    ("cpu", DOUBLE): (1e-12, 1e-12),
    ("cuda", DOUBLE): (1e-12, 1e-12),
    ("cpu", torch.float32): (1e-5, 1e-5),
    ("cuda", torch.float32): (1e-4, 1e-2),
}


def test_the_network_has_layers_over_offsets_and_over_frequencies():
    assert forms_of_3x3(network()) == {"overlap", "frequency"}


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
def test_highest_precision_agrees_with_the_reference(dtype, device):
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
def test_a_frozen_network_gets_the_value_and_no_gradients(form):
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
