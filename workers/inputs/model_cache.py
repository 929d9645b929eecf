"""The models that this worker's disk keeps of those that were fetched: bounded, the least recently used go first.

Each lies in a folder `NAME`, beside a file `NAME.lock` that says how many bytes it has when it is whole, and whose time
is when it was used last. Whoever uses a model holds that file by `flock`, as do others in other processes; the kernel
lets go when a process dies. What somebody holds is never deleted.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from service.stopping import Check

LOCK = ".lock"
ROOM_LOCK = ".room"
"""Held while room is made, so that two workers do not count on the same bytes."""
ROOM_POLL_S = 0.2
DISK_SHARE = 0.5
"""Of the disk, that models take where no setting says otherwise."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelCache:
    """The models below a folder."""

    folder: Path
    max_bytes: int | None
    """That they take together at most, but for those in use; by default half of the disk."""

    @contextmanager
    def using(self, name: str) -> Iterator[Path]:
        """The folder of the model `name`, there or not, which nobody deletes meanwhile."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _held(self._lock(name), fcntl.LOCK_SH) as lock:
            os.utime(lock.fileno())
            try:
                yield self.folder / name
            finally:
                os.utime(lock.fileno())

    def make_room(self, name: str, size: int, check: Check) -> None:
        """Delete what was used least recently until the model `name`, of `size` bytes, has room beside the others.

        Where all others are in use, it is fetched all the same. Raises: what `check` raises.
        """
        with FileLock(self.folder / ROOM_LOCK).acquire(cancel_check=partial(_asked, check), poll_interval=ROOM_POLL_S):
            self._lock(name).write_text(str(size))
            taken = {other: self._size(other) for other in self._others(name)}
            disk = shutil.disk_usage(self.folder)
            most = int(DISK_SHARE * disk.total) if self.max_bytes is None else self.max_bytes
            missing = max(0, size - _bytes_in(self.folder / name))
            over = max(sum(taken.values()) + size - most, missing - disk.free)
            for other in sorted(taken, key=self._used_at):
                if over <= 0:
                    return
                check()
                if self._delete(other):
                    over -= taken[other]
                    log.info("deleted %s, the model used least recently, for another", self.folder / other)
            if over > 0:
                log.warning("models in use take %d bytes more than they may", over)

    def _lock(self, name: str) -> Path:
        return self.folder / f"{name}{LOCK}"

    def _others(self, name: str) -> list[str]:
        return [path.name for path in self.folder.iterdir() if path.is_dir() and path.name != name]

    def _size(self, name: str) -> int:
        """When the model is whole, which another worker may be at work on."""
        with suppress(OSError, ValueError):
            return int(self._lock(name).read_text())
        return _bytes_in(self.folder / name)

    def _used_at(self, name: str) -> float:
        """A version that kept no such file left the folder's time alone."""
        for path in (self._lock(name), self.folder / name):
            with suppress(OSError):
                return path.stat().st_mtime
        return 0.0

    def _delete(self, name: str) -> bool:
        """Unless it is in use."""
        lock = self._lock(name)
        try:
            with _held(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(self.folder / name)
                lock.unlink()
        except BlockingIOError:
            return False
        return True


@contextmanager
def _held(path: Path, how: int) -> Iterator[BinaryIO]:
    """A file that is there, and locked. Raises: BlockingIOError where that would take waiting and `how` says not to."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, how)
            if _is_at(file, path):
                yield file
                return


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still the one there: somebody may have deleted it, and others have locked a new one."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _bytes_in(folder: Path) -> int:
    """Of the files there; of those that vanish meanwhile, none."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.lstat().st_size
    return total


def _asked(check: Check) -> bool:
    check()
    return False
