"""Queries on events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, select

from service.contract.jobs import StageName
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
    """Add an event with the job's next number; the row lock on the job keeps numbers without gaps."""
    number = session.exec(
        update(JobRow)
        .where(col(JobRow.id) == job_id)
        .values(last_event=col(JobRow.last_event) + 1)
        .returning(col(JobRow.last_event))
        .execution_options(synchronize_session=False)
    ).scalar_one()
    row = EventRow(job_id=job_id, number=number, type=type_, stage=stage, message=message, data=dict(data or {}))
    session.add(row)
    session.flush()
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
