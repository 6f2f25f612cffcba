"""The switches: each setting's layers, initial values and function; the defaults are the published networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isonet_fast import OrthoRegularizer, SReLU, deconvert, param_groups, reference
from isonet_fast.models import isonet18, isonet_cifar
from isonet_fast.models.isonet import ISONet

DOUBLE = torch.float64
KINDS = list(itertools.product([False, True], ["srelu", "relu"], ["none", "batch"], ["published", None, 0.5]))


def generic(net: nn.Module) -> nn.Module:
    """Away from its initial values, in float64."""
    with torch.no_grad():
        for name, p in net.double().named_parameters():
            p.copy_(0.3 * torch.randn_like(p) + (1 if name.endswith("bn.weight") else 0))
    return net


def by_hand(net: nn.Module, x: Tensor, activation: str) -> Tensor:
    """isonet_cifar layer by layer: nothing folded, fused or in place."""

    def conv(x: Tensor, holder: nn.Module, name: str, norm: str) -> Tensor:
        layer = getattr(holder, name)
        x = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding)
        return x if getattr(holder, norm) is None else getattr(holder, norm)(x)

    def act(x: Tensor, layer: nn.Module) -> Tensor:
        return F.relu(x) if activation == "relu" else reference.srelu(x, layer.srelu_bias)

    x = act(conv(x, net.stem, "conv", "bn"), net.stem.relu)
    for block in itertools.chain(net.s1, net.s2, net.s3):
        f = block.f
        h = conv(act(conv(x, f, "a", "a_bn"), f.a_relu), f, "b", "b_bn")
        if hasattr(f, "shared_scalar"):
            h = f.shared_scalar.scale * h
        if block.residual:
            h = h + (x if block.proj is None else conv(x, block, "proj", "bn"))
        x = act(h, block.relu)
    return net.head.fc(x.mean((2, 3)))


def results(net: nn.Module, forward, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    net.zero_grad()
    y = forward(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize("residual, activation, normalisation, branch_scale", KINDS)
def test_every_combination_computes_what_it_says(residual, activation, normalisation, branch_scale):
    switches = dict(activation=activation, normalisation=normalisation, branch_scale=branch_scale)
    net = generic(isonet_cifar(8, residual, width=4, **switches))
    modules = dict(net.named_modules())
    assert (isinstance(net.stem.relu, nn.ReLU), "s1.b1.f.b_bn" in modules) == (
        activation == "relu",
        normalisation == "batch",
    )
    assert ("s1.b1.f.shared_scalar" in modules) == (
        residual if branch_scale == "published" else branch_scale is not None
    )
    assert all((m.bias is not None) == (activation == "relu" and normalisation == "none") for m in convolutions(net))
    x = torch.randn(3, 3, 9, 8, dtype=DOUBLE)
    got = results(net, net, x)
    want = results(net, lambda x: by_hand(net, x, activation), x)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * max(1.0, theirs.abs().max().item()))


def convolutions(net: nn.Module) -> list[nn.Conv2d]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d)]


def test_the_defaults_are_the_published_networks():
    for residual, scale in ((False, None), (True, 0.0)):
        spelt = dict(
            activation="srelu", bias_init=-1.0, bias_learned=True, initialisation="delta", normalisation="none"
        )
        torch.manual_seed(0)
        default = isonet_cifar(8, residual).state_dict()
        torch.manual_seed(0)
        net = isonet_cifar(8, residual, **spelt, branch_scale=scale)
        assert list(net.state_dict()) == list(default)
        assert all(torch.equal(net.state_dict()[name], value) for name, value in default.items())


def test_kaiming_is_normal_with_the_variance_of_the_outputs():
    net = isonet18(initialisation="kaiming")
    for conv in convolutions(net):
        std = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels))
        count = conv.weight.numel()
        assert abs(conv.weight.std().item() / std - 1) < 5 / math.sqrt(count), conv
        assert abs(conv.weight.mean().item()) < 5 * std / math.sqrt(count)


def test_initial_values_of_relu_and_of_batch_normalisation():
    net = ISONet(50, True, activation="relu", normalisation="batch", branch_scale=1.0)
    assert {conv.bias for conv in convolutions(net)} == {None}
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            last = name.endswith("f.c_bn")
            assert module.weight.eq(0.0 if last else 1.0).all() and module.bias.eq(0).all(), name
    assert net.s1.b1.f.shared_scalar.scale.item() == 1
    relu = ISONet(18, activation="relu")
    assert all(conv.bias.eq(0).all() for conv in convolutions(relu))
    assert relu.stem.conv.weight.std() > 0.02  # PyTorch's initialisation; the others are a delta
    assert torch.equal(relu.s1.b1.f.a.weight, nn.init.dirac_(torch.empty(64, 64, 3, 3)))
    assert list(relu.state_dict())[:2] == ["stem.conv.weight", "stem.conv.bias"]


def test_batch_normalisation_without_a_skip_starts_as_in_the_official_code():
    """The weights behind each branch are 0 there too: the network is a constant until they are set to 1."""
    net = isonet_cifar(8, activation="relu", normalisation="batch", initialisation="kaiming")
    ends = [module for name, module in net.named_modules() if name.endswith("f.b_bn")]
    assert len(ends) == 3 and not any(module.weight.any() for module in ends)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(*net(x))
    for module in ends:
        nn.init.ones_(module.weight)
    assert not torch.equal(*net(x))


def test_srelu_with_another_bias_or_a_fixed_one():
    net = isonet_cifar(8, bias_init=0.5, bias_learned=False)
    layers = [m for m in net.modules() if isinstance(m, SReLU)]
    assert len(layers) == 7 and all(m.srelu_bias.eq(0.5).all() and not m.srelu_bias.requires_grad for m in layers)
    net(torch.randn(1, 3, 8, 8)).sum().backward()
    assert all(m.srelu_bias.grad is None for m in layers)


def test_penalty_and_parameter_groups_know_them():
    net = isonet_cifar(8, True, activation="relu", normalisation="batch", branch_scale=1.0)
    included = {row.name for row in OrthoRegularizer(net).summary() if not row.excluded}
    assert included == {n for n, m in net.named_modules() if isinstance(m, nn.Conv2d)} - {"stem.conv"}
    scales = {id(p) for name, p in net.named_parameters() if name.endswith("scale")}
    groups = param_groups(net, 0.1, 1e-4)
    assert [{id(p) for p in g["params"]} for g in groups if g["lr"] < 0.1] == [scales] and len(scales) == 3


def test_compiles_scripts_and_copies():
    net = generic(isonet_cifar(8, True, width=4, activation="relu", normalisation="batch", branch_scale=0.5)).eval()
    x = torch.randn(2, 3, 9, 8, dtype=DOUBLE)
    expected = net(x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(deconvert(net)(x), expected, rtol=0, atol=1e-11)


FIXUP = dict(activation="relu", initialisation="kaiming", fixup=True)


def test_fixup_computes_what_it_says():
    """A shift before every convolution, activation and the classifier, a scale behind every branch."""
    net = generic(isonet_cifar(14, True, width=4, **FIXUP))

    def conv(x, holder, name):
        layer, shift = getattr(holder, name), getattr(holder, f"{name}_in").shift
        return F.conv2d(x + shift, layer.weight, None, layer.stride, layer.padding)

    def forward(x):
        x = F.relu(net.stem.conv(x) + net.stem.out.shift)
        for block in itertools.chain(net.s1, net.s2, net.s3):
            f = block.f
            h = conv(F.relu(conv(x, f, "a") + f.a_out.shift), f, "b") * f.shared_scalar.scale + f.b_out.shift
            x = F.relu(h + (x if block.proj is None else conv(x, block, "proj")))
        return net.head.fc(x.mean((2, 3)) + net.head.fc_in.shift.view(1, 1))

    x = torch.randn(3, 3, 9, 8, dtype=DOUBLE)
    for mine, theirs in zip(results(net, net, x), results(net, forward, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize("depth, convolutions_of_a_branch", [(18, 2), (50, 3)])
def test_fixup_starts_as_published(depth, convolutions_of_a_branch):
    net = ISONet(depth, True, num_classes=5, dropout=0.0, **FIXUP)
    branches = [m for name, m in net.named_modules() if name.endswith(".f")]
    m, count = convolutions_of_a_branch, len(branches)
    assert count == (8 if depth == 18 else 16)
    for branch in branches:
        *others, last = convolutions(branch)
        assert len(others) == m - 1 and not last.weight.any() and branch.shared_scalar.scale.item() == 1
        for conv in others:
            std = math.sqrt(2 / (conv.kernel_size[0] ** 2 * conv.out_channels)) * count ** (-1 / (2 * m - 2))
            assert abs(conv.weight.std().item() / std - 1) < 5 / math.sqrt(conv.weight.numel())
    shifts = [name for name, p in net.named_parameters() if name.endswith("shift")]
    assert len(shifts) == 2 + 2 * m * count + sum(
        block.proj is not None for s in (net.s1, net.s2, net.s3, net.s4) for block in s
    )
    assert not any(net.get_parameter(name).any() for name in shifts)
    assert not any(conv.bias is not None for conv in convolutions(net))
    assert not net(torch.randn(2, 3, 32, 32)).any()  # the classifier starts at 0
    at_a_tenth = {name for name, p in net.named_parameters() if name.endswith(("shift", "scale"))}
    groups = param_groups(net, 0.1, 1e-4)
    slow = {id(p) for group in groups if group["lr"] < 0.1 for p in group["params"]}
    assert {name for name, p in net.named_parameters() if id(p) in slow} == at_a_tenth


@pytest.mark.parametrize(
    "switches, error, message",
    [
        (dict(activation="gelu"), ValueError, r"activation must be one of \('srelu', 'relu'\), got 'gelu'"),
        (dict(normalisation=None), ValueError, r"normalisation must be one of \('none', 'batch'\), got None"),
        (dict(initialisation=["delta"]), ValueError, "initialisation must be one of"),
        (dict(bias_init="0"), ValueError, "bias_init must be a finite number, got '0'"),
        (dict(bias_init=math.nan), ValueError, "bias_init must be a finite number, got nan"),
        (dict(bias_learned=1), TypeError, "bias_learned must be True or False, got 1"),
        (dict(branch_scale="0"), ValueError, "branch_scale must be \"published\", None or a finite number, got '0'"),
        (dict(branch_scale=True), ValueError, "branch_scale must be"),
        (dict(fixed=1), TypeError, "fixed"),
        (dict(fixup=1), TypeError, "fixup must be True or False, got 1"),
        (
            dict(fixup=True),
            ValueError,
            "fixup=True needs residual=True, activation=.relu.*got False, 'srelu', 'none' and",
        ),
    ],
)
def test_errors_name_the_switch(switches, error, message):
    with pytest.raises(error, match=message):
        isonet_cifar(8, **switches)
