from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from service.sources.files import FolderFiles, HeldFiles
from service.sources.names import LocalPath
from service.sources.opening import open_file


def test_a_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with os.fdopen(open_file((tmp_path / "file").resolve())) as file:
        assert file.read() == "text"


@pytest.mark.parametrize("kind", ["link", "link on the way", "folder", "pipe", "device", "nothing"])
def test_anything_else_is_not_and_no_descriptor_is_left(tmp_path: Path, kind: str) -> None:
    folder = tmp_path.resolve()
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("secret")
    (folder / "link").symlink_to("inner/file")
    (folder / "way").symlink_to("inner")
    os.mkfifo(folder / "pipe")
    paths = {
        "link": folder / "link",
        "link on the way": folder / "way" / "file",
        "folder": folder / "inner",
        "pipe": folder / "pipe",
        "device": Path("/dev/zero"),
        "nothing": folder / "nothing",
    }
    before = os.listdir("/proc/self/fd")

    with pytest.raises(OSError, match=r"\[Errno"):
        open_file(paths[kind])
    assert os.listdir("/proc/self/fd") == before


def test_readers_of_a_held_file_have_places_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_bytes(b"0123456789")
    source = LocalPath((tmp_path / "source").resolve())
    with ExitStack() as opened:
        files = HeldFiles(FolderFiles(source, source.path), ["weights"], [], tmp_path / "held", opened)
        with files.open("weights") as first, files.open("weights") as second:
            assert (first.read(4), second.read(4), first.read(4)) == (b"0123", b"0123", b"4567")
