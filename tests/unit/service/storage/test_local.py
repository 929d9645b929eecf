from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from service.storage import ObjectNotFound, StoreUnavailable
from service.storage.local import LocalStore


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


def test_links_do_not_lead_out_of_the_root(store: LocalStore, root: Path, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "secret").write_text("secret")
    root.mkdir()
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")

    for key in ("folder/secret", "file"):
        with pytest.raises(ValueError, match="leads out"):
            store.get_bytes(key)
        with pytest.raises(ValueError, match="leads out"):
            store.put_bytes(key, b"overwritten")
    with pytest.raises(ValueError, match="leads out"):
        store.delete_prefix("folder")
    assert list(store.list_keys("")) == []
    assert (outside / "secret").read_text() == "secret"


def test_a_failed_write_leaves_the_old_content_and_no_litter(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("a/b", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreUnavailable, match=r"No space left.*has space"):
        store.put_bytes("a/b", b"new")

    assert store.get_bytes("a/b") == b"old"
    assert [path.name for path in (root / "a").iterdir()] == ["b"]


def test_an_unfinished_file_is_no_object(store: LocalStore, root: Path) -> None:
    store.put_bytes("a/b", b"x")
    (root / "a" / ".pdtrim-1234").write_bytes(b"half")

    assert list(store.list_keys("a")) == ["a/b"]
    with pytest.raises(ValueError, match="unfinished"):
        store.get_bytes("a/.pdtrim-1234")


def test_a_folder_is_no_object(store: LocalStore) -> None:
    store.put_bytes("a/b", b"x")

    for read in (store.get_bytes, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectNotFound, match="nothing is stored"):
            read("a")
    store.delete_prefix("a/b")
    assert store.exists("a/b")


def test_readers_see_old_or_new_content_while_it_is_replaced(store: LocalStore) -> None:
    contents = {b"a" * 300_000, b"b" * 200_000}
    store.put_bytes("key", b"a" * 300_000)
    seen: set[bytes] = set()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add(store.get_bytes("key"))

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(20):
        for content in contents:
            store.put_bytes("key", content)
    stop.set()
    reader.join()

    assert seen <= contents


def test_a_root_that_is_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(StoreUnavailable, match=r"tmp|file.*check that it exists"):
        LocalStore(tmp_path / "file").check_writable()


def test_a_download_to_a_missing_folder_is_the_callers_error(store: LocalStore, tmp_path: Path) -> None:
    store.put_bytes("key", b"x")

    with pytest.raises(FileNotFoundError):
        store.download("key", tmp_path / "missing" / "key")


def test_the_gateway_has_to_stream_local_artifacts(store: LocalStore) -> None:
    assert store.presigned_url("key", expires_s=60, filename="key") is None
