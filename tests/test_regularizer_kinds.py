"""Layers that OrthoRegularizer covers when asked (`include`), and weights of every kind: a row, never a traceback."""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from isonet_fast import OrthoConv2d, OrthoLinear, OrthoRegularizer, reference
from isonet_fast.layers import official_filter

DOUBLE = torch.float64


def filled(net):
    with torch.no_grad():
        for n, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n), dtype=DOUBLE) * 0.3)
    return net.double()


def assert_penalty(reg, expected, weights):
    """`expected` by the reference, of `weights`: the value and the gradients of both forms."""
    want = torch.autograd.grad(expected, weights)
    for weight in weights:
        weight.grad = None
    reg().backward()
    for weight, grad in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.grad, grad, rtol=1e-10, atol=1e-12)
    assert reg.accumulate_grad_().item() == pytest.approx(expected.item(), rel=1e-12)
    for weight, grad in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.grad, 2 * grad, rtol=1e-10, atol=1e-12)


def reasons(reg):
    return {row.name: row.excluded for row in reg.summary()}


@pytest.mark.parametrize("include", [nn.Linear, (nn.Linear,), (nn.ConvTranspose2d, nn.Linear)], ids=str)
def test_linear_layers_when_asked(include):
    net = filled(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(6, 4), OrthoLinear(4, 8)))
    weights = [module.weight for module in net]
    expected = sum(reference.orthogonality_loss(weight) for weight in weights)
    reg = OrthoRegularizer(net, 1.0, include=include)
    assert_penalty(reg, expected, weights)
    assert reasons(reg) == {"0": "", "1": "", "2": ""}


@pytest.mark.parametrize("penalty", ["isonet", "lorth", "matrix"])
@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.ConvTranspose2d(8, 8, 3, groups=2, dilation=(1, 2)),
        nn.ConvTranspose1d(6, 2, 4, stride=2),
        nn.ConvTranspose3d(2, 4, 2),
    ],
    ids=lambda layer: f"{tuple(layer.weight.shape)}",
)
def test_transposed_convolutions_when_asked_as_the_adjoint(layer, penalty):
    """The penalty of the convolution whose weight it shares."""
    layer = filled(layer)
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
    expected = reference.orthogonality_loss(layer.weight, **geometry, penalty=penalty)
    reg = OrthoRegularizer(layer, 1.0, penalty, include=type(layer))
    assert_penalty(reg, expected, [layer.weight])


def test_a_transposed_convolution_without_penalty_is_an_isometry():
    """What the adjoint means: at lorth = 0 the operator itself keeps norms (here exactly, stride = kernel)."""
    layer = nn.ConvTranspose2d(8, 2, 2, stride=2, bias=False).double()
    layer.weight.data = torch.linalg.qr(torch.randn(8, 8, dtype=DOUBLE))[0].view(8, 2, 2, 2)
    reg = OrthoRegularizer(layer, 1.0, "lorth", include=nn.ConvTranspose2d)
    assert reg().item() == pytest.approx(0, abs=1e-20)
    x = torch.randn(3, 8, 5, 5, dtype=DOUBLE)
    torch.testing.assert_close(layer(x).norm(), x.norm(), rtol=1e-12, atol=0)
    assert reg.summary()[0].isometry == "both"


def test_the_official_filter_is_asked_about_included_layers_too():
    """Three inputs of the convolution whose weight it shares: an image is what the layer makes."""
    net = nn.ModuleDict(
        {
            "image": nn.ConvTranspose2d(8, 3, 4),
            "seven": nn.ConvTranspose2d(4, 4, 7),
            "up": nn.ConvTranspose2d(3, 4, 3),
            "linear": nn.Linear(3, 3),
        }
    )
    reg = OrthoRegularizer(net, include=(nn.ConvTranspose2d, nn.Linear))
    assert reasons(reg) == {"image": "filter", "seven": "filter", "up": "", "linear": ""}


