"""Artifacts in a bucket of S3 or of anything that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

from service.storage.store import READ_BYTES, ObjectNotFound, StoredObject, StoreUnavailable, checked_key

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

PART_BYTES = 16 << 20
TRANSFER = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=4)
MISSING = {"NoSuchKey", "404", "NotFound"}


def s3_client(*, endpoint_url: str | None, region: str | None) -> S3Client:
    """A client with bounded waits and retries; credentials come from the environment as boto3 finds them."""
    return boto3.client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=region,
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 5},
            connect_timeout=5,
            read_timeout=60,
            signature_version="s3v4",
            # Bucket names as host names need DNS that a store of one's own rarely has.
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        ),
    )


class S3Store:
    """An ArtifactStore in `bucket` below `prefix`."""

    def __init__(self, client: S3Client, bucket: str, prefix: str) -> None:
        self._client = client
        self._bucket = bucket
        self._prefix = prefix.strip("/")

    def put_file(self, key: str, path: Path) -> StoredObject:
        name = self._name(key)
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        extra = {"Metadata": {"sha256": sha256}, "ChecksumAlgorithm": "SHA256"}
        with self._failures():
            self._client.upload_file(str(path), self._bucket, name, ExtraArgs=extra, Config=TRANSFER)
        return StoredObject(self._uri(name), path.stat().st_size, sha256)

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        name, digest = self._name(key), hashlib.sha256(data)
        with self._failures():
            self._client.put_object(
                Bucket=self._bucket,
                Key=name,
                Body=data,
                ChecksumSHA256=base64.b64encode(digest.digest()).decode(),
                Metadata={"sha256": digest.hexdigest()},
            )
        return StoredObject(self._uri(name), len(data), digest.hexdigest())

    def get_bytes(self, key: str) -> bytes:
        with self._failures():
            return self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"].read()

    def download(self, key: str, path: Path) -> None:
        # boto3 downloads to a temporary name in the same folder and renames it.
        with self._failures():
            self._client.download_file(self._bucket, self._name(key), str(path), Config=TRANSFER)

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        if end <= start:
            return
        with self._failures():
            wanted = f"bytes={start}-{end - 1}"
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range=wanted)["Body"]
            yield from body.iter_chunks(READ_BYTES)

    def list_keys(self, prefix: str) -> Iterator[str]:
        skipped = len(self._prefix) + 1 if self._prefix else 0
        with self._failures():
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=f"{self._name(prefix)}/"
            )
            for page in pages:
                for entry in page.get("Contents", []):
                    yield entry["Key"][skipped:]

    def delete_prefix(self, prefix: str) -> None:
        for key in list(self.list_keys(prefix)):
            with self._failures():
                self._client.delete_object(Bucket=self._bucket, Key=self._name(key))

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        disposition = f"attachment; filename*=UTF-8''{quote(filename, safe='')}"
        params = {"Bucket": self._bucket, "Key": self._name(key), "ResponseContentDisposition": disposition}
        with self._failures():
            return self._client.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)

    def check_writable(self) -> None:
        probe = f"probes/{uuid.uuid4().hex}"
        self.put_bytes(probe, b"probe")
        with self._failures():
            self._client.delete_object(Bucket=self._bucket, Key=self._name(probe))

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    def _uri(self, name: str) -> str:
        return f"s3://{self._bucket}/{name}"

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in MISSING:
                raise ObjectNotFound(str(error)) from error
            raise self._unavailable(error) from error
        except (BotoCoreError, HTTPClientError, Boto3Error) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        where = f"bucket {self._bucket} at {self._client.meta.endpoint_url}"
        return StoreUnavailable(
            f"the artifact store ({where}) failed: {error}; check PDTRIM_ARTIFACTS_URL and the S3 settings"
        )
