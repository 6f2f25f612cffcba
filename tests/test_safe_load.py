"""What a file is that is no checkpoint, said in words."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import pytest
import torch

from isonet_fast.safe_load import plain_names, read_checkpoint

NO_CHECKPOINTS = {
    "is empty": b"",
    "is a text file": b"hello, this is a text\n",
    "is a web page": b"<!DOCTYPE html><title>404</title>",
    "is a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
    "is an HDF5 file": b"\x89HDF\r\n\x1a\n",
    "is compressed by gzip": gzip.compress(b"x"),
    "begins as a pickle": pickle.dumps([1, 2])[:-1],
    "begins as a ZIP archive": b"PK\x03\x04" + bytes(100),
    "is neither a ZIP archive nor a pickle": bytes(range(1, 200)),
}


@pytest.mark.parametrize("words", NO_CHECKPOINTS)
def test_what_is_no_checkpoint_is_named(words: str, tmp_path: Path) -> None:
    path = tmp_path / "junk.pt"
    path.write_bytes(NO_CHECKPOINTS[words])
    with pytest.raises(ValueError, match=r"junk\.pt is .*no PyTorch checkpoint: it ") as error:
        read_checkpoint(path)
    assert words in str(error.value) and "Error" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("seed", range(40))
def test_random_bytes_are_named_too(seed: int, tmp_path: Path) -> None:
    """Whatever the pickle machine makes of them: numbers of a KeyError were shown once."""
    path = tmp_path / "junk.pt"
    start = b"\x80\x02" if seed % 2 else b""
    path.write_bytes(
        start + torch.randint(256, (50,), generator=torch.Generator().manual_seed(seed)).byte().numpy().tobytes()
    )
    with pytest.raises(ValueError, match=r"junk\.pt is (.*no PyTorch checkpoint: it |refused)"):
        read_checkpoint(path)


def test_a_prefix_is_taken_off_where_every_name_has_it() -> None:
    """A prefix goes only where every name has it."""
    assert plain_names(["module._orig_mod.a", "module.b._orig_mod.c"]) == {
        "module._orig_mod.a": "a",
        "module.b._orig_mod.c": "b.c",
    }
    assert plain_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    assert plain_names([]) == {}
