"""Artifacts in a local folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from service.storage.store import READ_BYTES, ObjectNotFound, StoredObject, StoreUnavailable, checked_key


class LocalStore:
    """An ArtifactStore in the folder `root`. Writes go to a temporary name, are synced, and then renamed."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def put_file(self, key: str, path: Path) -> StoredObject:
        with path.open("rb") as source:
            return self._write(key, lambda: source.read(READ_BYTES))

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        pieces = iter([data])
        return self._write(key, lambda: next(pieces, b""))

    def get_bytes(self, key: str) -> bytes:
        with self._reading(key) as file:
            return file.read()

    def download(self, key: str, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        with self._reading(key) as source, partial.open("wb") as target:
            shutil.copyfileobj(source, target, READ_BYTES)
        partial.replace(path)

    def read_range(self, key: str, start: int, end: int) -> Iterator[bytes]:
        with self._reading(key) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(READ_BYTES, end - start))):
                start += len(piece)
                yield piece

    def list_keys(self, prefix: str) -> Iterator[str]:
        folder = self._path(prefix)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith(".pdtrim-"):
                yield path.relative_to(self._root).as_posix()

    def delete_prefix(self, prefix: str) -> None:
        with self._failures():
            shutil.rmtree(self._path(prefix), ignore_errors=False) if self._path(prefix).exists() else None

    def presigned_url(self, key: str, *, expires_s: int, filename: str) -> str | None:
        return None

    def check_writable(self) -> None:
        with self._failures():
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._root, prefix=".pdtrim-"):
                pass

    def _path(self, key: str) -> Path:
        path = self._root / checked_key(key)
        # A link placed inside the root must not lead out of it.
        if not path.parent.resolve().is_relative_to(self._root) or path.is_symlink():
            raise ValueError(f"not a key of the artifact store: {key!r} leads out of {self._root}")
        return path

    def _write(self, key: str, read: Callable[[], bytes]) -> StoredObject:
        path = self._path(key)
        digest, size = hashlib.sha256(), 0
        with self._failures():
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".pdtrim-")
            try:
                with os.fdopen(descriptor, "wb") as target:
                    while piece := read():
                        digest.update(piece)
                        size += len(piece)
                        target.write(piece)
                    target.flush()
                    os.fsync(target.fileno())
                os.chmod(name, 0o644)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
        return StoredObject(path.as_uri(), size, digest.hexdigest())

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._failures():
            try:
                file = path.open("rb")
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise ObjectNotFound(key) from None
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
