"""SReLU, ResidualSReLU and SharedScale as layers: state, copies, moves, compilation; folding a scale into a weight."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from isonet_fast import OrthoConv1d, OrthoConv2d, OrthoConv3d, ResidualSReLU, SharedScale, SReLU, reference

DOUBLE = torch.float64
LAYERS = {
    "SReLU": lambda **kw: SReLU(5, **kw),
    "SReLU in place": lambda **kw: SReLU(5, inplace=True, **kw),
    "ResidualSReLU": lambda **kw: ResidualSReLU(5, **kw),
    "SharedScale": lambda **kw: SharedScale(**kw),
}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def exact_convolutions():
    """On a GPU too: no TF32, and the same bits for the same input."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def state(layer):
    return {name: (tuple(t.shape), t.dtype, t.tolist()) for name, t in layer.state_dict().items()}


def biases(layer):
    with torch.no_grad():
        return layer.srelu_bias.copy_(torch.randn_like(layer.srelu_bias))


@pytest.mark.parametrize(
    "cls, expected",
    [
        (SReLU, {"num_channels": inspect.Parameter.empty, "init": -1.0, "inplace": False}),
        (ResidualSReLU, {"num_channels": inspect.Parameter.empty, "init": -1.0, "inplace": False}),
        (SharedScale, {"init": 1.0}),
    ],
)
def test_constructors_have_these_arguments(cls, expected):
    arguments = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
    named = {} if cls is SharedScale else {"spatial_dims": None}
    assert list(arguments.items()) == [*expected.items(), ("device", None), ("dtype", None), *named.items()]


@pytest.mark.parametrize("cls", [SReLU, ResidualSReLU])
def test_state_has_the_name_and_shape_of_the_official_checkpoints(cls):
    assert state(cls(3)) == {"srelu_bias": ((1, 3, 1, 1), torch.float32, [[[[-1.0]], [[-1.0]], [[-1.0]]]])}
    assert cls(3, init=0.25).srelu_bias.flatten().tolist() == [0.25] * 3
    assert cls(3).srelu_bias.requires_grad


def test_scale_has_the_name_and_shape_of_the_official_checkpoints():
    assert state(SharedScale()) == {"scale": ((1, 1, 1, 1), torch.float32, [[[[1.0]]]])}
    assert state(SharedScale(0.0, dtype=DOUBLE)) == {"scale": ((1, 1, 1, 1), DOUBLE, [[[[0.0]]]])}


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(make, copied):
    layer = make(init=0.5)
    other = copied(layer)
    assert type(other) is type(layer) and repr(other) == repr(layer) and state(other) == state(layer)
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert next(layer.parameters()).eq(0.5).all()


@every_layer
def test_a_layer_follows_to_another_dtype_and_device(make):
    layer = make(init=0.5)
    assert next(layer.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    parameter = next(layer.double().parameters())
    assert parameter.dtype == DOUBLE and parameter.eq(0.5).all()
    assert next(make(device="meta").parameters()).is_meta
    layer.to("meta")
    x = torch.empty(2, 5, 3, 3, device="meta", dtype=DOUBLE)
    y = layer(x, x.clone()) if isinstance(layer, ResidualSReLU) else layer(x)
    assert y.is_meta and y.shape == x.shape and y.dtype == DOUBLE


def test_repr_shows_channels_and_inplace():
    assert repr(SReLU(7)) == "SReLU(7)"
    assert repr(SReLU(7, inplace=True)) == "SReLU(7, inplace=True)"
    assert repr(ResidualSReLU(7)) == "ResidualSReLU(7)"
    assert repr(ResidualSReLU(7, inplace=True)) == "ResidualSReLU(7, inplace=True)"
    assert repr(SharedScale()) == "SharedScale()"


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 7), (2, 5, 3, 4), (2, 5, 3, 2, 4)])
def test_srelu_is_the_reference_at_any_rank(shape, device):
    layer = SReLU(5, dtype=DOUBLE).to(device)
    x, bias = torch.randn(shape, dtype=DOUBLE), biases(layer).detach().cpu().requires_grad_()
    ours, theirs = x.to(device, copy=True).requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(ours), reference.srelu(theirs, bias)
    assert torch.equal(y.cpu(), expected)
    grad = torch.randn_like(expected)
    y.backward(grad.to(device))
    expected.backward(grad)
    assert torch.equal(ours.grad.cpu(), theirs.grad)
    torch.testing.assert_close(layer.srelu_bias.grad.cpu(), bias.grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
def test_srelu_in_place_behind_a_convolution(dtype, device):
    """Same output and gradients, written over the convolution's output."""
    conv = nn.Conv2d(3, 5, 3, dtype=dtype, device=device)
    layer = SReLU(5, device=device)  # a float32 master bias
    biases(layer)
    inplace = SReLU(5, inplace=True, device=device)
    inplace.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=dtype, device=device)
    hidden = conv(x)
    y, expected = inplace(hidden), layer(conv(x))
    assert y.data_ptr() == hidden.data_ptr()
    assert torch.equal(y, expected)
    parameters = [*conv.parameters()]
    got = torch.autograd.grad(y.square().sum(), [*parameters, inplace.srelu_bias])
    want = torch.autograd.grad(expected.square().sum(), [*parameters, layer.srelu_bias])
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


