"""The penalty under torch.func and forward-mode AD, against the reference in float64."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from isonet_fast import functional, reference
from isonet_fast.geometry import PENALTIES

GEOMETRY = dict(stride=2, dilation=(1, 2), groups=2)


def both(penalty):
    """The penalty of a weight: ours and the reference's."""
    return [
        lambda w, loss=loss: loss(w, penalty=penalty, **GEOMETRY)
        for loss in (functional.orthogonality_loss, reference.orthogonality_loss)
    ]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_transforms_of_one_weight(penalty):
    ours, exact = both(penalty)
    weight, tangent = torch.randn(2, 6, 2, 3, 3, dtype=torch.float64)
    for transform in (grad, jacrev, jacfwd):
        close(transform(ours)(weight), transform(exact)(weight))
    close(hessian(ours)(weight[:4, :1, :2]), hessian(exact)(weight[:4, :1, :2]))
    for a, b in zip(jvp(ours, (weight,), (tangent,)), jvp(exact, (weight,), (tangent,))):
        close(a, b)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, tangent)
        close(forward_ad.unpack_dual(ours(dual)).tangent, forward_ad.unpack_dual(exact(dual)).tangent)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_many_weights_at_once(penalty):
    ours, exact = both(penalty)
    weights = torch.randn(3, 6, 2, 3, 3, dtype=torch.float64)
    one_by_one = torch.stack([exact(w) for w in weights])
    close(vmap(ours)(weights), one_by_one)
    close(vmap(ours, in_dims=2)(weights.movedim(0, 2)), one_by_one)
    close(vmap(grad(ours))(weights), torch.stack([grad(exact)(w) for w in weights]))


def test_the_weights_of_a_network():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 6, 3)).double()
    x = torch.randn(5, 3, 9, 9, dtype=torch.float64)

    def loss(parameters, x, penalty):
        weights = [parameters["0.weight"], parameters["1.weight"]]
        return functional_call(net, parameters, (x,)).square().sum() + penalty(weights, stride=[2, 1], penalty="lorth")

    parameters = dict(net.named_parameters())
    per_sample = vmap(grad(loss), in_dims=(None, 0, None))
    found = per_sample(parameters, x.unsqueeze(1), functional.orthogonality_loss)
    expected = per_sample(parameters, x.unsqueeze(1), reference.orthogonality_loss)
    for name in parameters:
        close(found[name], expected[name])


def test_half_precision_is_computed_in_float32():
    weight = torch.randn(8, 8, 3, 3).bfloat16()
    found = grad(functional.orthogonality_loss)(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = vmap(functional.orthogonality_loss)(weight[None])
    wide = weight.float().requires_grad_()
    exact = reference.orthogonality_loss(wide)
    assert value.dtype == torch.float32 and found.dtype == torch.bfloat16
    torch.testing.assert_close(value[0], exact.detach())
    torch.testing.assert_close(found, torch.autograd.grad(exact, wide)[0].bfloat16())


def test_a_transform_checks_arguments_too():
    with pytest.raises(ValueError, match="groups must be a positive divisor"):
        grad(lambda w: functional.orthogonality_loss(w, groups=3))(torch.randn(4, 4, 3, 3))
    with pytest.raises(TypeError, match="weights must be float32"):
        vmap(functional.orthogonality_loss)(torch.ones(2, 4, 4, dtype=torch.int32))
