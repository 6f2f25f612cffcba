"""deconvert: the same function and state_dict in modules that load, script, fold and quantise without this package."""

from __future__ import annotations

import copy
import inspect
import logging
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.utils.source_matcher_utils import get_source_partitions

import isonet_fast
from isonet_fast import convert, deconvert, models
from isonet_fast.models import isonet_cifar

DOUBLE = torch.float64
# By torch.export without strict=True. PyTorch 2.11 loses them, those of a plain nn.Conv2d too.
TYPES_ARE_KEPT = not torch.__version__.startswith("2.11")


def generic(net: nn.Module) -> nn.Module:
    """Away from its initial values, in float64."""
    with torch.no_grad():
        for p in net.double().parameters():
            p.copy_(0.3 * torch.randn_like(p))
    return net


def gradients(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    y = net(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]


def assert_same(net: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    for mine, theirs in zip(gradients(net, x), gradients(other, x), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * max(1.0, theirs.abs().max().item()))


def classes(net: nn.Module) -> set[str]:
    return {f"{type(m).__module__}.{type(m).__qualname__}" for m in net.modules()}


NETWORKS = {
    "cifar": lambda: isonet_cifar(8, False, width=4),
    "cifar, residual": lambda: isonet_cifar(8, True, width=4, dropout=0.1),
    "isonet18": lambda: models.isonet18(num_classes=5),
    "risonet50": lambda: models.risonet50(num_classes=5),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_is_the_same_function_of_the_same_parameters(kind):
    net = generic(NETWORKS[kind]()).eval()
    reference, parameters, state = copy.deepcopy(net), list(net.parameters()), list(net.state_dict())
    plain = deconvert(net)
    assert not any("isonet_fast" in name for name in classes(plain))
    assert all(a is b for a, b in zip(plain.parameters(), parameters, strict=True))
    assert list(plain.state_dict()) == state
    assert not any(m.training for m in plain.modules())
    assert sum(type(m) is nn.Conv2d for m in plain.modules()) == sum(
        isinstance(m, nn.Conv2d) for m in reference.modules()
    )
    size = 9 if "cifar" in kind else 32
    assert_same(plain, reference, torch.randn(2, 3, size, size + 1, dtype=DOUBLE))
    reference.load_state_dict(plain.state_dict())
    assert deconvert(plain) is plain


def test_loads_where_the_package_is_not_installed(tmp_path):
    net = generic(isonet_cifar(8, True, width=4, dropout=0.1)).eval()
    x = torch.randn(2, 3, 8, 8, dtype=DOUBLE)
    torch.save({"x": x, "y": net(x).detach(), "names": list(net.state_dict())}, tmp_path / "data.pt")
    torch.save(deconvert(net), tmp_path / "net.pt")
    script = """
import sys
sys.modules["isonet_fast"] = None  # an import raises
import torch
net, data = torch.load("net.pt", weights_only=False), torch.load("data.pt")
assert list(net.state_dict()) == data["names"] and not net.training
torch.testing.assert_close(net(data["x"]), data["y"], rtol=0, atol=1e-12)
net.train()(data["x"]).sum().backward()
assert all(p.grad is not None for p in net.parameters())
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "loaded\n", done.stderr


def test_a_deconverted_network_can_be_scripted():
    net = generic(isonet_cifar(8, True, width=4)).eval()
    x = torch.randn(2, 3, 9, 8, dtype=DOUBLE)
    expected = net(x)
    torch.testing.assert_close(torch.jit.script(deconvert(net))(x), expected, rtol=0, atol=1e-11)


class Own(nn.Module):
    """A user's network on our layers: other ranks, a join with a scale, a hook, a layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = isonet_fast.OrthoConv1d(4, 4, 3, padding=1)
        self.again = self.conv
        self.act = isonet_fast.SReLU(4, inplace=True)
        self.scale = isonet_fast.SharedScale(0.5)
        self.join = isonet_fast.ResidualSReLU(4)
        self.fc = isonet_fast.OrthoLinear(4, 3, penalty="matrix")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.again(self.act(self.conv(x)))
        h = self.join(x, h, self.scale.scale) + self.join(x, self.scale(h))
        return self.fc(h.mean(2))


def test_a_network_of_the_user_keeps_its_class_and_hooks():
    net, seen = generic(Own()), []
    net.act.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    reference = copy.deepcopy(net)
    assert deconvert(net) is net
    assert type(net.conv) is nn.Conv1d and net.again is net.conv and type(net.fc) is nn.Linear
    assert not any(name.startswith("isonet_fast") for name in classes(net))
    assert list(net.state_dict()) == list(reference.state_dict())
    assert_same(net, reference, torch.randn(2, 4, 6, dtype=DOUBLE))
    assert "penalty" not in repr(net)
    assert seen


def test_nan_and_half_precision():
    layer = deconvert(isonet_fast.SReLU(2, init=-0.3))
    x = torch.tensor([[float("nan"), -1.0], [2.0, float("nan")]])
    torch.testing.assert_close(layer(x), torch.tensor([[float("nan"), -0.3], [2.0, float("nan")]]), equal_nan=True)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_unbatched_where_the_layer_knows_its_rank():
    x = torch.randn(3, 3, 5)  # as (N, C, L) the values would be others
    layer = isonet_fast.SReLU(3, spatial_dims=2)
    with torch.no_grad():
        layer.srelu_bias.copy_(torch.randn(1, 3, 1, 1))
    expected = layer(x).detach()
    assert torch.equal(deconvert(layer)(x), expected)
    net = generic(isonet_cifar(8, True, width=4))
    x = torch.randn(3, 4, 4, dtype=DOUBLE)
    expected = net.s1(net.stem(x)).detach()
    plain = deconvert(net)
    torch.testing.assert_close(plain.s1(plain.stem(x)), expected, rtol=0, atol=1e-11)


class Mine(isonet_fast.SReLU):
    pass


def test_what_is_left_is_listed_once(caplog):
    patched = isonet_fast.SReLU(2)
    patched.forward = lambda x: x
    model = nn.ModuleDict(
        {
            "subclass": Mine(2),
            "parametrized": nn.utils.parametrizations.weight_norm(isonet_fast.OrthoConv2d(2, 2, 1)),
            "compiled": torch.compile(nn.Sequential(isonet_fast.SReLU(2))),
            "patched": patched,
            "plain": isonet_fast.OrthoConv2d(2, 2, 1),
        }
    )
    kinds = {name: type(m) for name, m in model.items()}
    with caplog.at_level(logging.WARNING, "isonet_fast.deconvert"):
        deconvert(model)
    assert {name: type(m) for name, m in model.items()} == {**kinds, "plain": nn.Conv2d}
    (record,) = caplog.records
    for fragment in (
        "subclass (a subclass, Mine)",
        "parametrized (parametrized)",
        "compiled (compiled)",
        "patched (its",
    ):
        assert fragment in record.getMessage()


LAYERS = [
    kind
    for file in (isonet_fast.nn.conv, isonet_fast.nn.srelu)
    for name, kind in vars(file).items()
    if inspect.isclass(kind) and issubclass(kind, nn.Module) and kind.__module__ == file.__name__ and name[0] != "_"
]


@pytest.mark.parametrize("kind", LAYERS)
def test_no_layer_needs_the_package_afterwards(kind):
    name = kind.__name__
    sizes = (2, 2, 1) if "Conv" in name else (2, 2) if name == "OrthoLinear" else (2,) if "SReLU" in name else ()
    layer = deconvert(kind(*sizes))
    assert not any(kind.startswith("isonet_fast") for kind in classes(layer))
    assert "isonet_fast" not in getattr(layer, "code", "")


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if hasattr(kind, "_in_torch")])
def test_an_activation_is_the_same_function(kind):
    layer = generic(kind(4))
    required = [p for p in inspect.signature(layer.forward).parameters.values() if p.default is p.empty]
    tensors = [torch.randn(2, 4, 3, 5, dtype=DOUBLE, requires_grad=True) for _ in required]
    y = layer(*tensors)
    expected = [y, *torch.autograd.grad(y.square().sum(), [*tensors, layer.srelu_bias])]
    y = deconvert(layer)(*tensors)
    got = [y, *torch.autograd.grad(y.square().sum(), [*tensors, layer.srelu_bias])]
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        deconvert({})


def ordinary() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()
    ).eval()


