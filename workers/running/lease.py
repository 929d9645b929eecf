"""A stage's lease: renewed by a thread while the stage works, and the stage's window on all that is to stop it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from threading import Event, Thread
from types import TracebackType

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from pdtrim.contract.errors import DeadlineExceeded
from service.db import stages
from service.db.session import transaction
from service.db.stages import Claim, LeaseLost
from service.db.tables import now

HEARTBEAT_S = 1.0
STUCK_S = 60.0
"""A stage that has not stepped back so long after its lease was lost never will."""
log = logging.getLogger(__name__)


class StopRequested(Exception):
    """The job is being cancelled or paused; the stage must stop."""


class WorkerStopping(Exception):
    """The worker is to end, and has no more time for the stage, which must go to another."""


class Lease:
    """Context manager that renews `claim` every third of `seconds` until it is left.

    `abandon` is called when the lease is lost and the stage, which hangs somewhere, does not step back. `stopping`
    tells whether the worker is to end.
    """

    def __init__(
        self,
        database: Database,
        claim: Claim,
        *,
        seconds: float,
        abandon: Callable[[], None] = lambda: None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._database = database
        self._claim = claim
        self._seconds = seconds
        self._abandon = abandon
        self._stopping = stopping
        self._deadline = time.monotonic() + seconds
        self._asked_to_stop = Event()
        self._lost = Event()
        self._stop = Event()
        # In a copy of the context, so that the thread's log lines carry the stage's ids too.
        work = partial(copy_context().run, self._renew_until_stopped)
        self._thread = Thread(target=work, name=f"lease-{claim.job_id}", daemon=True)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def check(self) -> None:
        """Raises: StopRequested when the job is cancelled or paused; WorkerStopping; DeadlineExceeded; LeaseLost when
        the stage may be another's.
        """
        if self._lost.is_set() or time.monotonic() > self._deadline:
            raise LeaseLost(f"the lease on {self._claim.stage} of {self._claim.job_id} was not renewed in time")
        if self._asked_to_stop.is_set():
            raise StopRequested
        if self._stopping():
            raise WorkerStopping
        if self._claim.deadline is not None and now() > self._claim.deadline:
            raise DeadlineExceeded(
                f"Stage {self._claim.stage} is not done within its time. Give the job a longer `deadline_seconds` or "
                "less to do; a resume goes on from the last saved state with as much time again."
            )

    def _renew_until_stopped(self) -> None:
        out_of_reach = False
        # Being asked to stop is noticed here too, and soon even under a long lease.
        while not self._stop.wait(min(self._seconds / 3, HEARTBEAT_S)):
            asked_at = time.monotonic()
            try:
                with transaction(self._database) as session:
                    stop = stages.renew(session, self._claim, lease_seconds=self._seconds)
            except LeaseLost:
                self._lost.set()
                if not self._stop.wait(STUCK_S):
                    log.critical("%s was lost, and its stage does not step back", self._claim)
                    self._abandon()
                return
            except SQLAlchemyError as error:
                if not out_of_reach:
                    log.warning("lease of %s not renewed, trying again: %s", self._claim, error)
                out_of_reach = True
                continue
            out_of_reach = False
            self._deadline = asked_at + self._seconds
            if stop:
                self._asked_to_stop.set()
