"""Where artifacts are kept; the URL decides which store keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack
from urllib.parse import unquote, urlsplit

from service.storage.local import LocalStore
from service.storage.s3 import S3Options, S3Store
from service.storage.store import (
    ArtifactStore,
    ObjectInfo,
    ObjectNotFound,
    StoredObject,
    StoreRefused,
    StoreUnavailable,
    content_disposition,
    is_key,
    job_prefix,
)

__all__ = [
    "ArtifactStore",
    "ObjectInfo",
    "ObjectNotFound",
    "S3Options",
    "StoreRefused",
    "StoreUnavailable",
    "StoredObject",
    "content_disposition",
    "is_key",
    "job_prefix",
    "open_store",
]


def open_store(url: str, **s3: Unpack[S3Options]) -> ArtifactStore:
    """The store at `file:///folder` or `s3://bucket/prefix`; nothing is asked of it yet.

    Raises: ValueError for any other URL.
    """
    parts = urlsplit(url)
    if parts.query or parts.fragment:
        raise ValueError(f"{url!r} is not the address of an artifact store: it may carry neither `?` nor `#`")
    if parts.scheme == "file" and parts.path and parts.netloc in ("", "localhost"):
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(parts.netloc, parts.path, **s3)
    raise ValueError(f"{url!r} is not the address of an artifact store: give file:///folder or s3://bucket/prefix")
