"""Brings queue, store and webhooks' receivers in line with the database.

Retires dead leases, ends what is past its deadline, sends what no worker took, forgets old keys and messages; deletes
what is too old or too much, the files and rows of deleted jobs, and uploads left behind; delivers messages to webhooks;
hands finished jobs on.

Safe to run many times at once: every change is a conditional one under a row lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from types import TracebackType

import anyio
from anyio import to_thread
from prometheus_client import Counter
from sqlalchemy import Engine as Database
from tenacity import RetryCallState, Retrying
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_when_event_set
from tenacity.wait import wait_exponential

from service import queue
from service.db import deletion, deliveries, idempotency, jobs, stages
from service.db.deliveries import DeliveryClaim
from service.db.session import DATABASE_FAULTS, transaction
from service.db.tables import now
from service.settings import Settings
from service.storage import ArtifactStore, StoreUnavailable, job_prefix
from service.upkeep import webhooks
from service.upkeep.outbound import Outbound
from service.upkeep.publishing.outbox import publish

PURGED_AT_ONCE = 20
"""So that a process that is to stop need not wait for long."""
PURGED_SIDE_BY_SIDE = 8
"""A store may take a second for each job."""
MARKED_AT_ONCE = 200
DELIVERED_AT_ONCE = 16
DELIVERED_AT_ONCE_PER_WEBHOOK = 4
DELIVERING_SECONDS = 5.0
"""After this no further messages are claimed, for the same reason."""
DELIVERY_LEASE = timedelta(seconds=60)
"""Longer than an attempt and its recording take."""
MAX_PAUSE_S = 30.0
"""Pause between two tries of what failed, at most."""
UPLOADS_PAUSE_S = 3600.0
"""Uploads are rarely left behind, and looking for them costs money on some stores."""
BROKER_PAUSE_S = 300.0
STOP_S = 4.0
OUTAGES = (*DATABASE_FAULTS, queue.BrokerUnavailable, StoreUnavailable)
log = logging.getLogger(__name__)


class Reconciler:
    """Context manager: reconciles in threads of its own, through every outage of what it works on."""

    def __init__(
        self, database: Database, settings: Settings, store: ArtifactStore, leases_expired: Counter | None = None
    ) -> None:
        self._stopping = Event()
        pause_s = settings.reconcile_seconds
        # Threads: a store that is slow to delete, or a receiver to answer, must keep no stage waiting.
        self._threads = [
            Thread(target=_repeat, args=(action, pause_s, self._stopping, full), name=name, daemon=True)
            for name, action, pause_s, full in (
                ("sweep", partial(sweep, database, settings, leases_expired), pause_s, None),
                ("purge", partial(purge, database, settings, store), pause_s, PURGED_AT_ONCE),
                ("deliver", partial(deliver, database, settings, Outbound(webhooks.policy(settings))), pause_s, None),
                ("publish", partial(publish, database, settings, store), pause_s, None),
                ("uploads", partial(abandon_uploads, settings, store), max(pause_s, UPLOADS_PAUSE_S), None),
                ("broker", partial(queue.sweep, settings), max(pause_s, BROKER_PAUSE_S), None),
            )
        ]

    def __enter__(self) -> Reconciler:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Waits for what is being done, but not for ever: it may be cut off anywhere."""
        self._stopping.set()
        deadline = time.monotonic() + STOP_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


def _repeat(action: Callable[[], int], pause_s: float, stopping: Event, full: int | None = None) -> None:
    """Do it every `pause_s` seconds, and at once while `full` were done, as there are more then.

    What fails is tried again after longer and longer pauses, and logged once.
    """
    persistent = Retrying(
        stop=stop_when_event_set(stopping),
        sleep=sleep_using_event(stopping),
        wait=wait_exponential(multiplier=pause_s, max=max(pause_s, MAX_PAUSE_S)),
        before_sleep=_log_first_failure,
        retry_error_callback=lambda state: None,
    )
    while not stopping.is_set():
        done = persistent(action)
        if persistent.statistics["attempt_number"] > 1 and not stopping.is_set():
            log.warning("the reconciler works again, after %d failures", persistent.statistics["attempt_number"] - 1)
        if full is None or done != full:
            stopping.wait(pause_s)


def _log_first_failure(state: RetryCallState) -> None:
    assert state.outcome is not None
    if state.attempt_number == 1:
        error = state.outcome.exception()
        unforeseen = None if isinstance(error, OUTAGES) else error
        log.error("the reconciler failed; it tries again until it works: %s", error, exc_info=unforeseen)


