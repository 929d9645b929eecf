"""Brings the queue in line with the database: retires dead leases, sends what no worker took, forgets old keys.

Safe to run many times at once: every change is a conditional one under a row lock.
"""

from __future__ import annotations

import logging

from sqlalchemy import Engine

from service import queue
from service.db import idempotency, stages
from service.db.session import transaction
from service.settings import Settings

log = logging.getLogger(__name__)


def sweep(engine: Engine, settings: Settings) -> int:
    """Retire dead leases, send every queued stage that is due, forget idempotency keys; returns how many were sent."""
    with transaction(engine) as session:
        dead = stages.expired(session)
    for job_id, stage in dead:
        with transaction(engine) as session:
            stages.retire(session, job_id, stage, max_attempts=settings.max_attempts)
    with transaction(engine) as session:
        waiting = stages.due(session, resend_seconds=settings.resend_seconds)
        idempotency.forget(session)
    return sum(queue.send(settings, job_id, stage) for job_id, stage in waiting)
