"""convert: same outputs, gradients, state_dict, Parameters, hooks; what it must not touch is left and listed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import isonet_fast
from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, convert
from isonet_fast.import_torchvision import import_torchvision


def SReLU(channels: int) -> nn.Module:
    """A layer of the official shape: class name, parameter and child."""

    def __init__(self: nn.Module) -> None:
        nn.Module.__init__(self)
        self.srelu_bias = nn.Parameter(torch.linspace(-1, 0.5, channels).view(1, channels, 1, 1))
        self.srelu_relu = nn.ReLU(inplace=True)

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self.srelu_relu(x - self.srelu_bias) + self.srelu_bias

    return type("SReLU", (nn.Module,), {"__init__": __init__, "forward": forward})()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        SReLU(8),
        nn.Conv2d(8, 8, 3, groups=2, stride=2, bias=False),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 4, 1), SReLU(4)),
    ).double()


def test_same_outputs_gradients_and_state() -> None:
    model = network().eval()
    reference = copy.deepcopy(model)
    parameters, state = list(model.parameters()), list(model.state_dict())
    converted = convert(model)
    assert converted is model
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert state == list(model.state_dict())
    assert not any(m.training for m in model.modules())
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    grads = []
    for net in (model, reference):
        out = net(x)
        out.square().sum().backward()
        grads.append([out.detach(), *(p.grad for p in net.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert type(model[0]) is OrthoConv2d and type(model[1]) is isonet_fast.SReLU
    assert type(model[3]) is nn.ReLU
    assert type(model[4][0]) is OrthoConv2d
    assert "penalty='isonet'" in repr(model[0]) and "reflect" in repr(model[0])


def test_convolutions_may_stay_those_of_torch() -> None:
    model = convert(network(), convolutions=False)
    assert type(model[0]) is nn.Conv2d and type(model[1]) is isonet_fast.SReLU
    penalised = isonet_fast.OrthoRegularizer(model, filter=lambda name, module: True)
    assert penalised().item() == isonet_fast.OrthoRegularizer(convert(model), filter=lambda name, module: True)().item()


def test_optimizer_built_before_goes_on() -> None:
    model, other = network(), network()
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (model, other)]
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    for n in range(3):
        if n == 1:
            convert(model)
        for net, optimizer in zip((model, other), optimizers):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_hooks_still_fire_and_their_handles_still_remove_them() -> None:
    model, calls = network(), []
    forward = model[0].register_forward_hook(lambda module, i, o: calls.append(("forward", type(module))))
    model[1].register_full_backward_hook(lambda module, i, o: calls.append(("backward", type(module))))
    model[2].register_forward_pre_hook(lambda module, i: calls.append(("pre", type(module))))
    convert(model)
    x = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    model(x).sum().backward()
    assert calls == [("forward", OrthoConv2d), ("pre", OrthoConv2d), ("backward", isonet_fast.SReLU)]
    forward.remove()
    model(x)
    assert calls[3:] == [("pre", OrthoConv2d)]


def test_a_shared_layer_is_replaced_once() -> None:
    shared = nn.Conv2d(4, 4, 1)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    convert(model)
    assert model["a"] is model["b"][0] and type(model["a"]) is OrthoConv2d


def test_other_dimensions_and_a_bare_layer() -> None:
    assert type(convert(nn.Conv1d(2, 2, 3))) is OrthoConv1d
    assert type(convert(nn.Conv3d(2, 2, 3))) is OrthoConv3d
    transposed = nn.ConvTranspose2d(2, 2, 3)
    assert convert(transposed) is transposed


def test_converting_twice_changes_nothing() -> None:
    model = convert(network())
    before = list(model.modules())
    assert [id(m) for m in convert(model).modules()] == [id(m) for m in before]


class Standardised(nn.Conv2d):
    pass


def test_what_is_left_is_listed_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict(
        {
            "subclass": Standardised(2, 2, 1),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)),
            "compiled": torch.compile(nn.Sequential(nn.Conv2d(2, 2, 1))),
            "plain": nn.Conv2d(2, 2, 1),
        }
    )
    model["patched"] = nn.Conv2d(2, 2, 1)
    model["patched"].forward = lambda x: x  # type: ignore[method-assign]
    types = {name: type(m) for name, m in model.items()}
    with caplog.at_level(logging.WARNING, "isonet_fast.convert"):
        convert(model)
    assert {name: type(m) for name, m in model.items()} == {**types, "plain": OrthoConv2d}
    assert len(caplog.records) == 1
    text = caplog.text
    for fragment in (
        "subclass (a subclass, Standardised)",
        "parametrized (parametrized)",
        "compiled (compiled)",
        "patched",
    ):
        assert fragment in text
    assert "plain" not in text


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="got list"):
        convert([nn.Conv2d(1, 1, 1)])  # type: ignore[arg-type]


def test_a_converted_torchvision_resnet_computes_the_same() -> None:
    resnet18 = import_torchvision().models.resnet18
    torch.manual_seed(0)
    model = resnet18().eval()
    reference, state = copy.deepcopy(model), list(model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(convert(model)(x), reference(x))
    assert list(model.state_dict()) == state


def weights(change: Callable[[torch.Tensor], torch.Tensor]) -> nn.Conv2d:
    conv = nn.Conv2d(2, 2, 1)
    conv.weight = nn.Parameter(change(conv.weight.detach()), requires_grad=False)
    return conv


def after_first_call() -> nn.Module:
    lazy = nn.LazyConv2d(4, 1)
    lazy(torch.randn(1, 3, 2, 2))
    return lazy


def fake() -> nn.Module:
    with FakeTensorMode():
        return nn.Conv2d(2, 2, 1)


def fused() -> nn.Module:
    return torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(2, 2, 1), nn.ReLU())


def without_weight() -> nn.Module:
    conv = nn.Conv2d(2, 2, 1)
    conv.weight = None
    return conv


def lazy_srelu() -> nn.Module:
    layer = SReLU(3)
    layer.srelu_bias = nn.UninitializedParameter()
    return layer


ODD = {  # a layer, and why it is left; None: converted
    "meta": (lambda: nn.Conv2d(2, 2, 1, device="meta"), None),
    "fake": (fake, None),
    "half": (lambda: nn.Conv2d(2, 2, 1, dtype=torch.float16), None),
    "lazy, called": (after_first_call, None),
    "lazy": (lambda: nn.LazyConv2d(4, 1), "lazy: convert after its first call"),
    "complex": (lambda: nn.Conv2d(2, 2, 1, dtype=torch.complex64), "weight is complex64"),
    "sparse": (lambda: weights(torch.Tensor.to_sparse), "weight is sparse_coo"),
    "MKLDNN": (lambda: weights(torch.Tensor.to_mkldnn), "weight is _mkldnn"),
    "int8": (lambda: weights(lambda w: w.to(torch.int8)), "weight is int8"),
    "quantised": (lambda: weights(lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), "weight is qint8"),
    "none": (without_weight, "weight is None"),
    "fused": (fused, "for quantisation"),
    "quantised module": (lambda: torch.ao.nn.quantized.Conv2d(2, 2, 1), "for quantisation"),
    "lazy SReLU": (lazy_srelu, "srelu_bias has no shape before the first call"),
    "complex SReLU": (lambda: SReLU(3).to(torch.complex64), "srelu_bias is complex64"),
}


@pytest.mark.parametrize("kind", ODD)
def test_weights_of_every_kind_are_converted_or_left_with_the_reason(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    make, why = ODD[kind]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), make())
    layer, parameters = model[1], [id(p) for p in model.parameters()]
    with caplog.at_level(logging.WARNING, "isonet_fast.convert"):
        convert(model)
    assert type(model[0]) is OrthoConv2d and [id(p) for p in model.parameters()] == parameters
    if why is None:
        assert type(model[1]) is OrthoConv2d and not caplog.records
    else:
        assert model[1] is layer and f"1 ({why})" in caplog.text


def test_tied_weights_stay_tied() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    model[1].weight = model[0].weight
    convert(model)
    assert model[0] is not model[1] and model[0].weight is model[1].weight
    assert isonet_fast.OrthoRegularizer(model).summary()[1].excluded == "shares its weight"
