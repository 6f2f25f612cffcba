"""Files from elsewhere are data: whatever a checkpoint, configuration or data set holds, nothing of it is executed,
downloaded or unpacked.

Python itself reports what is done (an audit hook): a program started, a connection made, a file or directory made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

from isonet_fast.import_torchvision import import_torchvision
from isonet_fast.train.commands.cli import main
from isonet_fast.train.saving import checkpoint, sharded_checkpoint

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request", "http.client.connect", "os.mkdir",
    "os.symlink", "os.link", "os.chmod", "shutil.unpack_archive", "shutil.copyfile",
}  # fmt: skip
_seen: list[tuple[str, Any]] | None = None  # while watching


def _hook(event: str, arguments: Any) -> None:
    if _seen is not None and event in FORBIDDEN and "__pycache__" not in str(arguments):  # a module's first import
        _seen.append((event, arguments))


@pytest.fixture(scope="module", autouse=True)
def _hooked() -> None:
    import_torchvision()  # the import itself makes a directory of PyTorch's
    sys.addaudithook(_hook)  # cannot be taken away again: asleep outside of `watched`


@pytest.fixture
def watched() -> Iterator[list[tuple[str, Any]]]:
    global _seen
    _seen = []
    yield _seen
    _seen = None


def besides(run: Path, watched: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What was seen, except the making of the run's own directory."""
    return [event for event in watched if event[0] != "os.mkdir" or Path(event[1][0]) != run]


class Command:
    """Unpickled by a careless reader, it makes a directory through the shell."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"mkdir {self.target}",)


def ours(contents: dict, path: Path) -> None:
    """Write a checkpoint of ours with its right checksum and format."""
    checkpoint.save(contents, path)


def official(contents: dict, path: Path) -> None:
    torch.save({"net": {"module.a": torch.ones(1)}, "optim": contents}, path)


def old_format(contents: dict, path: Path) -> None:
    """Write a bare pickle, as PyTorch 1.4 wrote the published files."""
    torch.save({"net": contents}, path, _use_new_zipfile_serialization=False)


COMMANDS = {
    "resume": lambda path: ["train", "--resume", str(path.parent)],
    "evaluate": lambda path: ["evaluate", str(path), "--data", "digits"],
    "report": lambda path: ["report", str(path)],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("make", [ours, official, old_format])
def test_a_checkpoint_that_would_run_code(
    make: Callable, command: str, tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]
) -> None:
    path, owned = tmp_path / "latest.pt", tmp_path / "owned"
    make({"payload": Command(owned)}, path)
    if command == "resume" and make is not ours:
        reason = "latest.pt is damaged: it ends without its checksum"
    else:
        reason = "latest.pt is refused, nothing in it was run"
    watched.clear()
    assert main(COMMANDS[command](path)) == 1
    assert reason in capsys.readouterr().err
    assert not watched and not owned.exists()


def test_the_attack_is_real(tmp_path: Path, watched: list) -> None:
    """Read without care, the same file does run its command, and the watch sees it."""
    path, owned = tmp_path / "latest.pt", tmp_path / "owned"
    ours({"payload": Command(owned)}, path)
    torch.load(path, weights_only=False)
    assert owned.is_dir() and "os.system" in [event for event, _ in watched]


PYTHON_TAGS = [
    "!!python/object/apply:os.system ['mkdir {owned}']",
    "!!python/object/new:os.system ['mkdir {owned}']",
    "!!python/name:os.system",
    "!!python/module:antigravity",
]


@pytest.mark.parametrize("tag", PYTHON_TAGS)
@pytest.mark.parametrize("place", ["file", "setting"])
def test_a_configuration_that_would_run_code(
    place: str, tag: str, tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]
) -> None:
    owned = tmp_path / "owned"
    value = tag.format(owned=owned)
    (tmp_path / "config.yaml").write_text(f"model:\n  name: {value}\n")
    preset = str(tmp_path / "config.yaml") if place == "file" else "isonet_digits"
    words = [] if place == "file" else ["--set", f"model.depth={value}"]
    assert main(["train", "--config", preset, "--output", str(tmp_path / "run"), *words]) == 1
    assert "is no valid YAML: could not determine a constructor for the tag" in capsys.readouterr().err
    assert not watched and not owned.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.name=load_official", "model.name must be one of isonet18"),
        ("model.name=__import__", "model.name must be one of isonet18"),
        ("precision=load", "precision must be one of float32"),
        ("device='cpu; touch {owned}'", "device must be auto"),
        ("data.source=https://example.org/images.tar", "unknown data set 'https://example.org/images.tar'"),
        (
            "data.source=imagefolder:https://example.org/images",
            "No such file or directory: 'https:/example.org/images/val'",
        ),
        ("data.source=cifar10:https://example.org/cifar.tar.gz", "nothing is downloaded for you"),
        ("data.source=imagefolder:$(mkdir {owned})", "No such file or directory: '$(mkdir {owned})/val'"),
        ("data.source='imagefolder:x; mkdir {owned}'", "No such file or directory: 'x; mkdir {owned}/val'"),
        ("data.source=cifar10:`mkdir {owned}`", "/`mkdir {owned}`"),
        ("data.source='imagefolder:| mkdir {owned}'", "No such file or directory: '| mkdir {owned}/val'"),
    ],
)
@pytest.mark.parametrize("place", ["configuration", "checkpoint"])
def test_a_value_names_things_and_runs_nothing(
    place: str, setting: str, message: str, tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names are looked up among those allowed, paths are paths: typed on the command line or found in a checkpoint."""
    owned, run = tmp_path / "owned", tmp_path / "run"
    setting, message = setting.format(owned=owned), message.format(owned=owned)
    if place == "configuration":
        words = ["train", "--config", "isonet_digits", "--output", str(run), "--set", setting]
    else:
        key, _, value = setting.partition("=")
        sections: dict[str, Any] = {"data": {"source": "digits"}, "model": {}, "": {}}
        section, _, name = key.rpartition(".")
        sections[section][name] = value.strip("'")
        position = {"epoch": 1, "examples": 0, "step": 0, "best": -1.0}
        ours({"config": {**sections.pop(""), **sections}, "position": position}, run / "latest.pt")
        words = ["train", "--resume", str(run)]
    watched.clear()
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert not besides(run, watched) and not owned.exists()


