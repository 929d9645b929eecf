from __future__ import annotations

import os
from pathlib import Path

import pytest

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
