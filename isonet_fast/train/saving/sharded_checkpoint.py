"""Checkpoints of a run with sharded weights: a directory, written by all processes, each its own shards.

    NAME.dcp/   .metadata, *.distcp   weights and momentum, by torch.distributed.checkpoint
                run.pt                everything else of the run's state, by torch.save
                manifest.json         SHA-256 of each of these files

It is read as the state that a run of one process saves, with whole tensors. So any number of processes can resume the
run, sharded or not, and every command that takes a file takes the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import warnings
from collections.abc import Callable
from enum import EnumType
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...safe_load import read_checkpoint
from .files import Damaged, discard, disk_errors_naming, sync, temporary_beside

if TYPE_CHECKING:
    from ..distributed import Processes

_MANIFEST = "manifest.json"


def save(state: dict[str, Any], path: Path, processes: Processes, before: Callable[[], None]) -> None:
    """Write `state` so that `path` is always the old directory or the new one, whole. Every process must come here.

    before: called on rank 0 when everything is written, just before the new directory takes its name.
    """
    import torch.distributed.checkpoint as dcp  # imported here and below, because it takes seconds
    from torch.distributed.checkpoint.api import CheckpointException

    temporary = processes.from_main(lambda: _begin(path))
    rest, tensors = _take_apart(state)
    try:
        dcp.save(tensors, checkpoint_id=temporary)
    except CheckpointException as error:  # on every process, whichever it happened to
        if processes.main:
            discard(temporary)
        rank, (reason, _) = next(iter(error.failures.items()))
        raise OSError(f"{path} could not be written by rank {rank}: {reason}") from error
    processes.from_main(lambda: _finish(rest, temporary, path, before))


def _begin(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return temporary_beside(path)


def _finish(rest: dict[str, Any], temporary: Path, path: Path, before: Callable[[], None]) -> None:
    try:
        with disk_errors_naming(path):
            with open(temporary / "run.pt", "wb") as run:
                torch.save(rest, run)
            digests = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
            (temporary / _MANIFEST).write_text(json.dumps(digests, indent=1))
        for name in ("run.pt", _MANIFEST):  # the other files are on the disk already
            with open(temporary / name, "rb+") as file:
                os.fsync(file.fileno())
        sync(temporary)
        before()
        if path.exists():
            discard(path)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        discard(temporary)


def load(path: Path) -> dict[str, Any]:
    """The state in such a directory, in whole tensors on the CPU. Damaged where a file is not what was written."""
    import torch.distributed.checkpoint as dcp

    check(path)
    state = read_checkpoint(path / "run.pt")
    reader = _reader(path)
    metadata = reader.read_metadata()
    for place in metadata.storage_data.values():
        if os.path.basename(place.relative_path) != place.relative_path:
            raise ValueError(f"{path} is refused: it says that tensors are in {place.relative_path!r}, outside of it")
    stored = metadata.state_dict_metadata
    tensors = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in stored.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # about a single process that reads, which is meant
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return _put_together(state, tensors)


def check(path: Path) -> None:
    """Raise Damaged unless every file has the digest that the manifest says."""
    try:
        digests = json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Damaged(f"{path} is damaged: no readable {_MANIFEST} in it ({error})") from error
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise Damaged(f"{path} is damaged: {name} is missing")
        if _digest(file) != digest:
            raise Damaged(f"{path} is damaged: the checksum of {name} does not fit ({file.stat().st_size} bytes)")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _take_apart(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state without weights and momentum, and those by one name each."""
    optimizer = state["optimizer"]
    tensors = {f"model.{name}": value for name, value in state["model"].items()}
    others: dict[int, dict[str, Any]] = {}
    for index, values in optimizer["state"].items():
        others[index] = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
        tensors |= {f"optimizer.{index}.{key}": v for key, v in values.items() if isinstance(v, Tensor)}
    return {**state, "model": {}, "optimizer": {**optimizer, "state": others}}, tensors


def _put_together(rest: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    for name, value in tensors.items():
        part, _, key = name.partition(".")
        if part == "model":
            rest["model"][key] = value
        else:
            index, _, key = key.partition(".")
            rest["optimizer"]["state"][int(index)][key] = value
    return rest


def _reader(path: Path) -> Any:
    """PyTorch's own, but its pickled .metadata may name tensors and where they lie, and nothing that could run code."""
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(path / ".metadata", "rb") as file:
                return _TensorsOnly(file).load()

    return Reader(path)


class _TensorsOnly(pickle.Unpickler):
    # BytesStorageMetadata is left out: what it stands for would be unpickled without restriction
    _ALLOWED = frozenset(
        {
            *(("torch.distributed.checkpoint.metadata", name) for name in (
                "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
                "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
            )),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.serialization", "_get_layout"),
            ("torch", "Size"),
            ("torch", "float32"),
            ("pathlib", "PosixPath"),
            ("pathlib", "WindowsPath"),
            ("pathlib._local", "PosixPath"),
            ("pathlib._local", "WindowsPath"),
        }
    )  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickled a member of an enum
            return _member
        if (module, name) not in self._ALLOWED:
            raise ValueError(f"a sharded checkpoint is refused, nothing in it was run: it asks for {module}.{name}")
        return super().find_class(module, name)


def _member(enum: Any, name: str) -> Any:
    if not isinstance(enum, EnumType) or name not in enum.__members__:
        raise ValueError(f"a sharded checkpoint is refused, nothing in it was run: it asks for {name!r} of {enum!r}")
    return enum[name]