@pytest.mark.parametrize("name", ["../escaped", "{outside}/escaped", "archive/../../escaped", "data/../../escaped"])
def test_an_archive_is_read_and_never_unpacked(
    name: str, tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]
) -> None:
    """A checkpoint is a ZIP archive. Members named to land elsewhere stay where they are."""
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    path = inside / "latest.pt"
    torch.save({"net": {"module.a": torch.ones(1)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name.format(outside=tmp_path), b"escaped")
    before = sorted(tmp_path.rglob("*"))
    watched.clear()
    assert main(["evaluate", str(path), "--data", "digits"]) == 1
    assert "latest.pt" in capsys.readouterr().err
    assert not watched and sorted(tmp_path.rglob("*")) == before


def test_archives_of_data_are_not_unpacked(tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]) -> None:
    """--data names a directory that you have unpacked; nothing in the package unpacks anything."""
    with zipfile.ZipFile(tmp_path / "cifar-10-python.zip", "w") as archive:
        archive.writestr("../escaped", b"x")
    for source in (f"cifar10:{tmp_path}", f"imagefolder:{tmp_path}/cifar-10-python.zip"):
        words = ["train", "--config", "isonet_digits", "--data", source, "--output", str(tmp_path / "run")]
        assert main(words) == 1
    assert "nothing is downloaded for you" in capsys.readouterr().err
    assert not besides(tmp_path / "run", watched) and os.listdir(tmp_path) == ["cifar-10-python.zip"]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
class Attribute:
    """Pickled as getattr(owner, name)."""

    def __init__(self, owner: type, name: str) -> None:
        self.reduced = getattr, (owner, name)

    def __reduce__(self) -> tuple:
        return self.reduced


def test_an_index_may_ask_for_members_of_its_enum_alone() -> None:
    """Python 3.11.0 to 3.11.3 pickles them by getattr, which would open every door."""
    enum = torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING
    load = lambda wanted: sharded_checkpoint._TensorsOnly(io.BytesIO(pickle.dumps(wanted))).load()
    assert load(Attribute(enum, "TORCH_CHANNELS_LAST")) is enum.TORCH_CHANNELS_LAST
    for owner, name in ((pathlib.PosixPath, "unlink"), (enum, "__init_subclass__"), (enum, "mro")):
        with pytest.raises(ValueError, match=f"refused, nothing in it was run: it asks for '{name}'"):
            load(Attribute(owner, name))


@pytest.mark.parametrize("place", ["../outside.distcp", "/etc/passwd", "inside/../../outside.distcp"])
def test_a_sharded_checkpoint_names_no_file_outside_of_it(
    place: str, tmp_path: Path, watched: list, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run" / "latest.dcp"
    torch.distributed.checkpoint.save({"model.a": torch.ones(3)}, checkpoint_id=path, no_dist=True)
    torch.save({"format": checkpoint.FORMAT, "model": {}, "optimizer": {"state": {}}}, path / "run.pt")
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for entry, stored in metadata.storage_data.items():
        metadata.storage_data[entry] = dataclasses.replace(stored, relative_path=place)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir()}
    (path / "manifest.json").write_text(json.dumps(digests))
    watched.clear()
    assert main(["train", "--resume", str(path.parent)]) == 1
    assert f"is refused: it says that tensors are in {place!r}, outside of it" in capsys.readouterr().err
    assert not watched
