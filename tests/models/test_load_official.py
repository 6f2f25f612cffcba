"""Checkpoint files of the official code and in other layouts: read, refused with a reason, never executed."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from isonet_fast.models import isonet_cifar, load_official


@pytest.fixture
def model() -> nn.Module:
    return isonet_cifar(8, residual=True)


def saved(path: Path, contents: object, **options: object) -> Path:
    torch.save(contents, path, **options)  # type: ignore[arg-type]
    return path


def net(seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = isonet_cifar(8, residual=True).state_dict()
    return {f"module.{name}": torch.randn_like(value) for name, value in state.items()}


@pytest.mark.parametrize("new_format", [True, False])  # the published files are of PyTorch 1.4: the old format
def test_a_whole_snapshot_loads(model: nn.Module, tmp_path: Path, new_format: bool) -> None:
    weights = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
    contents = {"net": weights, "optim": optimizer, "epoch": 3, "train_accuracy": [0.5], "test_accuracy": [1.5]}
    path = saved(tmp_path / "latest.pt", contents, _use_new_zipfile_serialization=new_format)
    assert load_official(model, path) is model
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[f"module.{name}"])


LAYOUTS = {
    "official": lambda state: {"net": prefixed(state, "module."), "epoch": 1},
    "plain": lambda state: state,
    "DDP": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "DDP of a compiled one": lambda state: prefixed(state, "module._orig_mod."),
    "compiled DDP": lambda state: prefixed(state, "_orig_mod.module."),
    "blocks compiled": lambda state: {name.replace(".b1.", ".b1._orig_mod."): v for name, v in state.items()},
    "FSDP": lambda state: {name.replace(".b1.", ".b1._fsdp_wrapped_module."): v for name, v in state.items()},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3), **prefixed(state, "module.")},
    "Lightning": lambda state: {"state_dict": prefixed(state, "model."), "epoch": 1, "loops": {"a": {}}},
    "timm": lambda state: {"state_dict": state, "arch": "x", "optimizer": {"state": {}}},
    "references": lambda state: {"model": state, "optimizer": {"state": {}}},
    "tutorial": lambda state: {"model_state_dict": state, "loss": torch.tensor(0.5)},
}


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def plain() -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): value for name, value in net().items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_usual_layout_loads(layout: str, model: nn.Module, tmp_path: Path) -> None:
    weights = plain()
    load_official(model, saved(tmp_path / "weights.pt", LAYOUTS[layout](weights)))
    same(model, weights)


def test_safetensors_files_load(model: nn.Module, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from safetensors.torch import save_file

    weights = plain()
    save_file(prefixed(weights, "module."), tmp_path / "weights.safetensors")
    load_official(model, tmp_path / "weights.safetensors")
    same(model, weights)
    (tmp_path / "junk.safetensors").write_text("junk")
    with pytest.raises(ValueError, match=r"junk\.safetensors is damaged or no safetensors file: it is a text file"):
        load_official(model, tmp_path / "junk.safetensors")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_official(model, tmp_path / "absent.safetensors")


def test_into_a_wrapped_model(model: nn.Module, tmp_path: Path) -> None:
    weights = plain()
    path = saved(tmp_path / "weights.pt", {"net": prefixed(weights, "module.")})
    load_official(torch.optim.swa_utils.AveragedModel(torch.compile(model)).module, path)
    load_official(torch.compile(model), path)
    same(model, weights)


def same(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in weights)


def test_weights_without_the_rest_of_a_snapshot_load(model: nn.Module, tmp_path: Path) -> None:
    weights = net()
    load_official(model, saved(tmp_path / "weights.pt", weights))
    assert all(torch.equal(value, weights[f"module.{name}"]) for name, value in model.state_dict().items())


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, (Malicious.target,)


def test_a_malicious_pickle_runs_nothing(model: nn.Module, tmp_path: Path) -> None:
    Malicious.target = str(tmp_path / "owned")
    path = saved(tmp_path / "bad.pt", {"net": net(), "epoch": Malicious()})
    with pytest.raises(ValueError, match=r"bad\.pt is refused, nothing in it was run.*mkdir"):
        load_official(model, path)
    assert not (tmp_path / "owned").exists()


def spoilt(**changes: object) -> dict:
    state = net()
    for name, value in changes.items():
        state["module." + name.replace("__", ".")] = value  # type: ignore[assignment]
    return state


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([1, 2], r"holds no weights: expected a state_dict, or one under 'net', .*; found a list$"),
        ({"weights": {}, "epoch": 3}, r"found a dict of 'weights': an empty dict, 'epoch': an int$"),
        ({"net": {}}, r"under 'net' holds no weights: .*; found an empty dict$"),
        ({"net": spoilt(a=3)}, r"under 'net' must map names to tensors; found 'module.a': an int$"),
        ({"net": spoilt(head__fc__bias=torch.ones(10, dtype=torch.long))}, r"head.fc.bias is torch.int64, the model's"),
        ({"net": net(), "model": net()}, r"holds weights more than once, under 'net' and 'model'$"),
        (
            {**net(), "module._orig_mod.head.fc.bias": torch.ones(10)},
            r"the same weight under several names: module._or",
        ),
        ({"net": {**net(), "a": torch.ones(1)}}, r"unexpected module.stem.conv.weight, .*, a$|unexpected module.*more"),
        ({"net": spoilt(extra=torch.ones(1))}, r"unexpected extra$"),
        (
            {"net": spoilt(head__fc__bias=torch.ones(7))},
            r"shapes differ: head.fc.bias \(7,\) where the model has \(10,\)",
        ),
        ({"net": {"module.head.fc.bias": torch.ones(10)}}, r"missing stem.conv.weight, .* and \d+ more$"),
    ],
)
def test_anything_else_is_refused(model: nn.Module, tmp_path: Path, contents: object, message: str) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_official(model, saved(tmp_path / "file.pt", contents))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("keep", [0, 10, 2000])
def test_a_damaged_file_is_named(model: nn.Module, tmp_path: Path, keep: int) -> None:
    path = saved(tmp_path / "cut.pt", {"net": net()})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut\.pt"):
        load_official(model, path)


@pytest.mark.filterwarnings("ignore")  # torch wonders about the bytes, too
@pytest.mark.parametrize("new_format", [True, False])
def test_a_flipped_bit_is_a_clear_error_or_a_number(model: nn.Module, tmp_path: Path, new_format: bool) -> None:
    """Official files bear no checksum: a flipped bit among the weights passes, one anywhere else must not crash."""
    path = saved(tmp_path / "flipped.pt", {"net": net()}, _use_new_zipfile_serialization=new_format)
    content, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[rng.choice((1, -1)) * rng.randrange(1, 9000)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            load_official(model, path)
        except ValueError as error:
            assert "flipped.pt" in str(error)
            refused += 1
    assert refused > 30


def test_an_absent_file_is_refused(model: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_official(model, tmp_path / "absent.pt")


@pytest.mark.parametrize("path", [None, 0, True, b"net.pt", torch.zeros(2)], ids=lambda path: type(path).__name__)
def test_a_path_of_another_type_is_refused(model: nn.Module, path: object) -> None:
    with pytest.raises(TypeError, match=f"path must be a str or an os.PathLike, got {type(path).__name__}"):
        load_official(model, path)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        load_official({}, "net.pt")
