"""The artifact store: files under keys, in a folder or an S3 bucket, behind one protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAX_KEY_LENGTH = 900
"""S3 allows 1024 bytes; the rest is for the bucket's prefix."""
KEY_PART = re.compile(r"[A-Za-z0-9_.=+@,() -]+")
READ_BYTES = 1 << 20


class ObjectNotFound(Exception):
    """Nothing is stored under the key."""


class StoreUnavailable(Exception):
    """The store did not do what it was asked; the message says where it is and what to check."""


@dataclass(frozen=True)
class StoredObject:
    """A stored file: where it is, its bytes and their SHA-256 in hexadecimal."""

    uri: str
    size: int
    sha256: str


class ArtifactStore(Protocol):
    """Keys are relative POSIX paths. Writes are atomic: a key has its old content or the new one, never a part.

    Every method raises StoreUnavailable when the store fails, and ValueError for a key that is none.
    """

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Store a file; large ones in parts."""
        ...

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """Store a small object."""
        ...

    def get_bytes(self, key: str) -> bytes:
        """A small object's content. Raises: ObjectNotFound."""
        ...

    def download(self, key: str, path: Path) -> None:
        """Copy an object to `path`, which appears only when it is whole. Raises: ObjectNotFound."""
        ...

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to but without `end`, in pieces. Raises: ObjectNotFound."""
        ...

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key below the folder `prefix`, in order."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Delete everything below the folder `prefix`."""
        ...

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        """A link that downloads the object without credentials, or None where the gateway has to stream it."""
        ...

    def check_writable(self) -> None:
        """Write and delete a probe."""
        ...


def checked_key(key: str) -> str:
    """The key, if it is a relative path that stays below the store's root. Raises: ValueError."""
    parts = key.split("/")
    if len(key) > MAX_KEY_LENGTH or not all(KEY_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise ValueError(f"not a key of the artifact store: {key!r}")
    return key
