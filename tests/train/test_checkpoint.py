"""Checkpoint files: whole or absent, checked, with the one before to fall back on; and nothing in them is executed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from isonet_fast.train.saving import checkpoint


def state(n: int) -> dict:
    return {"step": n, "weights": torch.full((1000,), float(n)), "nested": {"list": [1, 2.5, None, "x"]}}


def test_round_trip_and_plain_torch_load(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(1), path)
    for contents in (checkpoint.load(path), torch.load(path, weights_only=True), torch.load(path, mmap=True)):
        assert contents["nested"] == state(1)["nested"] and torch.equal(contents["weights"], state(1)["weights"])
    assert os.listdir(tmp_path) == ["a.pt"]


def test_latest_keeps_the_previous_one(tmp_path: Path) -> None:
    for n in (1, 2, 3):
        checkpoint.save(state(n), tmp_path / "latest.pt")
    assert sorted(os.listdir(tmp_path)) == ["latest.pt", "previous.pt"]
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 3
    assert checkpoint.load(tmp_path / "previous.pt")["step"] == 2


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "tail"])
def test_a_damaged_latest_falls_back_and_says_so(tmp_path: Path, damage: str) -> None:
    for n in (1, 2):
        checkpoint.save(state(n), tmp_path / "latest.pt")
    latest = tmp_path / "latest.pt"
    content = bytearray(latest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    latest.write_bytes({"flip": content, "cut": content[:1000], "empty": b"", "tail": content[:-1]}[damage])
    said: list[str] = []
    contents, path = checkpoint.load_latest(tmp_path, said.append)
    assert contents["step"] == 1 and path == tmp_path / "previous.pt"
    assert len(said) == 1 and "latest.pt is damaged" in said[0] and f"falling back to {path}" in said[0]


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    checkpoint.save(state(1), path)
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(checkpoint.Damaged):
            checkpoint.check(path)


def test_two_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    for n in (1, 2):
        checkpoint.save(state(n), tmp_path / "latest.pt")
    for name in ("latest.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(checkpoint.Damaged, match=r"previous\.pt is damaged"):
        checkpoint.load_latest(tmp_path, lambda text: None)


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in (1, 2):
        checkpoint.save(state(n), tmp_path / "latest.pt")
    os.replace(tmp_path / "latest.pt", tmp_path / "previous.pt")
    contents, path = checkpoint.load_latest(tmp_path)
    assert contents["step"] == 2 and path.name == "previous.pt"


def test_a_full_disk_while_writing_costs_nothing(tmp_path: Path) -> None:
    """The kernel refuses the second half of the file, as it does on a full disk."""
    resource = pytest.importorskip("resource")
    checkpoint.save(state(1), tmp_path / "latest.pt")
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "latest.pt").stat().st_size // 2, former[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*latest\.pt'"):
            checkpoint.save(state(2), tmp_path / "latest.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)
    assert os.listdir(tmp_path) == ["latest.pt"]
    assert checkpoint.load(tmp_path / "latest.pt")["step"] == 1


def test_a_damaged_latest_never_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for n in (1, 2):
        checkpoint.save(state(n), tmp_path / "latest.pt")
    (tmp_path / "latest.pt").write_bytes(b"PK")
    checkpoint.save(state(3), tmp_path / "latest.pt")
    assert [checkpoint.load(tmp_path / name)["step"] for name in ("latest.pt", "previous.pt")] == [3, 1]


class Malicious:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.target,)


def test_a_malicious_pickle_with_a_right_checksum(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    checkpoint.save({"payload": Malicious(str(tmp_path / "owned"))}, path)
    with pytest.raises(ValueError, match=r"bad\.pt is refused, nothing in it was run"):
        checkpoint.load(path)
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoint.save({**state(1), "format": 99}, tmp_path / "new.pt")
    with pytest.raises(ValueError, match="format 99, expected 2"):
        checkpoint.load(tmp_path / "new.pt")


def test_a_directory_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither latest\.pt nor previous\.pt"):
        checkpoint.load_latest(tmp_path)
