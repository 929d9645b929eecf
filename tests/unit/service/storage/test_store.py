from __future__ import annotations

from pathlib import Path

import pytest

from service.storage import content_disposition, open_store
from service.storage.store import MAX_KEY_LENGTH, checked_key


@pytest.mark.parametrize(
    "key",
    [
        "manifest.json",
        "jobs/job_1/export/2/decode/model-00001-of-00002.safetensors",
        "a b/c+d=(e),@f",
        "..a/b..",
        "a:b/~c&d",
        "ä/日本/e\u0301",
    ],
)
def test_relative_paths_are_keys(key: str) -> None:
    assert checked_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "a/",
        "a//b",
        ".",
        "..",
        "../a",
        "a/../b",
        "a/./b",
        "a\\b",
        "a\x00b",
        "a\nb",
        "a?b",
        "a%2Fb",
        "a\u202eb",
        "\ud800",
        "é" * (MAX_KEY_LENGTH // 2 + 1),
        "a" * (MAX_KEY_LENGTH + 1),
    ],
)
def test_what_is_no_relative_path_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        checked_key(key)


@pytest.mark.parametrize(
    "url",
    ["", "artifacts", "/artifacts", "file://host/artifacts", "http://bucket/x", "s3:///x", "s3://b/x?y", "s3://b/x#y"],
)
def test_open_store_refuses_other_urls(url: str) -> None:
    with pytest.raises(ValueError, match=r"file:///folder or s3://bucket/prefix|neither"):
        open_store(url)


def test_open_store_decodes_a_file_url(tmp_path: Path) -> None:
    folder = tmp_path / "with space"

    stored = open_store(folder.as_uri()).put_bytes("a", b"x")

    assert (folder / "a").read_bytes() == b"x"
    assert stored.uri == (folder / "a").as_uri()


def test_a_filename_cannot_break_out_of_its_header() -> None:
    header = content_disposition('a"; x="\r\nSet-Cookie: é.json')

    assert header == (
        'attachment; filename="a__ x=___Set-Cookie_ _.json"; '
        "filename*=UTF-8''a%22%3B%20x%3D%22%0D%0ASet-Cookie%3A%20%C3%A9.json"
    )
