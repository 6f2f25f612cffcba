"""`isonet-fast evaluate`, `report` and `export`: accuracy, isometry and weights of a checkpoint, ours or official."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import diagnostics
from ..models.isonet import BLOCKS, BOTTLENECK
from ..models.load_official import official_state, read_checkpoint
from . import checkpoint, config, weights
from .build import build_model, choose_device
from .config import Config, Model
from .datasets import open_source
from .loader import Loader
from .validation import validate


def run(path: Path, data: str | None, settings: Sequence[str] = (), preset: str | None = None) -> dict[str, float]:
    """Evaluate the checkpoint at `path` (a file, or the directory of a run: its best.pt, else latest.pt).

    The network is the one that the checkpoint says it is; an official checkpoint says it by its names and shapes.
    Prints and returns loss, top1 and top5 (percent), images and corrupt.
    """
    model, settled = network(path, [*settings, *([f"data.source={data}"] if data is not None else [])], preset)
    classes, channels = (
        model.get_parameter(name).shape[n] for n, name in enumerate(("head.fc.weight", "stem.conv.weight"))
    )
    source = open_source(settled.data, settled.seed, evaluating=True)
    if (source.num_classes, source.channels) != (classes, channels):
        raise ValueError(
            f"{path} tells {classes} classes apart in images of {channels} channels; "
            f"{settled.data.source} has {source.num_classes} classes and {source.channels} channels"
        )
    device = choose_device(settled.device)
    model.to(device)
    if settled.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return _report(model, source.val, settled, device)


def network(path: Path, settings: Sequence[str] = (), preset: str | None = None) -> tuple[nn.Module, Config]:
    """The network in a checkpoint (see `run`), with its weights, and the configuration that it was trained with."""
    state, base, path = _read(path)
    settled = config.load(preset, settings, base)
    if base is None and preset is None:
        settled.model = recognise(state, path)
    unusual = {"head.fc.weight", "stem.conv.weight"} - set(state)
    if unusual:
        raise ValueError(f"{path} holds no network of this package: no {', '.join(sorted(unusual))} in it")
    model = build_model(settled.model, state["head.fc.weight"].shape[0], state["stem.conv.weight"].shape[1])
    _fit(model, state, path)
    return model, settled


def isometry(path: Path, size: int, preset: str | None = None) -> diagnostics.Report:
    """`isonet-fast report`: the singular values of every convolution in a checkpoint, for images of size x size."""
    if size < 8:
        raise ValueError(f"--size must be at least 8, got {size}")
    model, _ = network(path, preset=preset)
    channels = model.get_parameter("stem.conv.weight").shape[1]
    report = diagnostics.isometry_report(model, (channels, size, size))
    print(report)
    return report


def export(path: Path, output: Path, preset: str | None = None) -> None:
    """`isonet-fast export`: the weights of a checkpoint (see `run`) as one plain state_dict, in `output`."""
    weights.check_suffix(output)
    model, settled = network(path, preset=preset)
    weights.write(model, settled.model, output)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights of {path} written to {output}")


def _report(model: nn.Module, examples: Any, settled: Config, device: torch.device) -> dict[str, float]:
    pin = device.type == "cuda"
    loader = Loader(examples, settled.data.eval_batch_size, settled.data.workers, settled.seed, False, pin)
    sums, corrupt = validate(model, loader, settled, device)
    if corrupt and settled.data.strict:
        raise ValueError(f"corrupt image: {corrupt[0]}; without --strict it would be skipped")
    for image in corrupt:
        print(f"skipped a corrupt image: {image}")
    means = sums.means()
    skipped = f", {len(corrupt)} corrupt skipped" if corrupt else ""
    print(
        f"top-1 {means['top1']:.2f} %, top-5 {means['top5']:.2f} %, loss {means['loss']:.4f} "
        f"({sums.examples} images{skipped})"
    )
    return {**means, "images": sums.examples, "corrupt": len(corrupt)}


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any] | None, Path]:
    """The weights, the configuration that they were trained with (None if it is not known), and where they lie."""
    if path.is_dir() and path.suffix != ".dcp":
        path = next(iter(checkpoint.find(path, "best", "latest")), path / "latest.pt")
    if path.suffix == ".safetensors":
        state, model = weights.read_safetensors(path)
        return state, None if model is None else {"model": model}, path
    contents: Any = {"format": None} if path.is_dir() else read_checkpoint(path)
    if not isinstance(contents, Mapping) or "format" not in contents:
        model = weights.described(contents) if isinstance(contents, Mapping) else None
        return (official_state(contents, path), None, path) if model is None else (contents, {"model": model}, path)
    contents = checkpoint.load(path)
    return contents["model"], contents["config"], path


def recognise(state: Mapping[str, Tensor], path: Path) -> Model:
    """Which of the published networks an official checkpoint holds, by the names of its weights."""
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"s{n}.")}) for n in range(1, 5)]
    bottleneck, residual = "s1.b1.f.c.weight" in state, "s1.b1.f.shared_scalar.scale" in state
    for depth, published in BLOCKS.items():
        if tuple(blocks) == published and bottleneck == (depth in BOTTLENECK):
            return Model(f"{'r' if residual else ''}isonet{depth}")
    raise ValueError(
        f"{path} holds none of the published networks ({len(state)} weights, the first {next(iter(state))!r}); "
        "say which one with --config"
    )


def _fit(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit {type(model).__name__}: {error}") from error
