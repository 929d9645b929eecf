"""Artifacts in a local folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from service.stopping import Check, go_on
from service.storage.store import (
    READ_BYTES,
    ObjectInfo,
    ObjectNotFound,
    StoredObject,
    StoreUnavailable,
    checked_key,
)

PARTIAL = ".pdtrim-"
"""Begins the names of files that are still being written; no key has it."""
SYNC_BYTES = 64 << 20
"""A file is synced whenever it has grown by so much: all of it at the end would take as long as it is large."""


class LocalStore:
    """An ArtifactStore in the folder `root`. Writes go to a temporary name, are synced, and then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def put_file(self, key: str, path: Path, check: Check = go_on) -> StoredObject:
        with path.open("rb") as source:
            return self._write(key, checked(iter(lambda: source.read(READ_BYTES), b""), check))

    def put_bytes(self, key: str, data: bytes, check: Check = go_on) -> StoredObject:
        return self._write(key, checked([data], check))

    def get_bytes(self, key: str, check: Check = go_on) -> bytes:
        with self._reading(key) as file, self._failures():
            return b"".join(checked(iter(lambda: file.read(READ_BYTES), b""), check))

    def download(self, key: str, path: Path, check: Check = go_on) -> None:
        with self._reading(key) as source, written_whole(path) as target:
            for chunk in checked(iter(lambda: source.read(READ_BYTES), b""), check):
                target.write(chunk)

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        self.stat(key)
        return self._chunks(key, start, end)

    def _chunks(self, key: str, start: int, end: int) -> Iterator[bytes]:
        with self._reading(key) as file, self._failures():
            file.seek(start)
            while start < end and (chunk := file.read(min(READ_BYTES, end - start))):
                start += len(chunk)
                yield chunk

    def stat(self, key: str) -> ObjectInfo:
        path = self._path(key)
        with self._failures():
            if not path.is_file():
                raise ObjectNotFound(f"nothing is stored at {path.as_uri()}")
            found = path.stat()
        return ObjectInfo(found.st_size, f"{found.st_mtime_ns}-{found.st_ino}")

    def exists(self, key: str) -> bool:
        with suppress(ObjectNotFound):
            self.stat(key)
            return True
        return False

    def uri(self, key: str) -> str:
        return self._path(key).as_uri()

    def list_keys(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix) if prefix else self._root
        found = []
        with self._failures():
            # os.walk stays out of linked folders; a linked file is no object either.
            for parent, _, names in os.walk(folder, onerror=self._unless_missing):
                paths = (Path(parent, name) for name in names if not name.startswith(PARTIAL))
                found += [path.relative_to(self._root).as_posix() for path in paths if not path.is_symlink()]
        return iter(sorted(found))

    def delete_prefix(self, prefix: str) -> None:
        folder = self._path(prefix)
        with self._failures():
            while folder.is_dir():
                # Another process that deletes here too makes rmtree stumble over what it no longer finds.
                with suppress(FileNotFoundError):
                    shutil.rmtree(folder)

    def abandon_uploads(self, *, before: datetime) -> int:
        abandoned = 0
        with self._failures():
            for parent, _, names in os.walk(self._root, onerror=self._unless_missing):
                for path in (Path(parent, name) for name in names if name.startswith(PARTIAL)):
                    with suppress(FileNotFoundError):  # It has just become whole.
                        if path.stat().st_mtime < before.timestamp():
                            path.unlink()
                            abandoned += 1
        return abandoned

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        return None

    def check_writable(self) -> None:
        with self._failures():
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._root, prefix=PARTIAL) as probe:
                probe.write(b"probe")

    def try_calls(self) -> list[str]:
        self.check_writable()
        return []

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        if any(part.startswith(PARTIAL) for part in key.split("/")):
            raise ValueError(f"not a key of the artifact store: {key!r} is the name of an unfinished file")
        # A link placed inside the root must not lead out of it.
        if not path.parent.resolve().is_relative_to(self._root) or path.is_symlink():
            raise ValueError(f"not a key of the artifact store: {key!r} leads out of {self._root}")
        return path

    def _write(self, key: str, chunks: Iterable[bytes]) -> StoredObject:
        path = self._path(key)
        digest, size = hashlib.sha256(), 0
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as target:
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    target.write(chunk)
                    if size // SYNC_BYTES > (size - len(chunk)) // SYNC_BYTES:
                        sync(target)
                sync(target)
            _sync_folder(path.parent)
        return StoredObject(path.as_uri(), size, digest.hexdigest())

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._failures():
            try:
                file = path.open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise ObjectNotFound(f"nothing is stored at {path.as_uri()}") from None
        with file:
            yield file

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreUnavailable(
                f"the artifact folder {self._root} failed: {error}; check that it exists, is writable and has space"
            ) from error

    def _unless_missing(self, error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name `path` when the block ends, and is deleted when the block raises."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=PARTIAL)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def checked(chunks: Iterable[bytes], check: Check) -> Iterator[bytes]:
    """The chunks, and `check` asked before each."""
    for chunk in chunks:
        check()
        yield chunk


def sync(file: BinaryIO) -> None:
    """Make what was written last through a power cut."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
