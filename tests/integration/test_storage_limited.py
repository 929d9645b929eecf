"""Stores that speak a part of S3's protocol: a proxy that refuses calls, in front of a real server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import boto3
import pytest
from typer.testing import CliRunner

from pdtrim.command import app
from service.sources import fetch_model
from service.storage import ArtifactStore, open_store
from tests.s3_limited import LimitedStore, limited_store
from tests.servers import S3Server
from tests.weights import safetensors_file

KINDS = {
    "Content-MD5 wanted": {"delete_objects": (400, "MissingContentMD5"), "list_uploads": (501, "NotImplemented")},
    "no such calls": {"delete_objects": (501, "NotImplemented"), "list_uploads": (405, "MethodNotAllowed")},
    "other arguments": {"delete_objects": (400, "InvalidArgument"), "list_uploads": (400, "InvalidArgument")},
}


@pytest.fixture(params=KINDS)
def limited(s3: S3Server, request: pytest.FixtureRequest) -> Iterator[LimitedStore]:
    with limited_store(s3.endpoint_url, **KINDS[request.param]) as running:
        yield running


@pytest.fixture
def store(s3: S3Server, s3_url: str, limited: LimitedStore) -> ArtifactStore:
    return open_store(s3_url, **s3.options | {"endpoint_url": limited.url})


def test_what_is_deleted_is_gone(store: ArtifactStore, limited: LimitedStore) -> None:
    for number in range(3):
        store.put_bytes(f"jobs/a/{number}", b"x")
    store.put_bytes("jobs/b", b"x")

    store.delete_prefix("jobs/a")

    assert list(store.list_keys("")) == ["jobs/b"]
    assert set(limited.refused) == {"DeleteObjects", "ListMultipartUploads"}
    store.delete_prefix("jobs/a")
    assert len(limited.refused) == 2  # It is not asked again and again.


def test_uploads_that_it_does_not_list_are_left_to_its_rules(store: ArtifactStore) -> None:
    assert store.abandon_uploads(before=datetime.now(UTC)) == 0


def test_a_part_comes_though_the_checksum_is_that_of_the_whole(store: ArtifactStore, tmp_path: Path) -> None:
    data = bytes(range(256)) * (20 << 12)  # Large enough that it is downloaded in parts.
    (tmp_path / "there").write_bytes(data)
    store.put_file("large", tmp_path / "there")

    assert b"".join(store.read_range("large", 10, 20)) == data[10:20]
    store.download("large", tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == data


def test_a_model_is_fetched_from_it(
    s3: S3Server, s3_url: str, store: ArtifactStore, limited: LimitedStore, tmp_path: Path
) -> None:
    weights = safetensors_file("a", "b", size=1 << 20)
    store.put_bytes("config.json", b'{"model_type": "llama"}')
    store.put_bytes("model.safetensors", weights)

    folder = fetch_model(s3_url, None, tmp_path / "model", **s3.options | {"endpoint_url": limited.url})

    assert (folder / "model.safetensors").read_bytes() == weights


def test_doctor_says_what_it_lacks(s3: S3Server, s3_url: str, limited: LimitedStore, tmp_path: Path) -> None:
    named = {
        "PDTRIM_DATA_DIR": str(tmp_path),
        "PDTRIM_ARTIFACTS_URL": s3_url,
        "PDTRIM_S3_ENDPOINT_URL": limited.url,
        "PDTRIM_S3_REGION": s3.region,
    }
    done = CliRunner().invoke(app, ["doctor"], env=named | s3.environment)

    told = " ".join(done.output.split())
    assert "It lacks DeleteObjects: objects are deleted one by one; ListMultipartUploads" in told
    assert list(open_store(s3_url, **s3.options).list_keys("probes")) == []


def test_keys_with_letters_and_signs_of_any_kind_are_read(s3: S3Server, s3_url: str, tmp_path: Path) -> None:
    options = s3.options
    client = boto3.client(
        "s3",
        endpoint_url=options["endpoint_url"],
        region_name=options["region"],
        aws_access_key_id=options["access_key_id"],
        aws_secret_access_key=options["secret_access_key"],
    )
    folder = s3_url.removeprefix(f"s3://{s3.bucket}/") + "/a:b/~c&d/ä 日本"
    weights = safetensors_file("a", "b")
    for name, data in (("config.json", b'{"model_type": "llama"}'), ("model.safetensors", weights)):
        client.put_object(Bucket=s3.bucket, Key=f"{folder}/{name}", Body=data)

    fetched = fetch_model(f"s3://{s3.bucket}/{folder}", None, tmp_path / "model", **options)

    assert (fetched / "model.safetensors").read_bytes() == weights
