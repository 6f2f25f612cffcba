"""What people hang on a network's layers: hooks, pruning, norms, parametrisations, wrappers. Each sees and changes what
it would in a network whose scale is not folded into a convolution and whose joins are not in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from isonet_fast import reference
from isonet_fast.models import isonet_cifar
from isonet_fast.models.blocks import BasicBranch, Block, BottleneckBranch, stage
from isonet_fast.models.ingredients import Ingredients

LAST = {BasicBranch: "b", BottleneckBranch: "c"}


class Lora(nn.Module):
    """y = conv(x) + up(down(x)), the convolution inside."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        self.down = nn.Conv2d(conv.in_channels, 2, conv.kernel_size, padding=conv.padding, bias=False).double()
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.up(self.down(x))


class Halved(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(2, 3)


def hook_based(norm: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    def apply(conv: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # deprecated, and in many networks
            return norm(conv)

    return apply


def halved(conv: nn.Module) -> nn.Module:
    conv.__class__ = Halved
    return conv


def patched(conv: nn.Module) -> nn.Module:
    forward = type(conv).forward
    conv.forward = lambda x: 3 * forward(conv, x)  # type: ignore[method-assign]
    return conv


def masked(conv: nn.Module) -> nn.Module:
    return prune.random_unstructured(conv, "weight", 0.5)


def parametrized(conv: nn.Module) -> nn.Module:
    parametrize.register_parametrization(conv, "weight", Symmetric())
    return conv


def doubled(conv: nn.Module) -> nn.Module:
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    return conv


def shifted(conv: nn.Module) -> nn.Module:
    conv.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return conv


ATTACHED = {
    "nothing": lambda conv: conv,
    "forward hook": doubled,
    "forward pre-hook": shifted,
    "pruned": masked,
    "weight_norm by hook": hook_based(nn.utils.weight_norm),
    "spectral_norm by hook": hook_based(nn.utils.spectral_norm),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "parametrized": parametrized,
    "wrapper": Lora,
    "subclass": halved,
    "replaced forward": patched,
}


def block(branch: type[nn.Module], attach: Callable[[nn.Module], nn.Module]) -> Block:
    """A strided residual block away from its initial values, with something on its branch's last convolution; the same
    at every call."""
    torch.manual_seed(1)
    (block,) = stage(branch, 4, 8, 2, 1, Ingredients(True)).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    setattr(block.f, LAST[branch], attach(getattr(block.f, LAST[branch])))
    return block


def by_hand(block: Block, x: Tensor) -> Tensor:
    """The block as in the paper, every layer called, nothing in place."""
    f = block.f
    h = reference.srelu(f.a(x), f.a_relu.srelu_bias)
    h = f.b(h) if isinstance(f, BasicBranch) else f.c(reference.srelu(f.b(h), f.b_relu.srelu_bias))
    return reference.residual_srelu(block.proj(x), f.shared_scalar.scale * h, block.relu.srelu_bias)


def results(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """By name: output, every gradient (none may be missing), every buffer."""
    x = x.clone().requires_grad_()
    y = forward(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters()}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient for {missing}"
    return {"y": y.detach(), "x": x.grad, **grads, **{name: b.clone() for name, b in module.named_buffers()}}


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-11 * max(1.0, value.abs().max().item()), msg=name)


@pytest.mark.parametrize("branch", LAST)
@pytest.mark.parametrize("kind", ATTACHED)
def test_a_branch_computes_with_its_last_layer_as_it_is(branch, kind):
    """Values, every gradient and the buffers (a power iteration advances once), two steps in a row."""
    mine, theirs = block(branch, ATTACHED[kind]), block(branch, ATTACHED[kind])
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    for _ in range(2):
        got = results(mine, mine, x)
        mine.zero_grad()
        want = results(theirs, lambda x: by_hand(theirs, x), x)
        theirs.zero_grad()
        assert_same(got, want)


def test_only_a_bare_convolution_is_folded_into():
    """What the fold saves: a bare convolution is never called, and nothing scales its output."""
    mine, calls = block(BasicBranch, lambda conv: conv), []
    for module in (mine.f.b, mine.f.shared_scalar):
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
        mine(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert calls == [mine.f.b, mine.f.b, mine.f.shared_scalar]
    bare = block(BasicBranch, lambda conv: conv)
    y = bare.f(torch.randn(1, 4, 5, 5, dtype=torch.float64))
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"


def test_a_hook_on_every_module_sees_every_module():
    """As profilers and FLOP counters register it."""
    net, seen = isonet_cifar(8, True, width=4), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module))
    try:
        net(torch.randn(1, 3, 8, 8))
    finally:
        handle.remove()
    assert [name for name, module in net.named_modules() if module not in seen] == []


HOOKED = ["stem", "stem.conv", "stem.relu", "s2.b1", "s2.b1.proj", "s2.b1.relu", "s2.b1.f", "s2.b1.f.a", "s2.b1.f.b"]
HOOKED += ["s2.b1.f.a_relu", "s2.b1.f.shared_scalar", "head"]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_full_backward_hooks_see_the_gradients(register, residual):
    """On any layer: PyTorch hands its input or output on as a view, over which nothing may be written."""
    net = isonet_cifar(8, residual, width=4).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    want = results(net, net, x)
    net.zero_grad()
    modules = dict(net.named_modules())
    names, seen = [name for name in HOOKED if name in modules], []
    for name in names:
        getattr(modules[name], register)(lambda module, *grads, name=name: seen.append(name))
    assert_same(results(net, net, x), want)
    assert sorted(seen) == sorted(names)


@pytest.fixture
def fresh_dynamo():
    """A backward hook breaks the graph at every block: too many versions of one function to leave behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_was_there_before_compilation_is_compiled_in(fullgraph, fresh_dynamo):
    """A forward hook, a pruning mask and a wrapper in one graph; a full backward hook breaks the graph."""
    net = isonet_cifar(8, True, width=4).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    doubled(net.s1.b1.f.b)
    masked(net.s2.b1.f.b)
    net.s3.b1.f.b = Lora(net.s3.b1.f.b)
    if not fullgraph:
        net.s2.b1.f.register_full_backward_hook(lambda module, grads, outputs: None)
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    want = results(net, net, x)
    net.zero_grad()
    assert_same(results(net, torch.compile(net, backend="aot_eager", fullgraph=fullgraph), x), want)
