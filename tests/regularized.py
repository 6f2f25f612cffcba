"""A network with every kind of layer, its penalty by the reference, and the two forms of `OrthoRegularizer`."""

from unittest import mock

import pytest
import torch
from torch import nn

from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, OrthoLinear, OrthoRegularizer, SReLU, reference
from isonet_fast.ops import closed_form

DOUBLE = torch.float64


def network(dtype=DOUBLE):
    """Every kind of layer that is covered, some of one shape, of both forms, and a few that are not."""
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, stride=2, bias=False),
        SReLU(16),
        OrthoConv2d(16, 16, 3, padding=1, penalty="lorth"),
        OrthoConv2d(16, 16, 3, padding=1, penalty="lorth"),
        nn.Conv2d(16, 8, 3, groups=4, dilation=2, padding=2),
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


def forms_of_3x3(net):
    """In which forms the closed form computes the layers of nine taps and stride 1."""
    with mock.patch.object(closed_form, "evaluate", wraps=closed_form.evaluate) as evaluate:
        OrthoRegularizer(net).accumulate_grad_()
    _, layers, work, _ = evaluate.call_args.args
    return {form for layer, (form, _) in zip(layers, work, strict=True) if layer.taps == 9 and layer.steps == (1, 1)}


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
