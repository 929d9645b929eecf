"""Brings queue, store and webhooks' receivers in line with the database.

Retires dead leases, sends what no worker took, forgets old keys and messages; deletes what is too old, and the files
and rows of deleted jobs; delivers messages to webhooks.

Safe to run many times at once: every change is a conditional one under a row lock.
"""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from time import monotonic

import anyio
from anyio import to_thread
from prometheus_client import Counter
from sqlalchemy import Engine

from service import queue, webhooks
from service.db import deletion, deliveries, idempotency, stages
from service.db.deliveries import Claimed
from service.db.session import transaction
from service.db.tables import now
from service.outbound import Outbound
from service.settings import Settings
from service.storage import ArtifactStore, job_prefix

PURGED_AT_ONCE = 20
"""So that a gateway that is to stop need not wait for long."""
DELIVERED_AT_ONCE = 16
DELIVERED_AT_ONCE_PER_WEBHOOK = 4
DELIVERING_SECONDS = 5.0
"""After this no further messages are claimed, for the same reason."""
DELIVERY_LEASE = timedelta(seconds=60)
"""Longer than an attempt and its recording take."""
log = logging.getLogger(__name__)


def sweep(engine: Engine, settings: Settings, leases_expired: Counter) -> int:
    """Retire dead leases and count them, send every queued stage that is due, forget what is old.

    Returns how many stages were sent.
    """
    with transaction(engine) as session:
        dead = stages.expired(session)
    for job_id, stage in dead:
        with transaction(engine) as session:
            retired = stages.retire(session, job_id, stage, max_attempts=settings.max_attempts)
        if retired:
            leases_expired.inc()
            log.warning("a worker fell silent", extra={"job_id": job_id, "stage": stage.value})
    with transaction(engine) as session:
        waiting = stages.due(session, resend_seconds=settings.resend_seconds)
        idempotency.forget(session)
        deliveries.forget(session)
    return sum(queue.send(settings, job_id, stage) for job_id, stage in waiting)


def purge(engine: Engine, settings: Settings, store: ArtifactStore) -> int:
    """Delete the files of jobs that were deleted or are too old, then their rows; returns how many jobs went.

    A lease's length passes first: whoever lost a stage of such a job has stopped writing by then.
    Raises: what the store raises; the job it happened to is tried again behind the others.
    """
    if settings.retention_days is not None:
        with transaction(engine) as session:
            for job_id in deletion.mark_finished(session, before=now() - timedelta(days=settings.retention_days)):
                log.info("deleting %s, which finished more than %g days ago", job_id, settings.retention_days)
    with transaction(engine) as session:
        waited = now() - timedelta(seconds=settings.lease_seconds)
        found = deletion.marked(session, before=waited, limit=PURGED_AT_ONCE)
    for job_id in found:
        try:
            store.delete_prefix(job_prefix(job_id))
        except Exception:
            with transaction(engine) as session:
                deletion.postpone(session, job_id)
            raise
        with transaction(engine) as session:
            deletion.remove(session, job_id)
        log.info("deleted %s with all it left", job_id)
    return len(found)


def deliver(engine: Engine, settings: Settings, outbound: Outbound | None = None) -> int:
    """Send the messages to webhooks that are due; returns how many attempts were made.

    No transaction is open while one is sent. Who dies before recording it leaves it to be sent again.
    """
    attempts, stop_at = 0, monotonic() + DELIVERING_SECONDS
    while monotonic() < stop_at:
        with transaction(engine) as session:
            claimed = deliveries.claim(
                session,
                limit=DELIVERED_AT_ONCE,
                per_webhook=DELIVERED_AT_ONCE_PER_WEBHOOK,
                lease=DELIVERY_LEASE,
                max_tries=webhooks.MAX_TRIES,
            )
        if not claimed:
            break
        outbound = outbound or Outbound(webhooks.policy(settings))
        anyio.run(_send_all, engine, settings, outbound, claimed)
        attempts += len(claimed)
    return attempts


async def _send_all(engine: Engine, settings: Settings, outbound: Outbound, claimed: list[Claimed]) -> None:
    async def send(held: Claimed) -> None:
        outcome = await webhooks.send(outbound, held)
        await to_thread.run_sync(partial(_record, engine, settings, held, outcome))

    async with anyio.create_task_group() as group:
        for held in claimed:
            group.start_soon(send, held)


def _record(engine: Engine, settings: Settings, held: Claimed, outcome: webhooks.Outcome) -> None:
    with transaction(engine) as session:
        if outcome.delivered:
            deliveries.succeed(session, held, outcome.attempt)
            return
        disabled = deliveries.fail(
            session,
            held,
            outcome.attempt,
            retry_in=outcome.retry_in,
            gone=outcome.gone,
            failing_limit=timedelta(days=settings.webhook_failing_days),
        )
    if disabled is not None:
        log.warning("webhook %s is disabled: %s", held.webhook_id, disabled)
