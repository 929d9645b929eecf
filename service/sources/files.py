"""The files of one model, in a folder or below an S3 prefix, and what is told of them before they are read."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol, Unpack

from service.sources.errors import UnreadableSource
from service.sources.names import ModelSource, Permit, S3Location, anywhere
from service.sources.opening import DESCRIPTORS, open_file
from service.stopping import Check, go_on
from service.storage import ObjectNotFound, S3Options, StoreRefused, is_key, open_store
from service.storage.local import checked

if TYPE_CHECKING:
    from hashlib import _Hash


COPY_BYTES = 1 << 20


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
    """A model in a local folder. `permit` is asked of where each file really lies before it is opened.

    Raises: UnreadableSource, what `permit` raises.
    """

    def __init__(self, source: ModelSource, folder: Path, permit: Permit = anywhere) -> None:
        self.folder = folder
        self.source, self._permit = source, permit
        if not folder.is_dir():
            raise UnreadableSource(
                f"{self} is not a folder on this machine. Check the path, and that it is mounted here."
            )

    def __str__(self) -> str:
        return str(self.source)

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

    def open(self, name: str) -> BinaryIO:
        """A file as it is now: whatever becomes of its name, that one is read."""
        try:
            path = (self.folder / name).resolve()
            self._permit(path)
            return os.fdopen(open_file(path), "rb")
        except (OSError, RuntimeError) as error:
            # Python 3.11 reports a circle of links as RuntimeError.
            reason = error.strerror if isinstance(error, OSError) else "its links go round in a circle"
            raise UnreadableSource(f"{name} of {self} cannot be read: {reason}.") from error

    def size(self, name: str) -> int:
        with self.open(name) as file:
            return os.fstat(file.fileno()).st_size

    def read(self, name: str, limit: int) -> bytes:
        with self.open(name) as file:
            return file.read(limit)


class HeldFiles(FolderFiles):
    """A folder's files as they were when they were opened, in the folder `target`, until `opened` is closed.

    There they are links to this process's descriptors, so that whoever asks for a path gets what was opened; those in
    `copied` are copies. Where a system does not show descriptors as files, all are.
    """

    def __init__(
        self, files: FolderFiles, names: Sequence[str], copied: Sequence[str], target: Path, opened: ExitStack
    ) -> None:
        self._descriptors: dict[str, int] = {}
        for name in names:
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            with files.open(name) as file:
                if name in copied or not DESCRIPTORS.is_dir():
                    _copy(file, place)
                    continue
                descriptor = os.dup(file.fileno())
            opened.callback(os.close, descriptor)
            self._descriptors[name] = descriptor
            place.symlink_to(DESCRIPTORS / str(descriptor))
        super().__init__(files.source, target)

    def open(self, name: str) -> BinaryIO:
        if name not in self._descriptors:
            return super().open(name)
        # Opened anew, since duplicates of a descriptor share one place in the file.
        return (DESCRIPTORS / str(self._descriptors[name])).open("rb")


def _copy(file: BinaryIO, place: Path) -> None:
    """Copy what an open file has now; it may grow for ever."""
    left = os.fstat(file.fileno()).st_size
    with place.open("wb") as copy:
        while left > 0 and (chunk := file.read(min(left, COPY_BYTES))):
            copy.write(chunk)
            left -= len(chunk)


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
