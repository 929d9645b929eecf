"""Brings queue and store in line with the database.

Retires dead leases, sends what no worker took, forgets old keys; deletes what is too old, and the files and rows of
deleted jobs.

Safe to run many times at once: every change is a conditional one under a row lock.
"""

from __future__ import annotations

import logging
from datetime import timedelta

from prometheus_client import Counter
from sqlalchemy import Engine

from service import queue
from service.db import deletion, idempotency, stages
from service.db.session import transaction
from service.db.tables import now
from service.settings import Settings
from service.storage import ArtifactStore, job_prefix

PURGED_AT_ONCE = 20
"""So that a gateway that is to stop need not wait for long."""
log = logging.getLogger(__name__)


def sweep(engine: Engine, settings: Settings, leases_expired: Counter) -> int:
    """Retire dead leases and count them, send every queued stage that is due, forget idempotency keys.

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
