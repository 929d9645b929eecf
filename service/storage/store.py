"""The artifact store: files under keys, in a folder or an S3 bucket, behind one protocol."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import quote

from service.stopping import Check, go_on

MAX_KEY_LENGTH = 900
"""Bytes in UTF-8. S3 allows 1024; the rest is for the bucket's prefix."""
KEY_PART = re.compile(r"""[^\\/?#%*"<>|^`{}\[\]]+""")
"""What else is printed; of the others, some end a path in a URL, and S3 advises against the rest."""
UNSAFE_IN_FILENAME = re.compile(r"[^A-Za-z0-9_.=+@,() -]")
READ_BYTES = 1 << 20


class ObjectNotFound(Exception):
    """Nothing is stored under the key."""


class StoreUnavailable(Exception):
    """The store did not do what it was asked; the message says where it is and what to check."""


class StoreRefused(StoreUnavailable):
    """The store answers, but there is no such bucket or it is closed to us: waiting will not help."""


@dataclass(frozen=True)
class StoredObject:
    """A stored file: where it is, its bytes and their SHA-256 in hexadecimal."""

    uri: str
    size: int
    sha256: str


@dataclass(frozen=True)
class ObjectInfo:
    """Size in bytes, and a `version` that differs when the content does.

    `digest` is the content's digest if the store tells it: the algorithm as hashlib calls it, and hexadecimal.
    """

    size: int
    version: str
    digest: tuple[str, str] | None = None


class ArtifactStore(Protocol):
    """Keys are relative POSIX paths. Writes are atomic: a key has its old content or the new one, never a part.

    Every method raises StoreUnavailable when the store fails, and ValueError for a key that is none. What is wrong
    with a local file given to `put_file` or `download` is raised as OSError. One store serves many threads.

    What moves much data asks `check` at least once a megabyte; what that raises is raised when all that was begun is
    cleared away. A server that says nothing is waited for meanwhile.
    """

    def put_file(self, key: str, path: Path, check: Check = go_on) -> StoredObject:
        """Store a file, read once; large ones in parts."""
        ...

    def put_bytes(self, key: str, data: bytes, check: Check = go_on) -> StoredObject:
        """Store a small object."""
        ...

    def get_bytes(self, key: str, check: Check = go_on) -> bytes:
        """A small object's content. Raises: ObjectNotFound."""
        ...

    def download(self, key: str, path: Path, check: Check = go_on) -> None:
        """Copy an object to `path`, which appears only when it is whole. Raises: ObjectNotFound."""
        ...

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` up to but without `end`, as far as there are, in chunks.

        Raises: ObjectNotFound at the call, not at the first chunk.
        """
        ...

    def stat(self, key: str) -> ObjectInfo:
        """What is known of an object without reading it. Raises: ObjectNotFound."""
        ...

    def exists(self, key: str) -> bool:
        """Whether an object is stored under the key."""
        ...

    def uri(self, key: str) -> str:
        """Where the object is or would be: `s3://…` or `file:///…`."""
        ...

    def list_keys(self, prefix: str) -> Iterator[str]:
        """Every key below the folder `prefix`, in order; below the store's root for an empty prefix."""
        ...

    def delete_prefix(self, prefix: str) -> None:
        """Delete everything below the folder `prefix`, unfinished uploads too. May be done twice, or by two at once."""
        ...

    def abandon_uploads(self, *, before: datetime) -> int:
        """Delete what was written of objects whose writing began before a time and never ended; returns how many."""
        ...

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        """A link that downloads the object without credentials, or None where the gateway has to stream it."""
        ...

    def check_writable(self) -> None:
        """Write and delete a probe. Raises: StoreUnavailable."""
        ...

    def try_calls(self) -> list[str]:
        """Do with probes whatever the service does with a store. Returns what the store lacks and is done otherwise.

        Raises: StoreUnavailable that names the call.
        """
        ...


def job_prefix(job_id: str) -> str:
    """The folder of all that a job's stages leave."""
    return f"jobs/{job_id}"


def is_key(key: str) -> bool:
    """Whether a key is a relative path that stays below the store's root."""
    if not key.isprintable() or len(key.encode()) > MAX_KEY_LENGTH:
        return False
    return all(KEY_PART.fullmatch(part) and part.strip(".") for part in key.split("/"))


def checked_key(key: str) -> str:
    """The key, if it is one. Raises: ValueError."""
    if not is_key(key):
        raise ValueError(f"not a key of the artifact store: {key!r}")
    return key


def content_disposition(filename: str) -> str:
    """The header that saves a download as `filename`: ASCII for old clients, UTF-8 for the others (RFC 6266)."""
    plain = UNSAFE_IN_FILENAME.sub("_", filename) or "download"
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"
