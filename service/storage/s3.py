"""Artifacts in a bucket of S3 or of anything that speaks its protocol."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
)
from botocore.response import StreamingBody

from service.stopping import Check, go_on, reasons
from service.storage import multipart
from service.storage.store import (
    READ_BYTES,
    ObjectInfo,
    ObjectNotFound,
    StoredObject,
    StoreRefused,
    StoreUnavailable,
    checked_key,
    content_disposition,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

DOWNLOAD = TransferConfig(
    multipart_threshold=multipart.PART_BYTES, multipart_chunksize=multipart.PART_BYTES, max_concurrency=4
)
DELETED_AT_ONCE = 1000
PROBE = b"probe"
MD5_ETAG = re.compile(r'"([0-9a-f]{32})"')
MISSING = {"NoSuchKey", "404", "NotFound"}
REFUSED = {
    "403",
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "InvalidAccessKeyId",
    "InvalidBucketName",
    "NoSuchBucket",
    "PermanentRedirect",
    "SignatureDoesNotMatch",
}


log = logging.getLogger(__name__)


class S3Options(TypedDict, total=False):
    """How to reach S3. What is absent or None is what boto3 finds: `AWS_*` variables, profiles, instance roles."""

    endpoint_url: str | None
    """For S3-compatible stores other than AWS."""
    public_endpoint_url: str | None
    """The same store as clients outside reach it; presigned links name it. By default `endpoint_url`."""
    region: str | None
    access_key_id: str | None
    secret_access_key: str | None
    session_token: str | None
    answer_seconds: float
    """How long an answer is waited for, twice; by default a minute, five times."""


def s3_client(**options: Unpack[S3Options]) -> S3Client:
    """A client with bounded waits and retries, for any number of threads. It connects when it is first used."""
    endpoint_url, answer_seconds = options.get("endpoint_url"), options.get("answer_seconds")
    # A session of its own, because boto3's default one may not be used by two threads at once.
    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint_url,
        region_name=options.get("region"),
        aws_access_key_id=options.get("access_key_id"),
        aws_secret_access_key=options.get("secret_access_key"),
        aws_session_token=options.get("session_token"),
        config=Config(
            retries={"mode": "standard", "total_max_attempts": 2 if answer_seconds else 5},
            connect_timeout=min(5, answer_seconds or 5),
            read_timeout=answer_seconds or 60,
            max_pool_connections=32,
            signature_version="s3v4",
            # Every upload names its SHA-256; boto3's own default of CRCs in trailers many compatible stores refuse. Of
            # what comes, some send the whole object's checksum with a part of it; we hold digests against it ourselves.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            # Bucket names as host names need DNS that a store of one's own rarely has.
            s3={"addressing_style": "path" if endpoint_url else "auto"},
        ),
    )


class S3Store:
    """An ArtifactStore in `bucket` below `prefix`."""

    def __init__(self, bucket: str, prefix: str, **options: Unpack[S3Options]) -> None:
        self._bucket = bucket
        self._prefix = prefix.strip("/")
        self._deletes_many = self._lists_uploads = True
        self._client = self._signer = s3_client(**options)
        if public_endpoint_url := options.get("public_endpoint_url"):
            outside = options.copy()
            outside["endpoint_url"] = public_endpoint_url
            self._signer = s3_client(**outside)

    def put_file(self, key: str, path: Path, check: Check = go_on) -> StoredObject:
        name = self._name(key)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= multipart.PART_BYTES:
                return self.put_bytes(key, file.read(), check)
            with self._failures(key):
                read, sha256 = multipart.upload(self._client, self._bucket, name, file, size, check)
        return StoredObject(self.uri(key), read, sha256)

    def put_bytes(self, key: str, data: bytes, check: Check = go_on) -> StoredObject:
        checksum, body = multipart.base64_sha256(data), multipart.body(data, check)
        with self._failures(key), reasons():
            self._client.put_object(Bucket=self._bucket, Key=self._name(key), Body=body, ChecksumSHA256=checksum)
        return StoredObject(self.uri(key), len(data), hashlib.sha256(data).hexdigest())

    def get_bytes(self, key: str, check: Check = go_on) -> bytes:
        data = bytearray()
        with self._failures(key):
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key))["Body"]
        for chunk in self._chunks(key, body):
            check()
            data += chunk
        return bytes(data)

    def download(self, key: str, path: Path, check: Check = go_on) -> None:
        # boto3 downloads to a temporary name in the same folder and renames it, or deletes it when `check` raises.
        with self._failures(key):
            self._client.download_file(
                self._bucket, self._name(key), str(path), Config=DOWNLOAD, Callback=lambda size: check()
            )

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        if start >= min(end, self.stat(key).size):
            return iter(())
        with self._failures(key):
            wanted = f"bytes={start}-{end - 1}"
            body = self._client.get_object(Bucket=self._bucket, Key=self._name(key), Range=wanted)["Body"]
        return self._chunks(key, body)

    def _chunks(self, key: str, body: StreamingBody) -> Iterator[bytes]:
        with closing(body), self._failures(key):
            yield from body.iter_chunks(READ_BYTES)

    def stat(self, key: str) -> ObjectInfo:
        with self._failures(key):
            found = self._client.head_object(Bucket=self._bucket, Key=self._name(key), ChecksumMode="ENABLED")
        return ObjectInfo(found["ContentLength"], found["ETag"], _digest(found))

    def exists(self, key: str) -> bool:
        with suppress(ObjectNotFound):
            self.stat(key)
            return True
        return False

    def uri(self, key: str) -> str:
        return f"s3://{self._bucket}/{self._name(key)}"

    def list_keys(self, prefix: str) -> Iterator[str]:
        root = f"{self._prefix}/" if self._prefix else ""
        folder = f"{root}{checked_key(prefix)}/" if prefix else root
        found: list[str] = []
        with self._failures(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=folder)
            for page in pages:
                # Consoles make folders visible as empty objects whose names end in a slash.
                names = (entry["Key"] for entry in page.get("Contents", []) if not entry["Key"].endswith("/"))
                found += [name.removeprefix(root) for name in names]
        # Not every store lists in the order of its keys.
        return iter(sorted(found))

    def delete_prefix(self, prefix: str) -> None:
        folder = f"{self._name(prefix)}/"
        with self._failures(prefix):
            # Uploads first: one that is completed between the two steps is then an object that is deleted.
            self._abort_uploads(folder)
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=folder)
            names = [entry["Key"] for page in pages for entry in page.get("Contents", [])]
        for start in range(0, len(names), DELETED_AT_ONCE):
            self._delete(prefix, names[start : start + DELETED_AT_ONCE])

    def _delete(self, prefix: str, names: Sequence[str]) -> None:
        """Delete objects together where the store can, which not all can, and some only with another checksum."""
        with self._failures(prefix):
            if self._deletes_many:
                try:
                    answer = self._client.delete_objects(
                        Bucket=self._bucket, Delete={"Objects": [{"Key": name} for name in names], "Quiet": True}
                    )
                except ClientError as error:
                    if not _is_not_understood(error):
                        raise
                    log.warning(
                        "%s cannot delete many objects at once, so each is deleted alone: %s", self._where, error
                    )
                    self._deletes_many = False
                else:
                    if errors := answer.get("Errors"):
                        first = errors[0]
                        raise StoreUnavailable(f"{self._where} did not delete {len(errors)} objects, first: {first}")
                    return
            for name in names:
                self._client.delete_object(Bucket=self._bucket, Key=name)

    def abandon_uploads(self, *, before: datetime) -> int:
        with self._failures(""):
            return self._abort_uploads(f"{self._prefix}/" if self._prefix else "", before=before)

    def _abort_uploads(self, folder: str, *, before: datetime | None = None) -> int:
        """Abort unfinished uploads, where the store tells of them; returns how many. Raises: ClientError."""
        if not self._lists_uploads:
            return 0
        try:
            return multipart.abort_uploads(self._client, self._bucket, folder, before=before)
        except ClientError as error:
            if not _is_not_understood(error):
                raise
            log.warning("%s does not list unfinished uploads; have a rule of it delete them: %s", self._where, error)
            self._lists_uploads = False
            return 0

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        params = {
            "Bucket": self._bucket,
            "Key": self._name(key),
            "ResponseContentDisposition": content_disposition(filename),
        }
        with self._failures(key):
            return self._signer.generate_presigned_url("get_object", Params=params, ExpiresIn=expires_s)

    def check_writable(self) -> None:
        probe = f"probes/{uuid.uuid4().hex}"
        self.put_bytes(probe, b"probe")
        with self._failures(probe):
            self._client.delete_object(Bucket=self._bucket, Key=self._name(probe))

    def try_calls(self) -> list[str]:
        folder = f"probes/{uuid.uuid4().hex}"
        calls: dict[str, Callable[[], object]] = {
            "PutObject": lambda: self.put_bytes(f"{folder}/a", PROBE),
            "multipart upload": lambda: self._upload_probe(f"{folder}/b"),
            "HeadObject": lambda: self._expect(self.stat(f"{folder}/a").size, len(PROBE)),
            "GetObject": lambda: self._expect(self.get_bytes(f"{folder}/b"), PROBE),
            "GetObject with a range": lambda: self._expect(b"".join(self.read_range(f"{folder}/a", 1, 3)), PROBE[1:3]),
            "ListObjectsV2": lambda: self._expect(list(self.list_keys(folder)), [f"{folder}/a", f"{folder}/b"]),
            "a presigned link": lambda: self.presigned_url(f"{folder}/a", expires_s=60, filename="a"),
            "ListMultipartUploads and DeleteObjects, or DeleteObject": lambda: self.delete_prefix(folder),
            "ListObjectsV2 after that": lambda: self._expect(list(self.list_keys(folder)), []),
        }
        for name, call in calls.items():
            try:
                call()
            except (StoreUnavailable, ObjectNotFound) as error:
                raise StoreUnavailable(f"{name}: {error}") from error
        lacking = {
            "DeleteObjects: objects are deleted one by one": self._deletes_many,
            "ListMultipartUploads: have a rule of the store delete unfinished uploads": self._lists_uploads,
        }
        return [what for what, there in lacking.items() if not there]

    def _upload_probe(self, key: str) -> None:
        with self._failures(key):
            multipart.upload(self._client, self._bucket, self._name(key), io.BytesIO(PROBE), len(PROBE))

    def _expect(self, found: object, expected: object) -> None:
        if found != expected:
            raise StoreUnavailable(f"{self._where} gave {found!r}, not {expected!r}")

    def _name(self, key: str) -> str:
        return f"{self._prefix}/{checked_key(key)}" if self._prefix else checked_key(key)

    @property
    def _where(self) -> str:
        return f"bucket {self._bucket} at {self._client.meta.endpoint_url}"

    @contextmanager
    def _failures(self, key: str) -> Iterator[None]:
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError, ParamValidationError) as error:
            raise self._refused(error) from error
        except ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            if code in MISSING:
                raise ObjectNotFound(f"nothing is stored under {key!r} in {self._where}") from error
            raise (self._refused(error) if code in REFUSED else self._unavailable(error)) from error
        except (BotoCoreError, Boto3Error) as error:
            raise self._unavailable(error) from error

    def _refused(self, error: Exception) -> StoreRefused:
        return StoreRefused(
            f"{self._where} refused: {error}; check that the bucket exists, its name and region, and that the "
            "credentials (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or a role) may read and write it"
        )

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(f"{self._where} failed: {error}; check that it runs and that its endpoint URL is right")


def _is_not_understood(error: ClientError) -> bool:
    """Whether a store has no such call, or wants it otherwise; what is forbidden, missing or too much is not meant."""
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = error.response.get("Error", {}).get("Code", "")
    return status in (400, 405, 411, 501) and code not in REFUSED


def _digest(found: HeadObjectOutputTypeDef) -> tuple[str, str] | None:
    """The digest of a whole object: its SHA-256, else the MD5 that an ETag is unless it was uploaded in parts.

    What was uploaded in parts has a digest of the parts' digests, which ends in a dash and their number. With a key
    of KMS or of the client's own, an ETag is no MD5.
    (https://docs.aws.amazon.com/AmazonS3/latest/API/API_Object.html)
    """
    sha256 = found.get("ChecksumSHA256", "")
    if sha256 and "-" not in sha256:
        return "sha256", base64.b64decode(sha256).hex()
    encrypted = found.get("ServerSideEncryption", "").startswith("aws:kms") or "SSECustomerAlgorithm" in found
    md5 = None if encrypted else MD5_ETAG.fullmatch(found["ETag"])
    return None if md5 is None else ("md5", md5[1])
