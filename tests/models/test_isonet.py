"""The published networks: names, initialisation, memory formats, autocast, compile, the mathematics of a block."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import isonet_fast
from isonet_fast import models, reference
from isonet_fast.models.blocks import BottleneckBranch, stage
from isonet_fast.models.ingredients import Ingredients
from isonet_fast.models.official import official


@pytest.fixture(scope="module", params=["isonet18", "risonet50"])
def small(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return generic(getattr(models, request.param)(num_classes=10))


@torch.no_grad()
def generic(model: nn.Module) -> nn.Module:
    """Away from the identity and from s = 0, where much is zero."""
    for name, p in model.named_parameters():
        if name.endswith("scale"):
            p.fill_(0.2)
        elif name.endswith("srelu_bias"):
            p.uniform_(-0.8, 0.1)
        elif p.dim() == 4 and name != "stem.conv.weight":
            p.add_(0.1 * torch.randn_like(p) / p[0].numel() ** 0.5)
    return model


def test_constructor_arguments_are_used_or_refused() -> None:
    model = models.isonet18(num_classes=7, in_channels=1, dropout=0.25)
    assert model(torch.randn(2, 1, 32, 32)).shape == (2, 7)
    assert model.head.dropout.p == 0.25
    assert models.isonet18().head.dropout.p == 0.1 and models.risonet18().head.dropout.p == 0.4
    assert not isinstance(models.isonet18(dropout=0.0).head.dropout, nn.Dropout)
    with pytest.raises(TypeError):
        models.isonet18(10)  # type: ignore[misc]
    with pytest.raises(ValueError, match="num_classes must be a positive int, got 0"):
        models.isonet18(num_classes=0)
    with pytest.raises(ValueError, match="dropout must be None"):
        models.isonet18(dropout=1.0)


def test_networks_start_as_deltas_with_closed_branches() -> None:
    """A delta everywhere but in the stem; biases -1; the residual branches closed."""
    model = models.risonet18()
    stem = model.stem.conv.weight
    bound = 1 / stem[0].numel() ** 0.5  # kaiming_uniform with a = sqrt(5)
    assert stem.abs().max() <= bound and stem.std() > 0.5 * bound
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and name != "stem.conv":
            assert torch.equal(module.weight, nn.init.dirac_(torch.empty_like(module.weight))), name
            assert module.bias is None
    for name, p in model.named_parameters():
        if name.endswith("srelu_bias"):
            assert (p == -1).all() and p.shape == (1, p.numel(), 1, 1)
        if name.endswith("scale"):
            assert p.shape == (1, 1, 1, 1) and p.item() == 0


def test_every_convolution_but_the_stem_is_penalised() -> None:
    for name in ("isonet18", "risonet50"):
        model = getattr(models, name)()
        reg = isonet_fast.OrthoRegularizer(model)
        convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
        assert [row.name for row in reg.summary() if row.excluded] == ["stem.conv", "head.fc"]
        assert [row.name for row in reg.summary() if not row.excluded] == convolutions[1:]


def unfused(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same network written as in the paper, on the reference functions: SReLU before pooling, scale after the
    convolution, nothing in place."""

    def srelu(x: torch.Tensor, layer: nn.Module) -> torch.Tensor:
        return reference.srelu(x, layer.srelu_bias)

    x = F.max_pool2d(srelu(model.stem.conv(x), model.stem.relu), 3, 2, 1)
    for n in range(1, 5):
        for block in getattr(model, f"s{n}"):
            h = srelu(block.f.a(x), block.f.a_relu)
            h = block.f.b(h)
            if hasattr(block.f, "c"):
                h = block.f.c(srelu(h, block.f.b_relu))
            if hasattr(block.f, "shared_scalar"):
                h = h * block.f.shared_scalar.scale + (x if block.proj is None else block.proj(x))
            x = srelu(h, block.relu)
    return model.head.fc(x.mean((2, 3)))


def test_fused_equals_unfused(small: nn.Module, device: torch.device) -> None:
    model = copy.deepcopy(small).to(device).double().eval()
    x = torch.randn(2, 3, 32, 40, dtype=torch.float64, device=device, requires_grad=True)
    results = []
    for forward in (model, lambda x: unfused(model, x)):
        model.zero_grad()
        x.grad = None
        out = forward(x)
        F.cross_entropy(out, torch.tensor([1, 2], device=device)).backward()
        results.append([out.detach(), x.grad, *(p.grad for p in model.parameters())])
    for mine, theirs in zip(*results, strict=True):
        assert (mine - theirs).abs().max() <= 1e-11 * theirs.abs().max()


