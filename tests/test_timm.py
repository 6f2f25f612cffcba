"""The networks in timm: what its own suite asks of every model, and what its training script does with them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import isonet_fast
from isonet_fast import models

registered = pytest.importorskip("isonet_fast.timm", reason="timm is not installed", exc_type=ModuleNotFoundError)
import timm

NAMES = [f"{kind}isonet{depth}" for kind in ("", "r") for depth in (18, 34, 50, 101)] + ["isonet_cifar"]
every_network = pytest.mark.parametrize("name", NAMES)
DOUBLE = torch.float64


def on_meta(name, **arguments):
    """A network without memory or arithmetic: shapes only, at the size of its configuration."""
    with torch.device("meta"):
        model = timm.create_model(name, **arguments).eval()
        return model, torch.randn(1, *model.default_cfg["input_size"])


def generic(model):
    """Away from its initial values, in float64."""
    with torch.no_grad():
        for p in model.double().parameters():
            p.copy_(
                torch.randn_like(p) / p[0].numel() ** 0.5
                if p.dim() > 1 and p[0].numel() > 1
                else 0.3 * torch.randn_like(p)
            )
    return model.eval()


def test_the_networks_are_registered():
    assert set(NAMES) <= set(timm.list_models()) and sorted(registered.__all__) == sorted(NAMES)
    assert timm.create_model("isonet_cifar", depth=8, residual=True, width=4).feature_channels == {
        "s1": 4,
        "s2": 8,
        "s3": 16,
    }


@every_network
def test_names_and_weights_are_those_of_the_models(name):
    mine, _ = on_meta(name)
    with torch.device("meta"):
        theirs = models.isonet_cifar(32) if name == "isonet_cifar" else getattr(models, name)()
    assert [(k, v.shape) for k, v in mine.state_dict().items()] == [
        (k, v.shape) for k, v in theirs.state_dict().items()
    ]
    assert mine.no_weight_decay() == theirs.no_weight_decay()
    assert mine.drop_rate == getattr(theirs.head.dropout, "p", 0.0)


@every_network
def test_forward_backward_and_checkpointing(name):
    model = timm.create_model(name, num_classes=42)
    x = torch.randn(2, 3, 32, 32)
    results = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        outputs = model.eval()(x)
        outputs.square().mean().backward()
        assert outputs.shape == (2, 42) and outputs.isfinite().all()
        missing = [n for n, p in model.named_parameters() if p.grad is None]
        assert not missing
        results.append([outputs.detach(), *(p.grad for p in model.parameters())])
    for kept, again in zip(*results, strict=True):
        assert torch.allclose(kept, again, rtol=1e-4, atol=1e-5)


@every_network
def test_the_configuration_names_layers_that_are_there(name):
    model, x = on_meta(name)
    cfg = model.default_cfg
    assert cfg["classifier"] + ".weight" in model.state_dict() and cfg["first_conv"] + ".weight" in model.state_dict()
    assert model.num_classes == cfg["num_classes"] and model.get_classifier() is model.head.fc
    features = model.forward_features(x)
    assert features.shape == (1, model.num_features, *cfg["pool_size"])
    pre_logits = model.forward_head(features, pre_logits=True)
    assert pre_logits.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    assert model(x).shape == pre_logits.shape and model.num_classes == 0
    model.reset_classifier(7, "catavgmax")
    assert model(x).shape == (1, 7) and model.head_hidden_size == 2 * model.num_features
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    bare, x = on_meta(name, num_classes=0, global_pool="")
    assert bare(x).shape == features.shape


@every_network
@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "getter"])
def test_features_only_returns_every_stage(name, feature_cls):
    model, x = on_meta(name, features_only=True, feature_cls=feature_cls)
    found = model(x)
    found = list(found.values()) if isinstance(found, dict) else found
    channels, reductions = model.feature_info.channels(), model.feature_info.reduction()
    assert len(found) == len(channels) == (3 if name == "isonet_cifar" else 4)
    for feature, c, r in zip(found, channels, reductions, strict=True):
        assert feature.shape == (1, c, math.ceil(x.shape[2] / r), math.ceil(x.shape[3] / r))


@pytest.mark.parametrize("feature_cls", ["list", "getter", "hook", "fx"])
def test_chosen_features_are_those_of_the_network(feature_cls):
    torch.manual_seed(0)
    net = generic(timm.create_model("isonet_cifar", depth=8, residual=True, width=4))
    chosen = timm.create_model(
        "isonet_cifar", depth=8, residual=True, width=4, features_only=True, out_indices=(0, 1), feature_cls=feature_cls
    )
    within = {"list": "", "getter": "model", "hook": "body", "fx": "graph_module"}
    wrapped = chosen.get_submodule(within[feature_cls])
    wrapped.double().load_state_dict({k: v for k, v in net.state_dict().items() if k in wrapped.state_dict()})
    x = torch.randn(1, 3, 16, 16, dtype=DOUBLE)
    expected = list(net.features(x).values())[:2]
    for got, want in zip(chosen.eval()(x), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_intermediates_are_the_features():
    net = generic(timm.create_model("isonet18"))
    x = torch.randn(1, 3, 32, 32, dtype=DOUBLE)
    every = list(net.features(x).values())
    last, found = net.forward_intermediates(x)
    assert torch.equal(last, every[3]) and all(map(torch.equal, found, every))
    (second, third) = net.forward_intermediates(x, indices=[1, -2], intermediates_only=True, stop_early=True)
    assert torch.equal(second, every[1]) and torch.equal(third, every[2])
    assert net.prune_intermediate_layers([0, 1]) == [0, 1]
    assert not hasattr(net, "s3") and torch.equal(net(x), every[1])


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["isonet18", "risonet18", "risonet50"])
def test_output_stride_keeps_the_old_pixels(name, output_stride):
    coarse = generic(timm.create_model(name, num_classes=0))
    fine = timm.create_model(name, num_classes=0, output_stride=output_stride).double().eval()
    fine.load_state_dict(coarse.state_dict())
    x = torch.randn(1, 3, 64, 32, dtype=DOUBLE)
    found = fine.features(x)
    assert [info["reduction"] for info in fine.feature_info] == [min(r, output_stride) for r in (4, 8, 16, 32)]
    for (stage, want), reduction in zip(coarse.features(x).items(), (4, 8, 16, 32), strict=True):
        step = max(1, reduction // output_stride)
        got = found[stage]
        assert got.shape[2:] == (64 // min(reduction, output_stride), 32 // min(reduction, output_stride))
        torch.testing.assert_close(got[:, :, ::step, ::step], want, rtol=0, atol=1e-10 * want.abs().max().item())


@pytest.mark.parametrize("name", ["isonet_cifar", "risonet18"])
def test_traces_with_fx(name):
    """As timm's suite does it, by torchvision's feature extraction."""
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = generic(timm.create_model(name, num_classes=5))
    tracer = dict(
        leaf_modules=get_notrace_modules(), autowrap_functions=get_notrace_functions(), param_shapes_constant=True
    )
    node = get_graph_node_names(model, tracer_kwargs=tracer)[1][-1]
    traced = create_feature_extractor(model, [node], tracer_kwargs=tracer)
    x = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    (got,) = traced(x).values()
    torch.testing.assert_close(got, model(x), rtol=0, atol=1e-10)
    got.mean().backward()
    assert all(p.grad is not None for p in traced.parameters())


def test_scriptable_networks_can_be_scripted():
    arguments = dict(depth=8, residual=True, width=4)
    with timm.layers.set_scriptable(True):
        model = timm.create_model("isonet_cifar", **arguments)
        features = timm.create_model("isonet_cifar", features_only=True, **arguments)
    x = torch.randn(1, 3, 32, 32)
    assert model.default_cfg["architecture"] == "isonet_cifar"
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))
    assert [f.shape[1] for f in torch.jit.script(features.eval())(x)] == [4, 8, 16]


@pytest.mark.parametrize("layout", ["official", "own"])
def test_a_checkpoint_file_loads(tmp_path, layout):
    """With another number of classes and of input channels, as timm adapts them."""
    torch.manual_seed(0)
    net = models.isonet18()
    state = net.state_dict()
    contents = {"net": {f"module.{k}": v for k, v in state.items()}} if layout == "official" else {"model": state}
    torch.save(contents, tmp_path / "net.pt")
    overlay = dict(file=str(tmp_path / "net.pt"))
    same = timm.create_model("isonet18", pretrained=True, pretrained_cfg_overlay=overlay)
    assert all(torch.equal(same.state_dict()[k], v) for k, v in state.items())
    other = timm.create_model("isonet18", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1)
    assert other.head.fc.weight.shape == (3, 512)
    torch.testing.assert_close(other.stem.conv.weight, state["stem.conv.weight"].sum(1, keepdim=True))
    assert torch.equal(other.s1.b1.f.a.weight, state["s1.b1.f.a.weight"])


def test_no_published_weights_is_said():
    with pytest.raises(RuntimeError, match="No pretrained weights exist for isonet18"):
        timm.create_model("isonet18", pretrained=True)


def test_timm_does_not_decay_srelu_biases():
    """Its optimizer factory does not, with and without layer-wise learning rates; the shared scales do decay."""
    from timm.optim import create_optimizer_v2

    model = timm.create_model("isonet_cifar", depth=8, residual=True, width=4)
    names = {id(p): n for n, p in model.named_parameters()}
    for layer_decay in (None, 0.9):
        optimizer = create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=layer_decay)
        groups = [(g["weight_decay"], names[id(p)]) for g in optimizer.param_groups for p in g["params"]]
        assert {n for decay, n in groups if decay == 0} == model.no_weight_decay() | {"head.fc.bias"}
        assert len(groups) == len(names)


def test_the_penalty_covers_the_same_layers():
    model = timm.create_model("isonet_cifar", depth=8, residual=True, width=4)
    excluded = {row.name for row in isonet_fast.OrthoRegularizer(model).summary() if row.excluded}
    assert "stem.conv" in excluded and not any(name.startswith("s") for name in excluded - {"stem.conv"})


def test_errors_name_the_argument():
    net = timm.create_model("isonet_cifar", depth=8, width=4)
    for call, error, message in (
        (lambda: net.reset_classifier(5, ""), ValueError, 'global_pool="" needs num_classes=0, got 5'),
        (lambda: net.reset_classifier("5"), TypeError, "num_classes must be an int, got '5'"),
        (lambda: timm.create_model("isonet18", num_classes=-1), ValueError, "num_classes must be at least 0"),
        (
            lambda: timm.create_model("isonet18", output_stride=12),
            ValueError,
            "output_stride must be one of 4, 8, 16, 32, got 12",
        ),
        (lambda: timm.create_model("isonet_cifar", depth="8"), TypeError, "depth must be an int, got '8'"),
        (lambda: net.forward_intermediates(torch.randn(1, 3, 8, 8), output_fmt="NLC"), ValueError, 'must be "NCHW"'),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_linear_probe_trains_the_classifier_only():
    net = timm.create_model("isonet_cifar", depth=8, width=4)
    net.requires_grad_(False).reset_classifier(3)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["head.fc.weight", "head.fc.bias"]
    assert isinstance(net.get_classifier(), nn.Linear)
