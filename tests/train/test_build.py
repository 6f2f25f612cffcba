"""A configuration reaches the network: every switch of `models.ingredients` is a key, with the same default."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from torch import nn

from isonet_fast import models
from isonet_fast.models.ingredients import Ingredients, Switches
from isonet_fast.train import config
from isonet_fast.train.build import build_model
from isonet_fast.train.config import Model


def built(name: str, *settings: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config.load(None, [f"model.name={name}", "model.depth=8", *settings]).model, 10, 3)


def test_every_switch_is_a_key_with_its_default() -> None:
    defaults = inspect.signature(Ingredients).parameters
    for name in Switches.__annotations__:
        assert getattr(Model(), name) == defaults[name].default, name


RELU = {"activation": "relu", "initialisation": "kaiming"}


@pytest.mark.parametrize("name", ["isonet_cifar", "risonet18"])
@pytest.mark.parametrize(
    "switches",
    [
        {},
        RELU,
        {"bias_init": -0.5, "bias_learned": False},
        {**RELU, "normalisation": "batch", "branch_scale": None},
        {"branch_scale": 1.0},
        {**RELU, "fixup": True},
    ],
    ids=lambda switches: "+".join(switches) or "published",
)
def test_the_network_is_that_of_the_keys(name: str, switches: dict[str, object]) -> None:
    settings = [f"model.{key}={json.dumps(value)}" for key, value in switches.items()]
    own = built(name, *settings, "model.residual=true")
    torch.manual_seed(0)
    constructor = models.risonet18 if name == "risonet18" else models.isonet_cifar
    arguments = {} if name == "risonet18" else {"depth": 8, "residual": True}
    expected = constructor(num_classes=10, **arguments, **switches)
    assert own.state_dict().keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(own.state_dict()[key], value), key
    assert [p.requires_grad for p in own.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert str(own) == str(expected)


def test_a_wrong_switch_is_named() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of .*, got 'gelu'"):
        built("isonet_cifar", "model.activation=gelu")
    with pytest.raises(ValueError, match=r'branch_scale must be "published", None or a finite number, got \'half\''):
        built("isonet_cifar", "model.branch_scale=half")
    with pytest.raises(ValueError, match="model.branch_scale must be float or str or null, got"):
        config.load(None, ["model.branch_scale=[1]"])
