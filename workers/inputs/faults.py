"""Which faults may pass, and how long a worker waits in the middle of a stage for one to pass."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tenacity import RetryCallState, Retrying
from tenacity.retry import retry_if_exception
from tenacity.stop import stop_after_delay
from tenacity.wait import wait_random_exponential

from service.db.session import DATABASE_FAULTS
from service.stopping import Answer, Check, go_on, interruptible
from service.storage import ArtifactStore, StoredObject, StoreRefused, StoreUnavailable

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
MAX_PAUSE_S = 10.0
log = logging.getLogger(__name__)


class CorruptArtifact(Exception):
    """An input's bytes are not those that the stage before recorded."""


class ProcessDied(Exception):
    """A process that worked for a stage was killed."""


def may_pass(error: BaseException) -> bool:
    """Whether the same stage may fare better later, or on another machine."""
    if isinstance(error, StoreRefused):
        return False
    return isinstance(error, (StoreUnavailable, CorruptArtifact, ProcessDied, *DATABASE_FAULTS)) or _no_space(error)


def _no_space(error: BaseException) -> bool:
    """Whether a disk is full; safetensors and PyTorch say so in words alone."""
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        return True
    return any(f"os error {number}" in str(error) for number in NO_SPACE) or "No space left on device" in str(error)


def patient(seconds: float, check: Check = go_on) -> Retrying:
    """Calls a function until it works, for so many seconds; between two tries it calls `check`, which may raise.

    What is not a fault of database or store that may pass is raised at once, and the last fault when the time is over.
    """

    def sleep(pause_s: float) -> None:
        time.sleep(pause_s)
        check()

    return Retrying(
        retry=retry_if_exception(lambda error: may_pass(error) and not _no_space(error)),
        wait=wait_random_exponential(multiplier=0.2, max=MAX_PAUSE_S),
        stop=stop_after_delay(seconds),
        sleep=sleep,
        before_sleep=_log,
        reraise=True,
    )


def _log(state: RetryCallState) -> None:
    assert state.outcome is not None
    if state.attempt_number == 1:
        log.warning("%s; trying again for a while", state.outcome.exception())


class PatientStore:
    """What stages use of an artifact store, each call repeated while the store is away, until `check` raises."""

    def __init__(self, store: ArtifactStore, seconds: float, check: Check) -> None:
        self._store = store
        self._retrying = patient(seconds, check)
        self._check = check

    def put_file(self, key: str, path: Path) -> StoredObject:
        """As of the store."""
        return self._until_stopped(partial(self._store.put_file, key, path, self._check))

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """As of the store."""
        return self._until_stopped(partial(self._store.put_bytes, key, data, self._check))

    def get_bytes(self, key: str) -> bytes:
        """As of the store."""
        return self._until_stopped(partial(self._store.get_bytes, key, self._check))

    def download(self, key: str, path: Path) -> None:
        """As of the store."""
        self._until_stopped(partial(self._store.download, key, path, self._check))

    def _until_stopped(self, call: Callable[[], Answer]) -> Answer:
        return interruptible(self._check, partial(self._retrying, call))