def found(net: nn.Module) -> dict[str, int]:
    """What the tools that compare types find: folded BatchNorms, fusable modules, convolutions to quantise."""
    x = torch.randn(1, 3, 6, 6)
    graph = torch.export.export(net, (x,), strict=not TYPES_ARE_KEPT).module().graph
    partitions = get_source_partitions(graph, [nn.Conv2d]).get(nn.Conv2d, [])
    left = sum(isinstance(m, nn.BatchNorm2d) for m in fuse(net).modules())
    fused = torch.ao.quantization.fuse_modules(net, [["0", "1", "2"], ["3", "4", "5"]])
    return {
        "to quantise": len(partitions),
        "unfolded": left,
        "fused": sum("ConvReLU" in type(m).__name__ for m in fused),
    }


def test_folding_and_quantisation_find_as_much_as_before_conversion():
    assert found(ordinary()) == {"to quantise": 2, "unfolded": 0, "fused": 2}
    assert found(deconvert(convert(ordinary()))) == found(ordinary())
    assert found(convert(ordinary(), convolutions=False)) == found(ordinary())


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs))
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        down = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.down = nn.Sequential(*down) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.second(self.first(x).relu()) + self.down(x)).relu()


def resnet18() -> nn.Module:
    """ResNet-18 with an eighth of its channels: 20 convolutions, each with a BatchNorm."""
    sizes = [(8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
    stem = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*stem, *(Block(*size) for size in sizes)).eval()


def test_the_batchnorms_of_resnet18_fold_as_before_conversion():
    def left(net: nn.Module) -> int:
        return sum(isinstance(m, nn.BatchNorm2d) for m in fuse(net).modules())

    assert sum(isinstance(m, nn.BatchNorm2d) for m in resnet18().modules()) == 20
    assert [left(resnet18()), left(convert(resnet18())), left(deconvert(convert(resnet18())))] == [0, 20, 0]
    assert left(convert(resnet18(), convolutions=False)) == 0


def vgg() -> nn.Module:
    """Four convolutions, a pooling and a linear layer: five weights to quantise."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 8), (8, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)).eval()


@pytest.mark.filterwarnings("ignore")
def test_pt2e_quantises_as_much_as_before_conversion():
    """After `convert` alone it finds the linear layer, unless the network is exported with strict=True."""
    pytest.importorskip("torchao")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def quantised(net: nn.Module, strict: bool = False) -> int:
        example = (torch.randn(1, 3, 4, 4),)
        graph = torch.export.export(net, example, strict=strict).module()
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = prepare_pt2e(graph, quantizer)
        prepared(*example)
        return sum(weight.dtype == torch.int8 for weight in convert_pt2e(prepared).state_dict().values())

    plain = 5 if TYPES_ARE_KEPT else 0
    assert [quantised(vgg()), quantised(convert(vgg())), quantised(deconvert(convert(vgg())))] == [
        plain,
        plain // 5,
        plain,
    ]
    assert quantised(convert(vgg(), convolutions=False)) == plain
    assert [quantised(net, strict=True) for net in (vgg(), convert(vgg()), deconvert(convert(vgg())))] == [5, 5, 5]
