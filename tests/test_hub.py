"""torch.hub by hubconf.py, and huggingface_hub's mixin on a folder: the networks and their weights, offline."""

from __future__ import annotations

import json
import pathlib
import runpy

import pytest
import torch

from isonet_fast.models import isonet_cifar
from isonet_fast.models.isonet import BLOCKS

REPOSITORY = pathlib.Path(__file__).parents[1]


def test_torch_hub_finds_and_builds_the_networks():
    names = {f"{kind}isonet{depth}" for kind in ("", "r") for depth in BLOCKS} | {"isonet_cifar"}
    entries = runpy.run_path(str(REPOSITORY / "hubconf.py"))
    assert {name for name, value in entries.items() if callable(value)} == names
    net = torch.hub.load(str(REPOSITORY), "risonet18", source="local", num_classes=3)
    assert net(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    net = torch.hub.load(str(REPOSITORY), "isonet_cifar", 8, width=4, source="local")
    assert net.feature_channels == {"s1": 4, "s2": 8, "s3": 16}
    assert all(entries[name].__doc__ for name in names)  # what torch.hub.help shows


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("isonet_fast.hub", reason="needs huggingface_hub", exc_type=ModuleNotFoundError)


def test_a_folder_gives_the_network_back(hub, tmp_path):
    net = hub.ISONetCifar(8, residual=True, width=4, dropout=0.25)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == dict(depth=8, residual=True, width=4, num_classes=10, in_channels=3, dropout=0.25)
    again = hub.ISONetCifar.from_pretrained(str(tmp_path))
    assert again.head.dropout.p == 0.25 and not again.training
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(x), net.eval()(x))
    plain = isonet_cifar(8, True, width=4)
    plain.load_state_dict(again.state_dict())
    assert "arxiv.org/abs/2006.16992" in (tmp_path / "README.md").read_text()


def test_arguments_given_anew_and_errors(hub, tmp_path):
    hub.ISONet(18, num_classes=3).save_pretrained(tmp_path)
    assert hub.ISONet.from_pretrained(str(tmp_path), dropout=0.5).head.dropout.p == 0.5
    with pytest.raises(RuntimeError, match="size mismatch"):
        hub.ISONet.from_pretrained(str(tmp_path), num_classes=4)
    with pytest.raises(ValueError, match="depth must be one of 18, 34, 50, 101, got 17"):
        hub.ISONet(17)
