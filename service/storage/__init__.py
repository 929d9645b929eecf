"""Where artifacts are kept; the URL decides which store keeps them."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from service.storage.local import LocalStore
from service.storage.s3 import S3Store, s3_client
from service.storage.store import ArtifactStore, ObjectNotFound, StoredObject, StoreUnavailable

__all__ = ["ArtifactStore", "ObjectNotFound", "StoreUnavailable", "StoredObject", "open_store"]


def open_store(url: str, *, endpoint_url: str | None = None, region: str | None = None) -> ArtifactStore:
    """The store at `file:///folder` or `s3://bucket/prefix`. Raises: ValueError for any other URL."""
    parts = urlsplit(url)
    if parts.scheme == "file" and parts.path and parts.netloc in ("", "localhost"):
        return LocalStore(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        return S3Store(s3_client(endpoint_url=endpoint_url, region=region), parts.netloc, parts.path)
    raise ValueError(f"PDTRIM_ARTIFACTS_URL is {url!r}; it must be file:///folder or s3://bucket/prefix")
