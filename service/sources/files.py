"""The files of one model, in a folder or below an S3 prefix, and what is told of them before they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Unpack

from service.sources.errors import UnreadableSource
from service.sources.names import ModelSource, S3Location
from service.stopping import Check, go_on
from service.storage import ObjectNotFound, S3Options, StoreRefused, is_key, open_store
from service.storage.local import checked

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True)
class Digest:
    """What a file's bytes should come to: `hasher` begins the computation, `expected` is its hexadecimal result."""

    hasher: Callable[[], _Hash]
    expected: str


@dataclass(frozen=True)
class Declared:
    """What a source says of a file: its bytes, a version that differs when they do, their digest if it has one."""

    size: int
    version: str
    digest: Digest | None = None


class ModelFiles(Protocol):
    """One model's files, wherever they are; `str()` names it in messages. Raises: SourceError, StoreUnavailable."""

    def names(self) -> Sequence[str]: ...

    def size(self, name: str) -> int: ...

    def read(self, name: str, limit: int) -> bytes:
        """The first `limit` bytes of a file."""
        ...


class RemoteFiles(ModelFiles, Protocol):
    """The files of a model that has to be fetched."""

    def declared(self, name: str) -> Declared: ...

    def read_range(self, name: str, start: int, stop: int, check: Check = go_on) -> bytes:
        """The bytes from `start` up to, without, `stop`: all of them, or it raises. Asks `check` as they come."""
        ...


class FolderFiles:
    """A model in a local folder. Raises: UnreadableSource."""

    def __init__(self, source: ModelSource, folder: Path) -> None:
        self.folder = folder
        self._source = source
        if not folder.is_dir():
            raise UnreadableSource(
                f"{self} is not a folder on this machine. Check the path, and that it is mounted here."
            )

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> list[str]:
        try:
            return sorted(
                path.relative_to(self.folder).as_posix()
                for pattern in ("*", "additional_chat_templates/*")
                for path in self.folder.glob(pattern)
                if path.is_file()
            )
        except OSError as error:
            raise UnreadableSource(f"{self} cannot be listed: {error.strerror}.") from error

    def size(self, name: str) -> int:
        return (self.folder / name).stat().st_size

    def read(self, name: str, limit: int) -> bytes:
        try:
            with (self.folder / name).open("rb") as file:
                return file.read(limit)
        except OSError as error:
            raise UnreadableSource(f"{name} of {self} cannot be read: {error.strerror}.") from error


class BucketFiles:
    """A model below an S3 prefix. Raises: UnreadableSource, StoreUnavailable."""

    def __init__(self, source: S3Location, **s3: Unpack[S3Options]) -> None:
        self._source = source
        self._store = open_store(str(source), **s3)
        try:
            # What the service could not name in a request to S3 is none of a model's files.
            self._names = [name for name in self._store.list_keys("") if name.count("/") <= 1 and is_key(name)]
        except StoreRefused as error:
            raise UnreadableSource(f"{self} cannot be listed: {error}") from error

    def __str__(self) -> str:
        return str(self._source)

    def names(self) -> list[str]:
        return self._names

    def size(self, name: str) -> int:
        return self.declared(name).size

    def declared(self, name: str) -> Declared:
        try:
            found = self._store.stat(name)
        except (ObjectNotFound, StoreRefused) as error:
            raise self._unreadable(name, error) from error
        if found.digest is None:
            return Declared(found.size, found.version)
        algorithm, expected = found.digest
        return Declared(found.size, found.version, Digest(lambda: hashlib.new(algorithm), expected))

    def read(self, name: str, limit: int) -> bytes:
        try:
            return b"".join(self._store.read_range(name, 0, limit))
        except (ObjectNotFound, StoreRefused) as error:
            raise self._unreadable(name, error) from error

    def read_range(self, name: str, start: int, stop: int, check: Check = go_on) -> bytes:
        try:
            data = b"".join(checked(self._store.read_range(name, start, stop), check))
        except (ObjectNotFound, StoreRefused) as error:
            raise self._unreadable(name, error) from error
        if len(data) != stop - start:
            raise UnreadableSource(f"{name} of {self} changed while it was fetched: it became shorter.")
        return data

    def _unreadable(self, name: str, error: Exception) -> UnreadableSource:
        return UnreadableSource(f"{name} of {self} cannot be read: {error}")