def test_srelu_in_place_is_refused_on_a_leaf_before_the_data_changes(device):
    x = torch.full((2, 5, 3, 3), -7.0, device=device, requires_grad=True)
    with pytest.raises(ValueError, match=r"leaf that requires grad.*inplace=False"):
        SReLU(5, inplace=True, device=device)(x)
    assert x.eq(-7).all()


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("s", [0.0, -1.5])
def test_residual_join_is_the_reference(with_scale, s, device):
    join, scale = ResidualSReLU(5, dtype=DOUBLE).to(device), SharedScale(s, dtype=DOUBLE).to(device)
    values = [torch.randn(2, 5, 3, 4, dtype=DOUBLE) for _ in range(2)]
    theirs = [v.clone().requires_grad_() for v in (*values, biases(join).detach().cpu(), scale.scale.detach().cpu())]
    ours = [*(v.to(device, copy=True).requires_grad_() for v in values), join.srelu_bias, scale.scale]
    count = 4 if with_scale else 3
    y = join(*ours[:2], scale.scale) if with_scale else join(*ours[:2])
    expected = reference.residual_srelu(*theirs[:count])
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    got = torch.autograd.grad(y, ours[:count], grad.to(device))
    want = torch.autograd.grad(expected, theirs[:count], grad)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-12, atol=1e-12)


def test_residual_join_in_place_writes_over_the_branch(device):
    join = ResidualSReLU(5, inplace=True, device=device)
    shortcut, leaf = torch.randn(2, 2, 5, 3, 3, device=device).unbind()
    before, branch = shortcut.clone(), leaf.clone()
    y = join(shortcut, branch)
    assert y.data_ptr() == branch.data_ptr()
    assert torch.equal(y, reference.residual_srelu(before, leaf, join.srelu_bias))
    assert torch.equal(shortcut, before)
    with pytest.raises(ValueError, match="inplace=True needs scale=None"):
        join(shortcut, branch, torch.ones(1, device=device))


@pytest.mark.parametrize("shape", [(4, 5), (2, 5, 7), (2, 5, 3, 4), (2, 5, 3, 2, 4)])
def test_shared_scale_multiplies_at_any_rank(shape):
    x = torch.randn(shape)
    y = SharedScale(-1.5)(x)
    assert torch.equal(y, -1.5 * x)


FOLDED = {
    "plain": (OrthoConv2d, {"bias": False}),
    "conv bias": (OrthoConv2d, {}),
    "strided": (OrthoConv2d, {"stride": 2, "padding": 1}),
    "grouped, dilated": (OrthoConv2d, {"groups": 2, "dilation": 2}),
    "circular": (OrthoConv2d, {"padding": 1, "padding_mode": "circular"}),
    "reflect, asymmetric": (OrthoConv2d, {"padding": (1, 2), "padding_mode": "reflect"}),
    "same": (OrthoConv2d, {"padding": "same"}),
    "1-d": (OrthoConv1d, {"padding": 1}),
    "3-d": (OrthoConv3d, {"padding": 1, "padding_mode": "replicate"}),
    "torch.nn": (nn.Conv2d, {"padding": 1}),
}


def folded_case(kind, s, dtype=DOUBLE):
    cls, arguments = FOLDED[kind]
    conv, scale = cls(4, 6, 3, dtype=dtype, **arguments), SharedScale(s, dtype=dtype)
    with torch.no_grad():
        for parameter in conv.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return conv, scale, torch.randn(2, 4, *[7] * len(conv.kernel_size), dtype=dtype)


