"""What only S3 has: parts, presigned links, and ways to be unreachable."""

from __future__ import annotations

import hashlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import httpx
import pytest

from service.storage import StoreRefused, StoreUnavailable, multipart, open_store
from tests.servers import S3Server, free_ports


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of three parts, the last one short, no two alike."""
    path = tmp_path_factory.mktemp("large") / "model.safetensors"
    with path.open("wb") as file:
        for number in range(3):
            file.write(bytes([number]) * (multipart.PART_BYTES if number < 2 else 1000))
    return path


def test_a_file_of_several_parts_comes_back(s3: S3Server, s3_url: str, large: Path, tmp_path: Path) -> None:
    store = open_store(s3_url, **s3.options)

    stored = store.put_file("model", large)

    with large.open("rb") as file:
        assert stored.sha256 == hashlib.file_digest(file, "sha256").hexdigest()
    assert stored.size == large.stat().st_size == store.stat("model").size
    assert store.stat("model").version.strip('"').endswith("-3")
    store.download("model", tmp_path / "model")
    assert (tmp_path / "model").read_bytes() == large.read_bytes()
    border = multipart.PART_BYTES
    assert b"".join(store.read_range("model", border - 2, border + 2)) == b"\x00\x00\x01\x01"


def test_the_server_checks_the_sha256_of_every_part(
    s3: S3Server, s3_url: str, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url, **s3.options)
    true_sha256 = multipart.base64_sha256
    monkeypatch.setattr(multipart, "base64_sha256", lambda data: true_sha256(data + b"!"))

    with pytest.raises(StoreUnavailable, match=r"[Dd]igest|[Cc]hecksum|SHA256"):
        store.put_file("model", large)

    monkeypatch.undo()
    assert not store.exists("model")
    assert not _client(s3).list_multipart_uploads(Bucket=s3.bucket).get("Uploads")


def test_deleting_aborts_the_unfinished_uploads_of_the_folder(s3: S3Server, s3_url: str) -> None:
    client, prefix = _client(s3), urlsplit(s3_url).path.strip("/")
    names = {name: f"{prefix}/{name}" for name in ("jobs/1/a", "jobs/1/b/c", "jobs/10/a")}
    for name in names.values():
        begun = client.create_multipart_upload(Bucket=s3.bucket, Key=name)
        client.upload_part(Bucket=s3.bucket, Key=name, UploadId=begun["UploadId"], PartNumber=1, Body=b"x" * 1000)

    for _ in range(2):
        open_store(s3_url, **s3.options).delete_prefix("jobs/1")

    left = client.list_multipart_uploads(Bucket=s3.bucket, Prefix=prefix)["Uploads"]
    assert [upload["Key"] for upload in left] == [names["jobs/10/a"]]
    client.abort_multipart_upload(Bucket=s3.bucket, Key=left[0]["Key"], UploadId=left[0]["UploadId"])


def test_parts_grow_with_the_file() -> None:
    assert multipart.part_bytes(1) == multipart.PART_BYTES
    size = 5 << 40
    assert size / multipart.part_bytes(size) <= multipart.MAX_PARTS


def test_a_presigned_link_saves_the_file_under_its_name(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options)
    store.put_bytes("jobs/1/model.bin", b"abc")

    link = store.presigned_url("jobs/1/model.bin", expires_s=60, filename='mödel".bin')

    assert link is not None
    answer = httpx.get(link)
    assert (answer.status_code, answer.content) == (200, b"abc")
    assert answer.headers["content-disposition"] == (
        "attachment; filename=\"m_del_.bin\"; filename*=UTF-8''m%C3%B6del%22.bin"
    )
    assert httpx.get(link, headers={"Range": "bytes=1-1"}).content == b"b"
    assert httpx.get(link.replace("model.bin", "other.bin")).status_code == 403


def test_a_presigned_link_expires(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options)
    store.put_bytes("a", b"abc")
    link = store.presigned_url("a", expires_s=1, filename="a")
    assert link is not None

    time.sleep(2.1)

    assert httpx.get(link).status_code == 403


def test_a_presigned_link_names_the_address_that_clients_reach(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options | {"public_endpoint_url": "https://files.example.org"})

    link = store.presigned_url("a", expires_s=60, filename="a")
    store.put_bytes("a", b"through the inner address")

    assert link is not None
    assert urlsplit(link).netloc == "files.example.org"
    assert store.exists("a")


def test_many_threads_share_one_store(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options)
    together = threading.Barrier(8)

    def round_trip(number: int) -> bytes:
        together.wait()
        store.put_bytes(f"a/{number}", str(number).encode())
        return store.get_bytes(f"a/{number}")

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(round_trip, range(8)))

    assert found == [str(number).encode() for number in range(8)]


def test_more_objects_than_one_page_are_listed_and_deleted(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.put_bytes(f"a/{number:04}", b""), range(1005)))

    assert list(store.list_keys("a")) == [f"a/{number:04}" for number in range(1005)]
    store.delete_prefix("a")
    assert list(store.list_keys("a")) == []


def test_a_store_that_is_not_there_is_named() -> None:
    (port,) = free_ports(1)
    store = open_store(
        "s3://bucket/x",
        endpoint_url=f"http://127.0.0.1:{port}",
        region="us-east-1",
        access_key_id="k",
        secret_access_key="s",
    )

    with pytest.raises(
        StoreUnavailable, match=rf"bucket bucket at http://127.0.0.1:{port}.*check that it runs"
    ) as caught:
        store.check_writable()

    assert not isinstance(caught.value, StoreRefused)


def test_a_bucket_that_is_not_there_is_named(s3: S3Server) -> None:
    with pytest.raises(
        StoreRefused, match=r"bucket nowhere-to-be-found at .*NoSuchBucket.*check that the bucket exists"
    ):
        open_store("s3://nowhere-to-be-found/x", **s3.options).check_writable()


def test_a_wrong_secret_is_refused_without_being_shown(s3: S3Server, s3_url: str) -> None:
    store = open_store(s3_url, **s3.options | {"secret_access_key": "not-the-secret"})

    with pytest.raises(StoreRefused, match="credentials") as caught:
        store.check_writable()

    assert "not-the-secret" not in str(caught.value)


def test_missing_credentials_are_named(s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)

    with pytest.raises(StoreRefused, match="AWS_ACCESS_KEY_ID"):
        open_store(s3_url, endpoint_url=s3.endpoint_url, region=s3.region).check_writable()


def test_credentials_come_from_the_environment(s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)

    open_store(s3_url, endpoint_url=s3.endpoint_url).check_writable()


def _client(s3: S3Server):  # type: ignore[no-untyped-def]
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint_url,
        region_name=s3.region,
        aws_access_key_id=s3.access_key_id,
        aws_secret_access_key=s3.secret_access_key,
    )
