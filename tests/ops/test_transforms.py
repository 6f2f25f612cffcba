"""SReLU and the join under torch.func, forward-mode AD and batched gradients: the reference's values in float64."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from isonet_fast import OrthoConv2d, SReLU, functional, models, reference

DOUBLE = torch.float64


def arguments(form):
    shapes = {
        "srelu": [(2, 3, 4), (3,)],
        "join": [(2, 3, 4)] * 2 + [(1, 3, 1)],
        "scaled": [(2, 3, 4)] * 2 + [(3,), (1,)],
    }
    return tuple(torch.randn(shape, dtype=DOUBLE) for shape in shapes[form])


def function(form, inplace=False):
    """Ours and the reference's, each between two operations that are not linear."""
    if form == "srelu":
        ours = lambda x, b: functional.srelu(x.sin(), b, inplace).exp()
        return ours, lambda x, b: reference.srelu(x.sin(), b).exp()
    ours = lambda x, h, b, *s: functional.residual_srelu(x, h.sin(), b, *(s or [None]), inplace).exp()
    return ours, lambda x, h, b, *s: reference.residual_srelu(x, h.sin(), b, *s).exp()


FORMS = [("srelu", False), ("srelu", True), ("join", False), ("join", True), ("scaled", False)]
summed = lambda f: lambda *args: f(*args).square().sum()
every = lambda args: tuple(range(len(args)))
TRANSFORMS = {
    "grad": lambda f, args: grad(summed(f), every(args))(*args),
    "vjp": lambda f, args: vjp(f, *args)[1](torch.ones(2, 3, 4, dtype=DOUBLE)),
    "jvp": lambda f, args: jvp(f, args, tuple(a.cos() for a in args)),
    "jacrev": lambda f, args: jacrev(f, every(args))(*args),
    "jacfwd": lambda f, args: jacfwd(f, every(args))(*args),
    "hessian": lambda f, args: hessian(summed(f), every(args))(*args),
    "vmap": lambda f, args: vmap(f)(*(torch.stack([a, -a, 2 * a]) for a in args)),
    "vmap of one": lambda f, args: vmap(f, (1, *[None] * (len(args) - 1)))(
        torch.stack([args[0], -args[0]], 1), *args[1:]
    ),
    "vmap(grad)": lambda f, args: vmap(grad(summed(f), every(args)))(*(torch.stack([a, -a]) for a in args)),
    "grad(grad)": lambda f, args: grad(lambda *a: grad(summed(f))(*a).square().sum(), every(args))(*args),
    "jacrev(jvp)": lambda f, args: jacrev(lambda *a: jvp(f, a, a)[1])(*args),
}


@pytest.mark.parametrize(("form", "inplace"), FORMS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_agrees_with_the_reference(transform, form, inplace):
    args = arguments(form)
    ours, theirs = function(form, inplace)
    got, want = (tree_leaves(TRANSFORMS[transform](f, args)) for f in (ours, theirs))
    assert len(got) == len(want) > 0
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ties_and_nan_under_torch_func():
    x = torch.tensor([[0.5, 0.5, 2.0, float("nan"), 1.0]], dtype=DOUBLE)
    b = torch.tensor([0.5, 0.6, 1.0, 0.0, float("nan")], dtype=DOUBLE)
    dx, db = grad(lambda x, b: functional.srelu(x, b).sum(), (0, 1))(x, b)
    assert dx.tolist() == [[0, 0, 1, 1, 1]] and db.tolist() == [1, 1, 0, 0, 0]


@pytest.mark.parametrize(("form", "inplace"), FORMS)
def test_forward_mode_and_batched_gradients(form, inplace):
    args = tuple(a.requires_grad_() for a in arguments(form))
    ours, theirs = function(form, inplace)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, a.cos()) for a in args]
        tangents = [forward_ad.unpack_dual(f(*duals)).tangent for f in (ours, theirs)]
    torch.testing.assert_close(*tangents, rtol=1e-12, atol=1e-12)
    grads = torch.randn(5, 2, 3, 4, dtype=DOUBLE)
    got, want = (torch.autograd.grad(f(*args), args, grads, is_grads_batched=True) for f in (ours, theirs))
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    plain = lambda *a: functional.srelu(*a) if form == "srelu" else functional.residual_srelu(*a)
    assert torch.autograd.gradcheck(plain, args, check_forward_ad=True, check_batched_grad=True)


@pytest.mark.parametrize("residual", [False, True])
def test_gradients_of_every_example_through_a_network(residual):
    """vmap(grad) over functional_call, as differential privacy does it: a loop over the examples."""
    net = models.isonet_cifar(8, residual, width=4).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    parameters, images = dict(net.named_parameters()), torch.randn(3, 3, 8, 8, dtype=DOUBLE)
    loss = lambda parameters, image: functional_call(net, parameters, (image[None],)).square().sum()
    got = vmap(grad(loss), (None, 0))(parameters, images)
    for n, image in enumerate(images):
        want = torch.autograd.grad(net(image[None]).square().sum(), list(parameters.values()))
        for name, w in zip(parameters, want):
            torch.testing.assert_close(got[name][n], w, rtol=1e-10, atol=1e-10)


def test_a_gradient_penalty_compiles():
    """R1 of a discriminator: torch.compile refuses a second backward through a compiled network, whatever its layers.
    The remedy is to compile the penalty as a whole, its inner gradient by torch.func."""
    layers = [OrthoConv2d(3, 4, 3), SReLU(4, inplace=True), OrthoConv2d(4, 4, 3), SReLU(4), torch.nn.Flatten()]
    net = torch.nn.Sequential(*layers, torch.nn.Linear(64, 1)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.2 * torch.randn_like(p))
    images, parameters = torch.randn(2, 3, 8, 8, dtype=DOUBLE), list(net.parameters())

    def penalty(images):
        return grad(lambda x: net(x).sum())(images).square().sum()

    value = torch.compile(penalty, backend="aot_eager", fullgraph=True)(images)
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    got, want = (
        torch.autograd.grad(v, parameters, allow_unused=True, materialize_grads=True) for v in (value, expected)
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
