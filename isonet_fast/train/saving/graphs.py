"""Files of a network as a graph, for those who do not have this package: NAME.onnx, and NAME.pt2 of torch.export.

The graph holds standard operators only, takes batches of any size (N, C, H, W) of one image size, and returns logits
(N, classes), as in evaluation.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from .files import disk_errors_naming, replacing

SUFFIXES = (".onnx", ".pt2")
_MARK = "isonet_fast.export"  # in the metadata of a file of `write`


def write(model: nn.Module, images: tuple[int, int, int], path: Path) -> None:
    """Write the graph of `model` for images (C, H, W), whole or not at all, in the format of the path's suffix."""
    check_target(path)
    batch = torch.zeros(2, *images)
    was_training = model.training
    try:
        exported = torch.export.export(model.eval(), (batch,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    finally:
        model.train(was_training)
    contents = _onnx(exported, batch) if path.suffix == ".onnx" else _pt2(exported)
    with replacing(path) as temporary, disk_errors_naming(path):
        temporary.write_bytes(contents)


def check_target(path: Path) -> None:
    """ValueError for a file that is there and was not written by `write`; ModuleNotFoundError without ONNX."""
    if path.suffix == ".onnx":
        for name in ("onnx", "onnxscript"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                message = f".onnx files need the package {name}: pip install 'isonet_fast[export]'"
                raise ModuleNotFoundError(message) from error
    if path.is_file() and _MARK.encode() not in path.read_bytes():
        raise ValueError(f"{path} is there already and is no exported file: choose another name, or remove it")


def _pt2(exported: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(exported, buffer, extra_files={_MARK: ""})
    return buffer.getvalue()


def _onnx(exported: torch.export.ExportedProgram, batch: torch.Tensor) -> bytes:
    with _quiet():
        program = torch.onnx.export(
            exported, (batch,), dynamo=True, input_names=["images"], output_names=["logits"], verbose=False
        )
    assert program is not None
    program.model.metadata_props[_MARK] = ""
    return program.model_proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporter's notes on operators of torchvision."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