def sweep(database: Database, settings: Settings, leases_expired: Counter | None = None) -> int:
    """Retire dead leases and count them, end overdue stages, send every queued stage that is due.

    Returns how many stages were sent. Raises: BrokerUnavailable; what was not sent is due at once.
    """
    limit_s, grace_s = settings.stage_deadline_seconds, settings.lease_seconds
    with transaction(database) as session:
        dead = stages.expired(session)
        overdue = stages.overdue(session, deadline_seconds=limit_s, grace_seconds=grace_s)
        idempotency.forget(session)
        deliveries.forget(session)
    for job_id, stage in dead:
        with transaction(database) as session:
            retired = stages.retire(session, job_id, stage, max_attempts=settings.max_attempts)
        if retired:
            log.warning("a worker fell silent", extra={"job_id": job_id, "stage": stage.value})
            if leases_expired is not None:
                leases_expired.inc()
    for job_id, stage in overdue:
        with transaction(database) as session:
            stages.time_out(session, job_id, stage, deadline_seconds=limit_s, grace_seconds=grace_s)
    with transaction(database) as session:
        waiting = stages.due(
            session, resend_seconds=settings.resend_seconds, max_running_jobs=settings.max_running_jobs
        )
        queues = jobs.queues(session, [job_id for job_id, _ in waiting])
    for sent, (job_id, stage) in enumerate(waiting):
        try:
            queue.send(settings, queue.WakeUp(job_id, stage, queues[job_id]))
        except queue.BrokerUnavailable:
            with transaction(database) as session:
                stages.not_sent(session, [job_id for job_id, _ in waiting[sent:]])
            raise
    return len(waiting)


def purge(database: Database, settings: Settings, store: ArtifactStore) -> int:
    """Delete the files of jobs that were deleted or are too old, then their rows; returns how many jobs went.

    A lease's length passes first: whoever lost a stage of such a job has stopped writing by then.
    Raises: what the store raises, when the others are gone; the job it happened to is tried again behind others.
    """
    if settings.retention_days is not None:
        old = now() - timedelta(days=settings.retention_days)
        with transaction(database) as session:
            for job_id in deletion.mark_finished(session, before=old, limit=MARKED_AT_ONCE):
                log.info("deleting %s, which finished more than %g days ago", job_id, settings.retention_days)
    if settings.retention_bytes is not None:
        with transaction(database) as session:
            for job_id in deletion.mark_beyond(session, most_bytes=settings.retention_bytes):
                log.info("deleting %s to keep no more than %d bytes", job_id, settings.retention_bytes)
    with transaction(database) as session:
        waited = now() - timedelta(seconds=settings.lease_seconds)
        found = deletion.marked(session, before=waited, limit=PURGED_AT_ONCE)
    waiting, failures = iter(found), list[BaseException]()

    def work() -> None:
        for job_id in waiting:
            try:
                _purge_job(database, store, job_id)
            except BaseException as error:  # noqa: BLE001  (the border of the thread: whoever waits gets it)
                failures.append(error)

    # No pool: Python waits for those of a pool before it ends, and a store may say nothing.
    threads = [Thread(target=work, daemon=True) for _ in found[:PURGED_SIDE_BY_SIDE]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return len(found)


def _purge_job(database: Database, store: ArtifactStore, job_id: str) -> None:
    try:
        store.delete_prefix(job_prefix(job_id))
    except Exception:
        with transaction(database) as session:
            deletion.postpone(session, job_id)
        raise
    with transaction(database) as session:
        deletion.remove(session, job_id)
    log.info("deleted %s with all it left", job_id)


def abandon_uploads(settings: Settings, store: ArtifactStore) -> int:
    """Give up uploads that their writers left unfinished long ago; returns how many. Raises: what the store raises."""
    abandoned = store.abandon_uploads(before=now() - timedelta(hours=settings.upload_hours))
    if abandoned:
        log.info("gave up %d unfinished uploads", abandoned)
    return abandoned


def deliver(database: Database, settings: Settings, outbound: Outbound) -> int:
    """Send the messages to webhooks that are due; returns how many attempts were made.

    No transaction is open while one is sent. Who dies before recording it leaves it to be sent again.
    """
    attempts, stop_at = 0, time.monotonic() + DELIVERING_SECONDS
    while time.monotonic() < stop_at:
        with transaction(database) as session:
            claimed = deliveries.claim(
                session,
                limit=DELIVERED_AT_ONCE,
                per_webhook=DELIVERED_AT_ONCE_PER_WEBHOOK,
                lease=DELIVERY_LEASE,
                max_tries=webhooks.MAX_TRIES,
            )
        if not claimed:
            break
        anyio.run(_send_all, database, settings, outbound, claimed)
        attempts += len(claimed)
    return attempts


async def _send_all(database: Database, settings: Settings, outbound: Outbound, claimed: list[DeliveryClaim]) -> None:
    async def send(claim: DeliveryClaim) -> None:
        outcome = await webhooks.send(outbound, claim)
        await to_thread.run_sync(partial(_record, database, settings, claim, outcome))

    async with anyio.create_task_group() as group:
        for claim in claimed:
            group.start_soon(send, claim)


def _record(database: Database, settings: Settings, claim: DeliveryClaim, outcome: webhooks.DeliveryOutcome) -> None:
    with transaction(database) as session:
        if outcome.delivered:
            deliveries.succeed(session, claim, outcome.attempt)
            return
        disabled = deliveries.fail(
            session,
            claim,
            outcome.attempt,
            retry_in=outcome.retry_in,
            gone=outcome.gone,
            failing_limit=timedelta(days=settings.webhook_failing_days),
        )
    if disabled is not None:
        log.warning("webhook %s is disabled: %s", claim.webhook_id, disabled)
