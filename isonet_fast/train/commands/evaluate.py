"""`isonet-fast evaluate`, `report` and `export`: accuracy, isometry and weights of a checkpoint, ours or official."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import diagnostics
from ...models.isonet import BLOCKS, BOTTLENECK
from ...models.load_official import load_weights
from ...safe_load import few, weights_in
from .. import config
from ..build import build_model, choose_device, construct
from ..config import Config, Model
from ..data.datasets import open_source
from ..data.loader import Loader
from ..saving import checkpoint, graphs, weights
from ..validation import validate

_OURS = {"format", "config", "model"}  # keys of a checkpoint of this trainer, among others


def run(path: Path, data: str | None, settings: Sequence[str] = (), preset: str | None = None) -> dict[str, float]:
    """Evaluate the checkpoint at `path` (a file, or the directory of a run: its best.pt, else latest.pt).

    The checkpoint says which network it holds, or its names and shapes do (`recognise`). Every layout of
    `models.load_official` is read. Prints and returns loss, top1 and top5 (percent), images and corrupt.
    """
    model, settled = network(path, [*settings, *([f"data.source={data}"] if data is not None else [])], preset)
    classes, channels = _ends(model.state_dict(), path)
    source = open_source(settled.data, settled.seed, evaluating=True)
    for note in source.notes:
        print(note)
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
    classes, channels = _ends(state, path)
    if base is None and preset is None:
        settled.model = recognise(state, path)
    model = build_model(settled.model, classes, channels)
    load_weights(model, state, path)
    return model, settled


def isometry(path: Path, size: int, preset: str | None = None, constructor: str | None = None) -> diagnostics.Report:
    """`isonet-fast report`: the singular values of every convolution in a checkpoint, for images of size x size.

    constructor: "module:function" that returns the network, if it is not one of this package.
    """
    if size < 8:
        raise ValueError(f"--size must be at least 8, got {size}")
    if constructor is None:
        model, _ = network(path, preset=preset)
    elif preset is not None:
        raise ValueError("--model builds the network; leave --config out")
    else:
        model = construct(constructor)
        state, _, path = _read(path)
        load_weights(model, state, path)
    report = diagnostics.isometry_report(model, (_channels(model), size, size))
    print(report)
    return report


def export(path: Path, output: Path, preset: str | None = None, size: int | None = None) -> None:
    """`isonet-fast export`: the network of a checkpoint (see `run`) in `output`, in the format of its suffix.

    .pt, .safetensors: one plain state_dict. .onnx, .pt2: the graph for images of size x size (None: those of the
    configuration, 32 x 32 for isonet_cifar).
    """
    as_graph = output.suffix in graphs.SUFFIXES
    if not as_graph and output.suffix not in weights.SUFFIXES:
        *first, last = (*weights.SUFFIXES, *graphs.SUFFIXES)
        raise ValueError(f"the file to write must end in {', '.join(first)} or {last}, got {output}")
    if size is not None and (size < 8 or not as_graph):
        raise ValueError(f"--size must be at least 8, and is of a graph (.onnx, .pt2), got {size} for {output.name}")
    (graphs if as_graph else weights).check_target(output)
    model, settled = network(path, preset=preset)
    if as_graph:
        side = size or (32 if settled.model.name == "isonet_cifar" else settled.data.image_size)
        graphs.write(model, (_channels(model), side, side), output)
        print(f"the graph of {path} for images of {side} x {side} written to {output}")
        return
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


def _channels(model: nn.Module) -> int:
    """The channels of the images: the input channels of the first convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{type(model).__name__} has no Conv2d to report on")
    return first.in_channels


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None, Path]:
    """The weights, the configuration that they were trained with (None if it is not known), and where they lie."""
    if path.is_dir() and path.suffix != ".dcp":
        path = next(iter(checkpoint.find(path, "best", "latest")), path / "latest.pt")
    contents, model = (None, None) if path.is_dir() else weights.read(path)
    if path.is_dir() or (isinstance(contents, Mapping) and _OURS <= contents.keys()):
        contents = checkpoint.load(path)
        return weights_in(contents, path), contents["config"], path
    return weights_in(contents, path), None if model is None else {"model": model}, path


def recognise(state: Mapping[str, Tensor], path: Path) -> Model:
    """Which network of this package a state_dict holds, by the names of its weights."""
    blocks = [len({name.split(".")[1] for name in state if name.startswith(f"s{n}.")}) for n in range(1, 5)]
    bottleneck, residual = "s1.b1.f.c.weight" in state, "s1.b1.f.shared_scalar.scale" in state
    for depth, published in BLOCKS.items():
        if tuple(blocks) == published and bottleneck == (depth in BOTTLENECK):
            return Model(f"{'r' if residual else ''}isonet{depth}")
    if blocks[0] and blocks == [blocks[0]] * 3 + [0] and not bottleneck:
        return Model("isonet_cifar", None, 6 * blocks[0] + 2, residual, len(state["stem.conv.weight"]))
    raise ValueError(
        f"{path} holds none of the networks of this package ({len(state)} weights, the first {next(iter(state))!r}); "
        "say which one with --config"
    )


def _ends(state: Mapping[str, Tensor], path: Path) -> tuple[int, int]:
    """The number of classes, and of the images' channels, by the shapes of the first and last weights."""
    stem, head = state.get("stem.conv.weight"), state.get("head.fc.weight")
    if stem is None or head is None or stem.dim() != 4 or head.dim() != 2:
        raise ValueError(
            f"{path} holds no network of this package: expected stem.conv.weight with 4 dimensions and head.fc.weight "
            f"with 2, found {few([f'{name} {tuple(value.shape)}' for name, value in state.items()])}"
        )
    return head.shape[0], stem.shape[1]
