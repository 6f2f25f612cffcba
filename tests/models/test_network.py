"""What every network shares: the arguments' errors, features of each stage, what never decays, dropout."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from isonet_fast import models, param_groups
from isonet_fast.models import isonet_cifar

DEPTHS = (18, 34, 50, 101)
NETWORKS = {f"{kind}isonet{depth}": 64 * (4 if depth >= 50 else 1) for kind in ("", "r") for depth in DEPTHS}


def test_arguments_of_other_types_are_named():
    for call, message in (
        (lambda: isonet_cifar("32"), "depth must be an int, got '32'"),
        (lambda: isonet_cifar(32.0), "depth must be an int, got 32.0"),
        (lambda: isonet_cifar(None), "depth must be an int, got None"),
        (lambda: isonet_cifar(True), "depth must be an int, got True"),
        (lambda: isonet_cifar(torch.ones(2)), "depth must be an int, got tensor([1., 1.])"),
        (lambda: isonet_cifar(8, "yes"), "residual must be True or False, got 'yes'"),
        (lambda: isonet_cifar(8, 1), "residual must be True or False, got 1"),
        (lambda: isonet_cifar(8, width=None), "width must be an int, got None"),
        (lambda: isonet_cifar(8, width=1.5), "width must be an int, got 1.5"),
        (lambda: isonet_cifar(8, num_classes="10"), "num_classes must be an int, got '10'"),
        (lambda: isonet_cifar(8, in_channels=[3]), "in_channels must be an int, got [3]"),
        (lambda: isonet_cifar(8, dropout="0.1"), "dropout must be None (no such layer) or in [0, 1), got '0.1'"),
        (lambda: models.isonet18(num_classes="10"), "num_classes must be an int, got '10'"),
        (lambda: models.risonet50(in_channels=3.0), "in_channels must be an int, got 3.0"),
        (lambda: models.risonet18(dropout=True), "dropout must be None (as published) or in [0, 1), got True"),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), float("inf")])
def test_a_dropout_rate_is_below_one(dropout):
    for make in (models.isonet18, lambda **kwargs: isonet_cifar(8, **kwargs)):
        with pytest.raises(ValueError, match=r"dropout must be None \(.*\) or in \[0, 1\), got "):
            make(dropout=dropout)


def test_numbers_of_any_kind():
    net = isonet_cifar(np.int64(8), width=torch.tensor(4), num_classes=np.int32(3), dropout=np.float32(0.25))
    assert net(torch.randn(1, 3, 8, 8)).shape == (1, 3) and net.head.dropout.p == 0.25


def test_dropout_of_the_cifar_form():
    assert isinstance(isonet_cifar(8, dropout=0.3).head.dropout, nn.Dropout)
    assert not any(isinstance(m, nn.Dropout) for m in isonet_cifar(8).modules())
    names = list(isonet_cifar(8).state_dict())
    assert list(isonet_cifar(8, dropout=0.3).state_dict()) == names


@pytest.mark.parametrize("name", ["isonet18", "risonet18", "risonet50"])
def test_features_are_what_the_stages_return(name):
    net = getattr(models, name)(num_classes=3).eval()
    net.head.fc.register_forward_pre_hook(lambda *_: pytest.fail("the head was computed"))
    x = torch.randn(1, 3, 64, 32)
    found = net.features(x)
    assert {k: v.shape[1] for k, v in found.items()} == net.feature_channels
    assert {k: tuple(v.shape[2:]) for k, v in found.items()} == {
        f"s{n}": (64 // 2 ** (n + 1), 32 // 2 ** (n + 1)) for n in (1, 2, 3, 4)
    }
    seen = {}
    for stage in net.feature_channels:
        net.get_submodule(stage).register_forward_hook(lambda m, i, o, stage=stage: seen.update({stage: o.clone()}))
    net.head = nn.Identity()
    assert torch.equal(net(x), found["s4"])
    assert all(torch.equal(seen[stage], found[stage]) for stage in seen) and len(seen) == 4


def test_features_of_the_cifar_form():
    net = isonet_cifar(8, True, width=4)
    found = net.features(torch.randn(2, 3, 9, 8))
    assert [(k, tuple(v.shape)) for k, v in found.items()] == [
        ("s1", (2, 4, 9, 8)),
        ("s2", (2, 8, 5, 4)),
        ("s3", (2, 16, 3, 2)),
    ]
    assert net.feature_channels == {"s1": 4, "s2": 8, "s3": 16}
    assert torch.equal(net.head(found["s3"]), net(torch.randn(2, 3, 9, 8))) is False


@pytest.mark.parametrize("name", NETWORKS)
def test_feature_channels_of_every_network(name):
    with torch.device("meta"):
        net = getattr(models, name)()
    width = NETWORKS[name]
    assert net.feature_channels == {"s1": width, "s2": 2 * width, "s3": 4 * width, "s4": 8 * width}
    assert net.head.fc.in_features == 8 * width


@pytest.mark.parametrize("residual", [False, True])
def test_no_weight_decay_names_what_the_recipe_does_not_decay(residual):
    net = isonet_cifar(8, residual)
    undecayed = [p for group in param_groups(net, 0.1, 1e-4) if group["weight_decay"] == 0 for p in group["params"]]
    parameters = dict(net.named_parameters())
    assert {id(parameters[name]) for name in net.no_weight_decay()} == {id(p) for p in undecayed}
    assert len(undecayed) == 7
