"""The folder in which one attempt at a stage works, and what becomes of it when its process is killed."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from service.db.stages import Claim

LOCK = ".lock"
SWEEP_S = 30.0
"""Another process that takes a fresh lock for an abandoned one holds it for less."""
log = logging.getLogger(__name__)


@contextmanager
def attempt_folder(scratch: Path, claim: Claim) -> Iterator[Path]:
    """An empty folder below `scratch` that nobody else writes to; it is deleted at the end.

    First it deletes what killed processes left: the kernel released their locks, and those of the living it keeps, also
    of a stopped one that has lost its stage.
    """
    jobs = scratch / "jobs"
    jobs.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(jobs)
    folder = jobs / f"{claim.job_id}-{claim.stage}-{claim.attempt}"
    with FileLock(f"{folder}{LOCK}", timeout=SWEEP_S):
        try:
            folder.mkdir()
            yield folder
        finally:
            _delete(folder)


def _delete_abandoned(jobs: Path) -> None:
    for lock in jobs.glob(f"*{LOCK}"):
        folder = lock.with_name(lock.name.removesuffix(LOCK))
        try:
            with FileLock(lock, blocking=False):
                _delete(folder)
                log.info("deleted %s, which a killed process had left", folder)
        except Timeout:
            continue


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(f"{folder}{LOCK}").unlink(missing_ok=True)
