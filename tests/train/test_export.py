"""`isonet-fast export` to a graph: .onnx and .pt2 give the network's logits for batches of any size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from isonet_fast.models import isonet_cifar
from isonet_fast.train.commands.cli import main


@pytest.fixture
def net() -> torch.nn.Module:
    net = isonet_cifar(8, True, width=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture
def checkpoint(net: torch.nn.Module, tmp_path: Path) -> Path:
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def logits(path: Path, images: torch.Tensor) -> torch.Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("kind", [".onnx", ".pt2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_graph_gives_the_logits(kind, net, checkpoint, tmp_path, capsys):
    if kind == ".onnx":
        pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    out = tmp_path / f"out{kind}"
    for size in ([], ["--size", "12"]):  # over its own file, too
        assert main(["export", str(checkpoint), str(out), *size]) == 0
        side = 12 if size else 32
        assert f"for images of {side} x {side}" in capsys.readouterr().out
        for batch in (1, 5):
            images = torch.randn(batch, 3, side, side)
            torch.testing.assert_close(logits(out, images), net(images), rtol=1e-4, atol=1e-5)
    (tmp_path / f"other{kind}").write_bytes(b"isonet_fast")
    assert main(["export", str(checkpoint), str(tmp_path / f"other{kind}")]) == 1
    assert "is there already and is no exported file" in capsys.readouterr().err
    assert (tmp_path / f"other{kind}").read_bytes() == b"isonet_fast"


def test_a_size_is_of_a_graph(checkpoint, tmp_path, capsys):
    for out, size in ((tmp_path / "out.pt", "32"), (tmp_path / "out.pt2", "7")):
        assert main(["export", str(checkpoint), str(out), "--size", size]) == 1
        assert f"--size must be at least 8, and is of a graph (.onnx, .pt2), got {size}" in capsys.readouterr().err
        assert not out.exists()


def test_without_onnx_the_package_is_named(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    assert main(["export", str(checkpoint), str(tmp_path / "out.onnx")]) == 1
    assert "pip install 'isonet_fast[export]'" in capsys.readouterr().err
