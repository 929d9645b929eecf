"""What every artifact store does, on a folder and on a real S3 server."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from service.storage import ArtifactStore, ObjectNotFound, open_store
from service.storage.s3 import s3_client
from tests.servers import S3Server

ABC = hashlib.sha256(b"abc").hexdigest()


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return (tmp_path / "artifacts").as_uri()
    address: str = request.getfixturevalue("s3_url")
    return address


@pytest.fixture
def store(request: pytest.FixtureRequest, url: str) -> ArtifactStore:
    if url.startswith("file"):
        return open_store(url)
    server: S3Server = request.getfixturevalue("s3")
    return open_store(url, **server.options)


def test_bytes_come_back(store: ArtifactStore, url: str) -> None:
    stored = store.put_bytes("a/b.json", b"abc")

    assert (stored.uri, stored.size, stored.sha256) == (f"{url}/a/b.json", 3, ABC)
    assert store.uri("a/b.json") == stored.uri
    assert store.get_bytes("a/b.json") == b"abc"


def test_files_come_back_byte_for_byte(store: ArtifactStore, tmp_path: Path) -> None:
    (source := tmp_path / "source").write_bytes(content := bytes(range(256)) * 5000)

    stored = store.put_file("a/b", source)
    store.download("a/b", tmp_path / "target")

    assert (stored.size, stored.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert (tmp_path / "target").read_bytes() == content


def test_an_empty_file_is_an_object(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()

    assert store.put_file("a", tmp_path / "empty").size == 0

    assert store.get_bytes("a") == b""
    assert list(store.read_range("a", 0, 10)) == []


def test_a_missing_source_file_is_the_callers_error(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put_file("a", tmp_path / "missing")


@pytest.mark.parametrize(
    ("start", "end"), [(0, 10), (0, 1), (3, 7), (9, 10), (5, 5), (7, 3), (8, 99), (10, 11), (99, 100)]
)
def test_a_range_is_a_slice(store: ArtifactStore, start: int, end: int) -> None:
    store.put_bytes("a", b"0123456789")

    assert b"".join(store.read_range("a", start, end)) == b"0123456789"[start:end]


def test_what_is_not_there_is_not_found(store: ArtifactStore, tmp_path: Path) -> None:
    for read in (store.get_bytes, store.stat, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(ObjectNotFound, match="missing"):
            read("a/missing")
    with pytest.raises(ObjectNotFound, match="missing"):
        store.download("a/missing", tmp_path / "target")
    assert not store.exists("a/missing")
    assert list(tmp_path.glob("*target*")) == []


def test_a_version_changes_with_the_content(store: ArtifactStore) -> None:
    store.put_bytes("a", b"abc")
    first, again = store.stat("a"), store.stat("a")
    store.put_bytes("a", b"abd")

    assert first == again
    assert first.size == store.stat("a").size == 3
    assert first.version != store.stat("a").version


def test_listing_and_deleting_stop_at_the_folder(store: ArtifactStore) -> None:
    for key in ("jobs/1/b", "jobs/1/a/x", "jobs/10/a", "jobs/1.json"):
        store.put_bytes(key, b"x")

    assert list(store.list_keys("jobs/1")) == ["jobs/1/a/x", "jobs/1/b"]
    assert list(store.list_keys("")) == ["jobs/1.json", "jobs/1/a/x", "jobs/1/b", "jobs/10/a"]
    store.delete_prefix("jobs/1")
    assert list(store.list_keys("jobs")) == ["jobs/1.json", "jobs/10/a"]
    assert store.exists("jobs/10/a")


def test_deleting_nothing_is_no_error(store: ArtifactStore) -> None:
    store.delete_prefix("jobs/none")

    assert list(store.list_keys("jobs/none")) == []


def test_everything_cannot_be_deleted_at_once(store: ArtifactStore) -> None:
    with pytest.raises(ValueError, match="not a key"):
        store.delete_prefix("")


def test_writing_that_never_ended_is_given_up_when_it_is_old(
    request: pytest.FixtureRequest, store: ArtifactStore, url: str, tmp_path: Path
) -> None:
    store.put_bytes("a/whole", b"abc")
    if url.startswith("file"):
        (tmp_path / "artifacts" / "a" / ".pdtrim-half").write_bytes(b"ab")
    else:
        server: S3Server = request.getfixturevalue("s3")
        prefix = url.removeprefix(f"s3://{server.bucket}/")
        s3_client(**server.options).create_multipart_upload(Bucket=server.bucket, Key=f"{prefix}/a/half")

    moment = datetime.now(UTC)
    assert store.abandon_uploads(before=moment - timedelta(hours=1)) == 0
    assert store.abandon_uploads(before=moment + timedelta(hours=1)) == 1
    assert store.abandon_uploads(before=moment + timedelta(hours=1)) == 0
    assert store.get_bytes("a/whole") == b"abc"


def test_a_probe_leaves_nothing(store: ArtifactStore) -> None:
    store.check_writable()

    assert list(store.list_keys("")) == []