class Standardised(nn.Conv2d):
    """Weight standardisation: what is convolved is not what is stored."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Inner(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Harmless(nn.Conv2d):
    """Its constructor is its own, its forward is PyTorch's."""

    def __init__(self, width):
        super().__init__(width, width, 3)


@pytest.mark.parametrize("kind", [Standardised, Inner])
def test_a_layer_that_computes_its_own_weight_is_left_out_with_a_warning(kind):
    net = filled(nn.Sequential(kind(4, 4, 3), Harmless(4), kind(4, 4, 3)))
    why = f"{kind.__name__} has a forward of its own and is not in include"
    with pytest.warns(UserWarning, match=f"leaves out '0', '2': {why}") as caught:
        reg = OrthoRegularizer(net, 1.0)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough; a filter that leaves them out, or include, needs none
        assert reasons(reg) == {"0": why, "1": "", "2": why}
        assert_penalty(reg, reference.orthogonality_loss(net[1].weight), [net[1].weight])
        chosen = OrthoRegularizer(net, filter=lambda name, module: type(module) is not kind)
        assert reasons(chosen) == {"0": "filter", "1": "", "2": "filter"}
        assert reasons(OrthoRegularizer(net, include=kind)) == {"0": "", "1": "", "2": ""}


def with_weight(weight):
    layer = nn.Conv2d(4, 4, 3)
    layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point() or weight.is_complex())
    return layer


