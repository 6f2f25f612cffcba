"""isonet_cifar: equal to the official arithmetic, compiled, in every memory format and under autocast."""

import pytest
import torch
from torch import nn

from isonet_fast import OrthoRegularizer, reference
from isonet_fast.models import isonet_cifar
from isonet_fast.models.official import bare, official, official_penalty

DOUBLE = torch.float64
both_kinds = pytest.mark.parametrize("residual", [False, True])


@pytest.fixture(autouse=True)
def exact_convolutions():
    """On a GPU too: no TF32, and the same bits for the same input."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def network(residual, depth=14, dtype=DOUBLE, **kwargs):
    """Away from its initial values: biases so high that SReLU bends, scales away from 0, no convolution a delta."""
    net = isonet_cifar(depth, residual, width=4, **kwargs)
    with torch.no_grad():
        for n, (name, p) in enumerate(net.named_parameters()):
            noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(n))
            if name.endswith("srelu_bias"):
                p.copy_(0.5 * noise - 0.2)
            elif name.endswith("scale"):
                p.copy_(noise)
            elif p.dim() == 4:
                p.add_(0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    return net.to(dtype)


def images(dtype=DOUBLE, channels=3, size=9):
    return torch.randn(2, channels, size, size + 1, dtype=dtype)


def gradients(net, x):
    x = x.detach().clone().requires_grad_()
    logits = net(x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device).view_as(logits)
    inputs = [x, *net.parameters()]
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), inputs)


def assert_close(got, want, tolerance):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=tolerance * max(1.0, w.abs().max().item()))


@both_kinds
@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32])
def test_equals_the_official_arithmetic(residual, dtype, device):
    """relu(x - b) + b, the scale as a pass of its own, sum then SReLU: same logits, same gradients."""
    net, x = network(residual, dtype=dtype).to(device), images(dtype).to(device)
    theirs = official(net)
    assert not any("isonet_fast.nn.srelu" in type(m).__module__ for m in theirs.modules())
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in net.named_parameters()]
    logits, grads = gradients(net, x)
    expected, expected_grads = gradients(theirs, x)
    tolerance = 1e-11 if dtype == DOUBLE else 1e-4
    assert_close([logits, *grads], [expected, *expected_grads], tolerance)
    assert all(g.abs().max() > 0 for g in expected_grads)  # every parameter takes part


def test_equals_the_official_arithmetic_at_the_initial_scale_zero():
    net, x = network(True), images()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("scale"):
                p.zero_()
    logits, grads = gradients(net, x)
    expected, expected_grads = gradients(official(net), x)
    assert_close([logits, *grads], [expected, *expected_grads], 1e-11)
    by_name = dict(zip([n for n, _ in net.named_parameters()], grads[1:], strict=True))
    assert all(g.abs() > 1e-6 for name, g in by_name.items() if name.endswith("scale"))
    assert not by_name["s1.b1.f.a.weight"].any()


@both_kinds
def test_the_penalty_is_the_official_one(residual):
    """The official code is defined for all layers here, also for the strided 1x1 and 3x3 ones."""
    net = network(residual)
    theirs = official_penalty(net)
    theirs.backward()
    expected = [p.grad for p in net.parameters()]
    net.zero_grad()
    ours = OrthoRegularizer(net, 1.0)()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for p, want in zip(net.parameters(), expected, strict=True):
        assert (p.grad is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(p.grad, want, rtol=1e-10, atol=1e-12)


@both_kinds
def test_bare_has_the_same_parameters_but_no_srelu(residual):
    net = network(residual)
    theirs = bare(net)
    names = [n for n, _ in net.named_parameters() if not n.endswith("srelu_bias")]
    assert [n for n, _ in theirs.named_parameters()] == names
    x = images()
    doubled, logits = theirs(2 * x), theirs(x)
    bias = net.head.fc.bias
    torch.testing.assert_close(doubled - bias, 2 * (logits - bias), rtol=1e-10, atol=1e-10)  # linear


def test_plain_has_no_skip_connection():
    """Cut one branch and nothing arrives; with `residual` the shortcut carries the input past it."""
    for residual in (False, True):
        net = network(residual)
        with torch.no_grad():
            net.s1.b2.f.b.weight.zero_()
        difference = net(images()) - net(images())
        assert difference.any() == residual


@both_kinds
@pytest.mark.parametrize("depth, blocks", [(8, 1), (14, 2), (20, 3)])
def test_depth_counts_the_weighted_layers(residual, depth, blocks):
    """6 n + 2: a stem, three stages of n blocks of two convolutions, the classifier (projections not counted)."""
    net = isonet_cifar(depth, residual)
    counted = [
        name for name, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and not name.endswith(".proj")
    ]
    assert len(counted) == depth
    assert [len(stage) for stage in (net.s1, net.s2, net.s3)] == [blocks] * 3


@both_kinds
def test_parameters_have_the_names_and_shapes_of_the_design(residual):
    shapes = {name: tuple(p.shape) for name, p in isonet_cifar(8, residual, width=16, in_channels=1).named_parameters()}
    expected = {"stem.conv.weight": (16, 1, 3, 3), "stem.relu.srelu_bias": (1, 16, 1, 1)}
    inputs = 16
    for stage, outputs in (("s1", 16), ("s2", 32), ("s3", 64)):
        block = f"{stage}.b1"
        if residual and inputs != outputs:
            expected[f"{block}.proj.weight"] = (outputs, inputs, 1, 1)
        expected[f"{block}.f.a.weight"] = (outputs, inputs, 3, 3)
        expected[f"{block}.f.a_relu.srelu_bias"] = (1, outputs, 1, 1)
        expected[f"{block}.f.b.weight"] = (outputs, outputs, 3, 3)
        if residual:
            expected[f"{block}.f.shared_scalar.scale"] = (1, 1, 1, 1)
        expected[f"{block}.relu.srelu_bias"] = (1, outputs, 1, 1)
        inputs = outputs
    expected |= {"head.fc.weight": (10, 64), "head.fc.bias": (10,)}
    assert shapes == expected


@both_kinds
def test_a_network_starts_as_published(residual):
    """Every convolution a delta, biases -1, scales 0."""
    net = isonet_cifar(8, residual)
    for name, p in net.named_parameters():
        if name.endswith("srelu_bias"):
            assert p.eq(-1).all()
        elif name.endswith("scale"):
            assert p.item() == 0
        elif p.dim() == 4:
            assert torch.equal(p, nn.init.dirac_(torch.empty_like(p))), name
    assert (
        sum(p.dim() == 4 and not n.endswith(("bias", "scale")) for n, p in net.named_parameters()) == 7 + 2 * residual
    )


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
def test_the_stem_is_never_penalised_whatever_its_channels(channels):
    net = network(False, in_channels=channels)
    reg = OrthoRegularizer(net, 1.0, filter=lambda name, module: True)
    assert [row.name for row in reg.summary() if row.excluded] == ["stem.conv", "head.fc"]  # linear layers never are
    reg.accumulate_grad_()
    assert net.stem.conv.weight.grad is None and net.s1.b1.f.a.weight.grad.any()
    assert official_penalty(net).item() == pytest.approx(reg.last.item(), rel=1e-12)


@both_kinds
def test_stages_halve_the_image_and_the_projection_is_strided(residual):
    net = network(residual)
    x = net.s1(net.stem(images()))
    assert x.shape == (2, 4, 9, 10)
    assert net.s2(x).shape == (2, 8, 5, 5) and net.s3(net.s2(x)).shape == (2, 16, 3, 3)
    if residual:
        block = net.s2.b1
        shortcut = nn.functional.conv2d(x, block.proj.weight, stride=2)
        branch = block.f.shared_scalar.scale * block.f.b(block.f.a_relu(block.f.a(x)))
        expected = reference.residual_srelu(shortcut, branch, block.relu.srelu_bias)
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


@both_kinds
@pytest.mark.parametrize("num_classes, in_channels", [(10, 3), (3, 1)])
def test_images_of_any_size_give_logits(residual, num_classes, in_channels):
    net = isonet_cifar(8, residual, width=4, num_classes=num_classes, in_channels=in_channels)
    for size in (4, 7, 16):
        logits = net(torch.randn(3, in_channels, size, size + 1))
        assert logits.shape == (3, num_classes) and logits.isfinite().all() and logits.std() > 0


@both_kinds
def test_compiles_as_one_graph(residual):
    net, x = network(residual, depth=8), images()
    logits, grads = gradients(net, x)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    got, got_grads = gradients(compiled, x)
    assert_close([got, *got_grads], [logits, *grads], 1e-12)


@both_kinds
def test_channels_last_is_the_same_function(residual, device):
    net, x = network(residual).to(device), images().to(device)
    logits, grads = gradients(net, x)
    last = network(residual).to(device, memory_format=torch.channels_last)
    assert last.s1.b1.f.a.weight.is_contiguous(memory_format=torch.channels_last)
    got, got_grads = gradients(last, x.to(memory_format=torch.channels_last))
    assert_close([got, *got_grads], [logits, *grads], 1e-11)
    last = last.float()  # cuDNN knows no channels_last in float64
    hidden = last.s1(last.stem(x.float().to(memory_format=torch.channels_last)))
    assert hidden.is_contiguous(memory_format=torch.channels_last)


@both_kinds
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_autocast_is_as_accurate_as_the_official_arithmetic_under_it(residual, memory_format, device):
    """Medians over sixteen batches: of a single one, either error can by chance be twice the other."""
    net = network(residual, dtype=torch.float32).to(device, memory_format=memory_format)
    theirs, wide = official(net), network(residual)
    errors, allowed = [], []
    for _ in range(16):
        x = images(torch.float32)
        exact = gradients(wide, x.double())
        for model, found in ((net, errors), (theirs, allowed)):
            with torch.autocast(device.type, torch.bfloat16):
                logits, grads = gradients(model, x.to(device, memory_format=memory_format))
            if model is net:
                assert logits.dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads)
            pairs = zip([logits, *grads], [exact[0], *exact[1]], strict=True)
            found.append([(got.double().cpu() - want).norm() / want.norm() for got, want in pairs])
    ours, plain = (torch.tensor(found).median(0).values for found in (errors, allowed))
    assert ours.max() < 2 * plain.max() + 1e-6
    assert ours.sum() < 1.5 * plain.sum()


@both_kinds
def test_state_dict_and_copies(residual):
    net, other = network(residual), isonet_cifar(14, residual, width=4).double()
    other.load_state_dict(net.state_dict(), strict=True)
    x = images()
    assert torch.equal(other(x), net(x))


@pytest.mark.parametrize("depth", [0, 2, 7, 9, 13, 110 + 1, -4, 1])
def test_depth_must_be_six_n_plus_two(depth):
    with pytest.raises(ValueError, match=rf"depth must be 6 n \+ 2 \(8, 14, 20, ...\), got {depth}$"):
        isonet_cifar(depth)


@pytest.mark.parametrize("name", ["width", "num_classes", "in_channels"])
def test_sizes_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be a positive int, got 0"):
        isonet_cifar(8, **{name: 0})


@pytest.mark.parametrize("name", ["width", "num_classes", "in_channels"])
def test_sizes_that_nothing_could_hold_are_refused_by_name(name):
    for size in (2**31, 2**63, 10**5000):
        with pytest.raises(ValueError, match=rf"{name} must be below 2\*\*31"):
            isonet_cifar(8, **{name: size})
