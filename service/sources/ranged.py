"""An object of a bucket as a file that can be searched: what is read of it is fetched, and little besides."""

from __future__ import annotations

import io
import os
from typing import Any

from service.stopping import Check
from service.storage import ArtifactStore

FETCH_BYTES = 4 << 20
"""Of one request."""


class RangedFile(io.RawIOBase):
    """Of `size` bytes under `key`. Asks `check` before each request.

    Raises: what the store raises, StoreUnavailable and ObjectNotFound.
    """

    def __init__(self, store: ArtifactStore, key: str, size: int, check: Check) -> None:
        self._store, self._key, self._size, self._check = store, key, size, check
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._check()
        end = min(self._at + len(buffer), self._size)
        data = b"".join(self._store.read_range(self._key, self._at, end)) if end > self._at else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def ranged(store: ArtifactStore, key: str, size: int, check: Check) -> io.BufferedReader:
    """The object as a file that fetches `FETCH_BYTES` at a time. Raises: as `RangedFile`."""
    return io.BufferedReader(RangedFile(store, key, size, check), FETCH_BYTES)