def test_gradients_at_zero_scale() -> None:
    """At the start s = 0: the branch gets no gradient, its scale does."""
    model = models.risonet18(num_classes=10).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    grads = []
    for forward in (model.eval(), lambda x: unfused(model, x)):
        model.zero_grad()
        F.cross_entropy(forward(x), torch.tensor([1, 2])).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name in grads[0]:
        mine, theirs = grads[0][name], grads[1][name]
        assert (mine - theirs).abs().max() <= 1e-11 * theirs.abs().max() + 1e-300, name
    assert grads[0]["s1.b1.f.b.weight"].abs().max() == 0 < grads[0]["s1.b1.f.shared_scalar.scale"].abs().item()


def test_channels_last_is_kept_throughout_and_exact(
    small: nn.Module, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exact as plain PyTorch in this format; no layer falls back to NCHW on the way.

    Not compared with NCHW: there cuDNN may take Winograd's form, whose float32 rounding is another.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    small = copy.deepcopy(small).to(device).eval()
    x = torch.randn(2, 3, 32, 40, device=device)
    plain = official(small).to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    expected = official(small).double()(x.double())
    formats = []
    for m in small.modules():
        if isinstance(m, (isonet_fast.SReLU, isonet_fast.ResidualSReLU)):
            m.register_forward_hook(lambda m, i, o: formats.append(o.is_contiguous(memory_format=torch.channels_last)))
    small.to(memory_format=torch.channels_last)
    got = small(x.to(memory_format=torch.channels_last))
    assert len(formats) > 5 and all(formats)
    error, allowed = ((y.double() - expected).abs().max().item() for y in (got, plain))
    assert error <= 2 * allowed + 1e-6 * expected.abs().max().item()


def test_autocast_gives_bfloat16_activations_and_float32_gradients(small: nn.Module, device: torch.device) -> None:
    """bf16 activations throughout, float32 gradients, logits within bf16's reach of float32."""
    small = copy.deepcopy(small).to(device).eval()
    x = torch.randn(2, 3, 32, 40, device=device)
    expected = small(x).detach()
    dtypes = set()
    for m in small.modules():
        if isinstance(m, (isonet_fast.SReLU, isonet_fast.ResidualSReLU)):
            m.register_forward_hook(lambda m, i, o: dtypes.add(o.dtype))
    with torch.autocast(device.type, torch.bfloat16):
        got = small(x)
    assert dtypes == {torch.bfloat16}
    F.cross_entropy(got.float(), torch.tensor([1, 2], device=device)).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in small.parameters())
    assert (got - expected).abs().max() <= 0.06 * expected.abs().max()


def test_folded_weight_is_formed_in_float32() -> None:
    """s W rounded once from float32, not from a bf16 W: under autocast the two differ in about half of the elements."""
    block = models.risonet18().s1.b1
    with torch.no_grad():
        block.f.b.weight.normal_()
        block.f.shared_scalar.scale.fill_(0.3)
    h = torch.randn(1, 64, 8, 8).bfloat16()
    seen = []
    real = block.f.b._conv_forward
    block.f.b._conv_forward = lambda x, w, b: seen.append(w) or real(x, w, b)
    with torch.autocast("cpu", torch.bfloat16):
        block.f.shared_scalar.fold(block.f.b, h)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], block.f.b.weight * block.f.shared_scalar.scale)


@pytest.mark.parametrize("residual", [False, True])
def test_compiles_without_graph_breaks(residual: bool) -> None:
    """One bottleneck stage with a stride: every kind of block that the networks are made of."""
    torch.manual_seed(0)
    model = generic(stage(BottleneckBranch, 16, 32, 2, 2, Ingredients(residual)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 9, 9)
    grads = []
    for forward in (model, compiled):
        model.zero_grad()
        out = forward(x)
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_one_activation_per_convolution_is_kept(residual: bool, device: torch.device) -> None:
    """The backward needs the input and each SReLU's output, in the convolution's own storage: no branch, no sum."""
    model = stage(BottleneckBranch, 16, 16, 1, 2, Ingredients(residual)).to(device)
    x = torch.randn(3, 16, 8, 8, device=device, requires_grad=True)
    kept: dict[int, tuple[int, ...]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.shape[:1] == (3,):
            kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    out.sum().backward()
    assert sorted(kept.values()) == sorted([(3, 16, 8, 8)] * 3 + [(3, 4, 8, 8)] * 4)


def test_whole_network_traces_into_one_graph() -> None:
    model = models.risonet18(num_classes=10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
