"""Fetches a model's files into a folder: whole or not at all, checked, and going on where a killed process stopped.

What has come of a file lies beside its place under a name that tells the file's version; only a whole file whose bytes
have the digest that its source declared gets its own name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from service.sources.errors import UnreadableSource
from service.sources.files import Declared, RemoteFiles
from service.stopping import Check, go_on
from service.storage import StoreRefused, StoreUnavailable
from service.storage.local import PARTIAL, sync, written_whole

RECORD = f"{PARTIAL}fetched.json"
"""Which version of each file lies in the folder."""
LOCK = f"{PARTIAL}lock"
PART_BYTES = 32 << 20
PARTS_AT_ONCE = 4
"""So that many parts, at most, are in memory."""
READ_BYTES = 1 << 20
RETRY_PAUSES_S = (0.5, 2.0)
LOCK_POLL_S = 0.2
log = logging.getLogger(__name__)


def fetch(files: RemoteFiles, names: Sequence[str], target: Path, check: Check = go_on) -> None:
    """Download files into `target`, one process at a time; those fetched before and unchanged since stay.

    Asks `check` all the while. Raises: UnreadableSource; StoreUnavailable for what may pass, and what `check` raises:
    what has come by then is kept.
    """
    target.mkdir(parents=True, exist_ok=True)
    # Another worker may be fetching the same model for hours.
    with FileLock(target / LOCK).acquire(cancel_check=partial(_asked, check), poll_interval=LOCK_POLL_S):
        record = target / RECORD
        fetched: dict[str, str] = json.loads(record.read_bytes()) if record.exists() else {}
        for name in sorted(fetched.keys() - set(names)):
            (target / name).unlink(missing_ok=True)
            del fetched[name]
        for name in names:
            declared = files.declared(name)
            if fetched.get(name) != declared.version or not _has_size(target / name, declared.size):
                _fetch_file(files, name, declared, target / name, check)
                fetched[name] = declared.version
            with written_whole(record) as file:
                file.write(json.dumps(fetched, indent=2, sort_keys=True).encode())


def _asked(check: Check) -> bool:
    check()
    return False


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _fetch_file(files: RemoteFiles, name: str, declared: Declared, path: Path, check: Check) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path, declared)
    digest = declared.digest
    hasher = digest.hasher() if digest else hashlib.sha256()
    with part.open("a+b") as file:
        start = _taken_over(file, declared.size, hasher, check)
        if start:
            log.info("%s of %s goes on at byte %d of %d", name, files, start, declared.size)
        for data in _parts(files, name, start, declared.size, check):
            file.write(data)
            hasher.update(data)
            sync(file)
    if digest is not None and hasher.hexdigest() != digest.expected:
        part.unlink()
        raise StoreUnavailable(
            f"{name} of {files} arrived damaged: its {hasher.name} is {hasher.hexdigest()}, but {digest.expected} was "
            "declared. It is fetched anew; if that does not help, upload it again"
        )
    if files.declared(name).version != declared.version:
        part.unlink()
        raise UnreadableSource(f"{name} of {files} changed while it was fetched. Submit the job again.")
    os.replace(part, path)


def _part_of(path: Path, declared: Declared) -> Path:
    """Where a file grows; what came of its other versions is deleted."""
    stem = f"{PARTIAL}part-{hashlib.sha256(path.name.encode()).hexdigest()[:16]}-"
    part = path.with_name(stem + hashlib.sha256(f"{declared.size} {declared.version}".encode()).hexdigest()[:16])
    for other in path.parent.glob(f"{stem}*"):
        if other != part:
            other.unlink(missing_ok=True)
    return part


def _taken_over(file: BinaryIO, size: int, hasher: hashlib._Hash, check: Check) -> int:
    """How much of a file of `size` bytes has come before; it is hashed, and the position is behind it."""
    if file.seek(0, os.SEEK_END) > size:
        file.truncate(0)
    file.seek(0)
    while data := file.read(READ_BYTES):
        check()
        hasher.update(data)
    return file.tell()


def _parts(files: RemoteFiles, name: str, start: int, size: int, check: Check) -> Iterator[bytes]:
    """A file's bytes from `start` on, in order; the next parts are on their way meanwhile."""
    with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
        coming: deque[Future[bytes]] = deque()
        try:
            for begin in range(start, size, PART_BYTES):
                coming.append(pool.submit(_read, files, name, begin, min(begin + PART_BYTES, size), check))
                if len(coming) == PARTS_AT_ONCE:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for future in coming:
                future.cancel()


def _read(files: RemoteFiles, name: str, start: int, stop: int, check: Check) -> bytes:
    for pause_s in RETRY_PAUSES_S:
        try:
            return files.read_range(name, start, stop, check)
        except StoreRefused:
            raise
        except StoreUnavailable as error:
            log.warning("%s of %s broke off, trying again: %s", name, files, error)
            time.sleep(pause_s)
            check()
    return files.read_range(name, start, stop, check)
