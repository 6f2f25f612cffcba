"""replacing: a file is the whole former one or the whole new one, at every moment."""

import errno
import io
import os
import stat
import threading
from pathlib import Path

import pytest
import torch

from isonet_fast.train.saving.files import disk_errors_naming, replacing, sweep


def listing(directory):
    return sorted(p.name for p in directory.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "a" / "b" / "summary.json"  # directories are made
    with replacing(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and listing(path.parent) == ["summary.json"]


def test_the_former_file_is_there_until_then(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text("former")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "former"
    assert path.read_text() == "new" and listing(tmp_path) == ["summary.json"]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("bad"), KeyboardInterrupt()])
def test_a_failure_leaves_the_former_file_and_no_litter(tmp_path, error):
    path = tmp_path / "summary.json"
    path.write_text("former")
    with pytest.raises(type(error)) as raised, replacing(path) as temporary:
        temporary.write_text("hal")
        raise error
    assert raised.value is error
    assert path.read_text() == "former" and listing(tmp_path) == ["summary.json"]


def test_a_failure_without_a_former_file_leaves_nothing(tmp_path):
    with pytest.raises(OSError), replacing(tmp_path / "training.png") as temporary:
        temporary.write_bytes(b"hal")
        raise OSError
    assert listing(tmp_path) == []


def test_a_failing_rename_leaves_no_litter(tmp_path):
    path = tmp_path / "taken"
    (path / "inside").mkdir(parents=True)
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("new")
    assert listing(tmp_path) == ["taken"] and listing(path) == ["inside"]


@pytest.mark.skipif(os.name != "posix", reason="rights of files are POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_has_the_rights_of_any_new_file(tmp_path, umask):
    """Others may read it where they may read what `open` makes."""
    former = os.umask(umask)
    try:
        with replacing(tmp_path / "ours") as temporary:
            temporary.write_text("new")
        (tmp_path / "plain").write_text("new")
    finally:
        os.umask(former)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "plain")]
    assert modes[0] == modes[1] == 0o666 & ~umask


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path, both_open = tmp_path / "summary.json", threading.Barrier(2)

    def write(text):
        with replacing(path) as temporary:
            temporary.write_text(text[:2])
            both_open.wait(10)
            temporary.write_text(text)
            both_open.wait(10)

    texts = ["a" * 4096, "b" * 4096]
    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts and listing(tmp_path) == ["summary.json"]


def test_what_a_killed_writer_left_is_swept_up(tmp_path):
    writer = replacing(tmp_path / "latest.pt")
    temporary = writer.__enter__()  # and never ends
    temporary.write_text("hal")
    kept = [".hidden", ".notes-0123abcd.tmp", ".notes-0123abcd.tmp.txt", ".latest-mine1234.tmp.pt", "latest.pt"]
    for name in kept:
        (tmp_path / name).write_text("kept")
    sweep(tmp_path)
    assert listing(tmp_path) == sorted(kept)


class FullDisk(io.BytesIO):
    def write(self, content):
        if self.tell() > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(content)


def test_what_torch_save_makes_of_a_full_disk_is_an_error_of_the_disk():
    with pytest.raises(OSError, match="No space left on device: 'latest.pt'"), disk_errors_naming(Path("latest.pt")):
        torch.save({"weight": torch.zeros(1000)}, FullDisk())


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="not the disk"), disk_errors_naming(Path("latest.pt")):
        raise RuntimeError("not the disk")
