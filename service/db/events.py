"""Queries on events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, select

from service.contract.jobs import JobStatus, StageName
from service.db import deliveries
from service.db.tables import EventRow, JobRow


def append(
    session: Session,
    job_id: str,
    type_: str,
    message: str,
    *,
    stage: StageName | None = None,
    data: Mapping[str, Any] | None = None,
) -> EventRow:
    """Add an event with the job's next number, and messages to the webhooks that announce it.

    The row lock on the job keeps numbers without gaps.
    """
    number, project, status, labels = session.exec(
        update(JobRow)
        .where(col(JobRow.id) == job_id)
        .values(last_event=col(JobRow.last_event) + 1)
        .returning(col(JobRow.last_event), col(JobRow.project), col(JobRow.status), col(JobRow.labels))
        .execution_options(synchronize_session=False)
    ).one()
    row = EventRow(job_id=job_id, number=number, type=type_, stage=stage, message=message, data=dict(data or {}))
    session.add(row)
    session.flush()
    deliveries.announce(session, row, project=project, status=JobStatus(status), labels=labels)
    return row


def page(session: Session, job_id: str, *, after: int, limit: int) -> tuple[list[EventRow], bool]:
    """Events numbered above `after`, oldest first, and whether more follow."""
    rows = session.exec(
        select(EventRow)
        .where(EventRow.job_id == job_id, EventRow.number > after)
        .order_by(col(EventRow.number))
        .limit(limit + 1)
    ).all()
    return list(rows[:limit]), len(rows) > limit