class Wrapped(torch.Tensor):
    """A tensor subclass as quantisation libraries make them: without a memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), keywords=None):
        if function is torch.ops.aten.detach.default:
            return arguments[0]
        raise AssertionError(f"{function} was called on a weight that is left out")


FOREIGN = {
    "complex64 weight": lambda w: w.to(torch.complex64),
    "int8 weight": lambda w: w.mul(100).to(torch.int8),
    "float8_e4m3fn weight": lambda w: w.to(torch.float8_e4m3fn),
    "quint8 weight": lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.quint8),
    "sparse_coo weight": lambda w: w.to_sparse(),
    "mkldnn weight": lambda w: w.to_mkldnn(),
    "Wrapped weight": Wrapped,
}


@pytest.mark.filterwarnings("ignore:.*quantiz")
@pytest.mark.parametrize("why", FOREIGN)
def test_a_weight_of_a_foreign_kind_is_left_out_with_a_warning(why):
    if why.startswith("mkldnn") and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch is built without MKLDNN")
    torch.manual_seed(0)
    net = nn.Sequential(with_weight(FOREIGN[why](torch.randn(4, 4, 3, 3))), nn.Conv2d(4, 4, 3))
    with pytest.warns(UserWarning, match=f"leaves out '0': {why}"):
        reg = OrthoRegularizer(net, 1.0)
    expected = reference.orthogonality_loss(net[1].weight)
    reg().backward()
    assert reg.accumulate_grad_().item() == pytest.approx(expected.item(), rel=1e-5)
    assert net[0].weight.grad is None and reasons(reg) == {"0": why, "1": ""}


def test_a_negated_view_of_a_complex_tensor_is_a_weight_like_any_other():
    weight = torch.randn(4, 4, 3, 3, dtype=torch.complex128).conj().imag
    assert weight.is_neg()
    layer = with_weight(weight)
    plain = weight.resolve_neg().clone().requires_grad_()
    expected = reference.orthogonality_loss(plain)
    expected.backward()
    reg = OrthoRegularizer(layer, 1.0)
    assert reg.accumulate_grad_().item() == pytest.approx(expected.item(), rel=1e-12)
    reg().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * plain.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.*torch.ao")
def test_quantised_modules_have_a_row():
    net = nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3), torch.ao.nn.quantized.ReLU6(), nn.Conv2d(4, 4, 3))
    assert reasons(OrthoRegularizer(net)) == {"0": "quantised", "2": ""}


def abstract():
    return nn.Sequential(nn.Conv2d(4, 8, 3, stride=2), OrthoConv2d(8, 8, 5), nn.Linear(8, 2))


def on_the_meta_device():
    with torch.device("meta"):
        return abstract()


def under_fake_tensors():
    with FakeTensorMode():
        return abstract()


@pytest.mark.parametrize("make", [on_the_meta_device, under_fake_tensors])
def test_weights_without_values_have_a_cost_and_no_value(make):
    reg = OrthoRegularizer(make())
    concrete = OrthoRegularizer(abstract()).summary()
    rows = reg.summary()
    assert [row._replace(value=0) for row in rows] == [row._replace(value=0) for row in concrete]
    assert [math.isnan(row.value) for row in rows] == [True, True, False] and "nan" in str(rows)
    value = reg()
    assert value.shape == () and (value.is_meta or value.fake_mode is not None)
    value.backward()


def test_a_gradient_cannot_be_added_on_the_meta_device():
    net = on_the_meta_device()
    with pytest.raises(ValueError, match=r"accumulate_grad_\(\) needs weights with values, got .* meta device"):
        OrthoRegularizer(net).accumulate_grad_()
    assert all(p.grad is None for p in net.parameters())


def test_tied_weights_count_once_whatever_the_layers_that_share_them():
    """The first layer that is penalised decides; one that is left out does not."""
    net = filled(nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "linear": nn.Linear(4, 4), "a": nn.Conv2d(4, 4, 3)}))
    net["b"] = nn.Conv2d(4, 4, 3, stride=2)
    net["b"].weight = net["a"].weight
    net["up"] = nn.ConvTranspose2d(4, 4, 3)
    net["up"].weight = net["a"].weight
    net["ortho"] = OrthoLinear(4, 4)
    net["ortho"].weight = net["linear"].weight
    reg = OrthoRegularizer(net, 1.0, include=nn.ConvTranspose2d)
    assert reasons(reg) == {
        "stem": "filter",
        "linear": "linear, not in include",
        "a": "",
        "b": "shares its weight",
        "up": "shares its weight",
        "ortho": "",
    }
    a, linear = net["a"].weight, net["linear"].weight
    assert_penalty(reg, reference.orthogonality_loss(a) + reference.orthogonality_loss(linear), [a, linear])


def test_a_filter_keeps_the_penalty_to_the_backbone_of_a_detector():
    """The filter of the docstring: pyramid and heads are left out, and the stem as the official rule says."""

    net = nn.ModuleDict(
        {
            "backbone": nn.ModuleDict(
                {
                    "body": nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 8, 3)),
                    "fpn": nn.Sequential(nn.Conv2d(8, 8, 1)),
                }
            ),
            "rpn": nn.Conv2d(8, 8, 3),
        }
    )
    reg = OrthoRegularizer(
        net, filter=lambda name, module: name.startswith("backbone.body.") and official_filter(name, module)
    )
    assert [row.name for row in reg.summary() if not row.excluded] == ["backbone.body.1"]
    default = OrthoRegularizer(net).summary()
    assert [row.name for row in default if not row.excluded] == ["backbone.body.1", "backbone.fpn.0", "rpn"]


def test_the_filters_of_the_docs_cannot_fail_on_a_linear_layer():
    """Each is run as it is written there, on convolutions with an OrthoLinear among them."""
    text = (Path(__file__).parents[1] / "docs" / "own-network.md").read_text(encoding="utf-8")
    filters = re.findall(r"^ +filter=(lambda name, module: .*),$", text, re.MULTILINE)
    net = nn.ModuleDict({"blocks": nn.Sequential(nn.Conv2d(4, 4, 3), OrthoLinear(4, 4))})
    assert len(filters) >= 2
    for written in filters:
        chosen = eval(written, {"nn": nn, "official_filter": official_filter})
        OrthoRegularizer(net, filter=lambda name, module, chosen=chosen: bool(chosen(name, module)) or True)()
