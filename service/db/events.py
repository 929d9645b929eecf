"""Queries on events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import and_, func, insert, or_, update
from sqlmodel import Session, col, select

from pdtrim.contract.jobs import JobStatus, StageName
from service.db import deliveries, notices
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
    """Add an event with the job's next number, messages to the webhooks that announce it, and notice to who waits.

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
    notices.send(session, job_id)
    return row


def begin(session: Session, job: JobRow, type_: str, message: str) -> None:
    """Add the first event of a job that this transaction creates; nobody can wait for one that they cannot know of."""
    row = EventRow(job_id=job.id, number=job.last_event, type=type_, message=message)
    session.connection().execute(insert(EventRow), row.model_dump())
    deliveries.announce(session, row, project=job.project, status=job.status, labels=job.labels)


def page(session: Session, job_id: str, *, after: int, limit: int) -> tuple[list[EventRow], bool]:
    """Events numbered above `after`, oldest first, and whether more follow."""
    rows = session.exec(
        select(EventRow)
        .where(EventRow.job_id == job_id, EventRow.number > after)
        .order_by(col(EventRow.number))
        .limit(limit + 1)
    ).all()
    return list(rows[:limit]), len(rows) > limit


def progress_of(session: Session, job_id: str, stage: StageName, *, most: int) -> list[EventRow]:
    """What a stage told of its progress, oldest first: of more than about `most` events every n-th, and the last."""
    told = (EventRow.job_id == job_id, EventRow.stage == stage, EventRow.type == "stage.progress")
    count, last = session.execute(select(func.count(), func.max(EventRow.number)).where(*told)).one()
    thinned = or_(col(EventRow.number) % max(1, -(-count // most)) == 0, EventRow.number == last)
    return list(session.exec(select(EventRow).where(*told, thinned).order_by(col(EventRow.number))))


@dataclass
class News:
    """A job's state, and the events that came after those that are known."""

    final: bool
    last: int
    events: list[EventRow] = field(default_factory=list)


def news(session: Session, known: Mapping[str, int | None], *, limit: int) -> dict[str, News]:
    """What came to jobs after the last events known of them, at most `limit` events each; of None, the state alone.

    Jobs that do not exist are left out. Two queries, however many jobs there are.
    """
    # The jobs before their events: a job that is final here has written its last event already.
    states = select(JobRow.id, JobRow.status, JobRow.last_event)
    rows = session.exec(states.where(col(JobRow.id).in_(known), col(JobRow.deleted_at).is_(None)))
    found = {job_id: News(JobStatus(status).final, last) for job_id, status, last in rows}
    # Numbers have no gaps, so that a range of them is as good as a limit.
    behind = [
        and_(col(EventRow.job_id) == job_id, col(EventRow.number).between(head + 1, head + limit))
        for job_id, one in found.items()
        if (head := known[job_id]) is not None and head < one.last
    ]
    if behind:
        in_order = select(EventRow).where(or_(*behind)).order_by(col(EventRow.job_id), col(EventRow.number))
        for row in session.exec(in_order):
            found[row.job_id].events.append(row)
    return found
