"""Upload of one large file to S3 in parts, read once: each part carries its own SHA-256, the file's comes out."""

from __future__ import annotations

import base64
import hashlib
import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, BinaryIO

from boto3.exceptions import Boto3Error
from botocore.exceptions import BotoCoreError, ClientError

from service.stopping import Check, go_on, interrupt, reasons

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
SMALL_BYTES = 1 << 18
"""What is no longer is sent without a question in between."""
UPLOADS_AT_ONCE = 4


def part_bytes(size: int) -> int:
    """Size of the parts of a file of `size` bytes: 16 MiB, or as much more as S3's 10 000 parts ask for."""
    return max(PART_BYTES, -(-size // MAX_PARTS))


class _Body(io.BytesIO):
    """Bytes that are sent a few at a time, and `check` asked before each."""

    def __init__(self, data: bytes, check: Check) -> None:
        super().__init__(data)
        self._check = check

    def read(self, size: int | None = -1, /) -> bytes:
        interrupt(self._check)
        return super().read(size)


def body(data: bytes, check: Check) -> bytes | BinaryIO:
    """The body of a request that sends `data`; what `check` raises comes out of the request as Interrupted."""
    return data if len(data) <= SMALL_BYTES else _Body(data, check)


def upload(
    client: S3Client, bucket: str, name: str, file: BinaryIO, size: int, check: Check = go_on
) -> tuple[int, str]:
    """Upload `file` as the object `name`. Returns the bytes read and their SHA-256 in hexadecimal.

    At most UPLOADS_AT_ONCE + 1 parts are in memory. An upload that failed or was stopped is aborted, so that it costs
    nothing; parts on their way break off then.
    """
    made = client.create_multipart_upload(Bucket=bucket, Key=name, ChecksumAlgorithm="SHA256")
    upload_id = made["UploadId"]

    def send(number: int, data: bytes) -> CompletedPartTypeDef:
        checksum = base64_sha256(data)
        with reasons():
            sent = client.upload_part(
                Bucket=bucket,
                Key=name,
                UploadId=upload_id,
                PartNumber=number,
                Body=body(data, check),
                ChecksumSHA256=checksum,
            )
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": checksum}

    try:
        digest, read, parts = hashlib.sha256(), 0, []
        with ThreadPoolExecutor(UPLOADS_AT_ONCE) as pool:
            sending: deque[Future[CompletedPartTypeDef]] = deque()
            while data := file.read(part_bytes(size)):
                check()
                digest.update(data)
                read += len(data)
                if len(sending) == UPLOADS_AT_ONCE:
                    parts.append(sending.popleft().result())
                sending.append(pool.submit(send, len(parts) + len(sending) + 1, data))
            parts += [future.result() for future in sending]
        client.complete_multipart_upload(Bucket=bucket, Key=name, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except BaseException:
        # The first failure is the one to report; a lifecycle rule can clear what could not be aborted.
        with suppress(BotoCoreError, ClientError, Boto3Error):
            client.abort_multipart_upload(Bucket=bucket, Key=name, UploadId=upload_id)
        raise
    return read, digest.hexdigest()


def abort_uploads(client: S3Client, bucket: str, prefix: str, *, before: datetime | None = None) -> int:
    """Abort every unfinished upload of an object whose name begins with `prefix`; till then its parts cost money.

    With `before`, those that began before it. Returns how many were aborted.
    """
    pages = client.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix)
    found = [upload for page in pages for upload in page.get("Uploads", [])]
    aborted = 0
    for upload in found:
        if before is not None and upload["Initiated"] >= before:
            continue
        # One that was completed or aborted since it was listed is no longer there.
        with suppress(client.exceptions.NoSuchUpload):
            client.abort_multipart_upload(Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
            aborted += 1
    return aborted


def base64_sha256(data: bytes) -> str:
    """The SHA-256 as S3's headers carry it."""
    return base64.b64encode(hashlib.sha256(data).digest()).decode()