@pytest.mark.parametrize("s", [0.0, 1.0, -0.7])
@pytest.mark.parametrize("kind", FOLDED)
def test_folding_is_scaling_the_output(kind, s, device):
    conv, scale, x = folded_case(kind, s)
    conv, scale, x = conv.to(device), scale.to(device), x.to(device).requires_grad_()
    y, expected = scale.fold(conv, x), s * conv(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert y.shape == expected.shape
    grad = torch.randn_like(expected)
    inputs = [x, *conv.parameters(), scale.scale]
    want = torch.autograd.grad(scale(conv(x)), inputs, grad)
    for got, w in zip(torch.autograd.grad(y, inputs, grad), want, strict=True):
        torch.testing.assert_close(got, w, rtol=1e-12, atol=1e-12 * max(1.0, w.abs().max().item()))
    assert want[-1].abs().item() > 1e-3  # also at s = 0 the scale learns


@pytest.mark.parametrize("s", [0.0, 0.25, 0.3])
@pytest.mark.parametrize("kind", ["plain", "conv bias"])
def test_folding_under_autocast_rounds_once(kind, s):
    """The weight is scaled in float32 and rounded once: no worse than rounding the output a second time."""
    conv, scale, x = folded_case(kind, s, torch.float32)
    exact = s * F.conv2d(x.double(), conv.weight.double(), None if conv.bias is None else conv.bias.double())
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = scale.fold(conv, x), conv(x) * scale.scale.bfloat16()
        y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    assert (y.double() - exact).abs().max() <= allowed
    assert conv.weight.grad.dtype == torch.float32 and scale.scale.grad.dtype == torch.float32
    assert scale.scale.grad.item() == pytest.approx((exact / s).sum().item(), rel=0.1) if s else scale.scale.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folding_forms_the_weight_in_float32(dtype):
    """In half precision the product s W is rounded once, from float32: a float32 scale is not rounded before it."""
    conv, scale = OrthoConv2d(4, 4, 1, bias=False, dtype=dtype), SharedScale(0.3001)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape))
    basis = torch.eye(4, dtype=dtype).view(4, 4, 1, 1)
    expected = (scale.scale.detach() * conv.weight.detach().float()).to(dtype)[:, :, 0, 0].T
    assert torch.equal(scale.fold(conv, basis)[:, :, 0, 0], expected)
    assert not torch.equal(expected, (conv.weight * scale.scale.to(dtype))[:, :, 0, 0].T)  # the case can tell


def test_folding_reads_a_parametrized_weight_once():
    """Every read of a spectral norm in training advances its power iteration."""
    conv, scale, x = folded_case("conv bias", 0.5)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 6, 3, dtype=DOUBLE))
    twin = copy.deepcopy(conv)
    y, expected = scale.fold(conv, x), 0.5 * twin(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(conv.parametrizations.weight[0]._u, twin.parametrizations.weight[0]._u)


def test_functional_call_reads_the_given_parameters():
    x = torch.randn(2, 5, 3, 3)
    bias = torch.randn(1, 5, 1, 1, requires_grad=True)
    y = torch.func.functional_call(SReLU(5), {"srelu_bias": bias}, (x,))
    assert torch.equal(y, reference.srelu(x, bias))
    assert torch.autograd.grad(y.sum(), bias)[0].flatten().tolist() == (x <= bias).sum((0, 2, 3)).tolist()
    y = torch.func.functional_call(ResidualSReLU(5), {"srelu_bias": bias}, (x, 2 * x))
    assert torch.equal(y, reference.residual_srelu(x, 2 * x, bias))
    assert torch.equal(torch.func.functional_call(SharedScale(), {"scale": torch.full((1, 1, 1, 1), 3.0)}, (x,)), 3 * x)


@pytest.mark.parametrize("inplace", [False, True])
def test_compiles_as_one_graph(inplace):
    """A residual block: folded scale, join, SReLU; forward and backward."""
    first, second = (OrthoConv2d(4, 4, 3, padding=1, dtype=DOUBLE) for _ in range(2))
    relu, join = SReLU(4, inplace=inplace, dtype=DOUBLE), ResidualSReLU(4, inplace=inplace, dtype=DOUBLE)
    scale = SharedScale(0.5, dtype=DOUBLE)
    biases(relu), biases(join)

    def block(x):
        return join(x, scale.fold(second, relu(first(x))))

    x = torch.randn(2, 4, 5, 5, dtype=DOUBLE, requires_grad=True)
    inputs = [x, *(p for layer in (first, second, relu, join, scale) for p in layer.parameters())]
    expected = block(x)
    y = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(expected)
    for got, want in zip(*(torch.autograd.grad(v, inputs, grad) for v in (y, expected)), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [SReLU(5), SReLU(5, inplace=True)])
def test_a_wrong_number_of_channels_names_both(layer):
    with pytest.raises(ValueError, match=r"bias .*4 channels of x.*\(1, 5, 1, 1\)|bias .*4 channels of x.*\(5,\)"):
        layer(torch.zeros(2, 4, 3, 3))
