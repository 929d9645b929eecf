"""Queries for the metrics: figures over all projects, from indexes alone."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sqlalchemy import func, literal, select, union_all
from sqlmodel import Session, col

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from service.db.tables import EventRow, JobRow, StageRow

LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Queued:
    """Stages of one name that wait for a worker, and since when the first of them does."""

    count: int
    oldest: datetime


def jobs_by_status(session: Session) -> dict[JobStatus, int]:
    """How many jobs are in each state. One pass over the index on `status`, less those marked as deleted.

    As a condition the mark would make the database read every job; taken off afterwards, it reads the marked alone.
    """
    every = select(col(JobRow.status), func.count().label("jobs")).group_by(col(JobRow.status))
    marked = select(col(JobRow.status), literal(-1)).where(col(JobRow.deleted_at) > LONG_AGO)
    counted = union_all(every, marked).subquery()
    rows = session.execute(select(counted.c.status, func.sum(counted.c.jobs)).group_by(counted.c.status))
    found = {JobStatus(name): int(count) for name, count in rows}
    return {name: found.get(name, 0) for name in JobStatus}


def queued_stages(session: Session) -> dict[tuple[str, StageName], Queued]:
    """The stages that wait for a worker, by queue. Costs four look-ups in indexes for each, however many jobs exist.

    While a stage waits nothing happens in its job: it waits since the job's last event.
    """
    # Not as joins, for which a database may choose to begin with the jobs, or to read all events of each.
    last_event = (
        select(col(JobRow.last_event)).where(col(JobRow.id) == StageRow.job_id).correlate(StageRow).scalar_subquery()
    )
    queue = select(col(JobRow.queue)).where(col(JobRow.id) == StageRow.job_id).correlate(StageRow).scalar_subquery()
    queued_at = (
        select(col(EventRow.created_at))
        .where(col(EventRow.job_id) == StageRow.job_id, col(EventRow.number) == last_event)
        .scalar_subquery()
    )
    rows = session.execute(
        select(queue.label("queue"), col(StageRow.name), func.count(), func.min(queued_at))
        .where(col(StageRow.status) == StageStatus.QUEUED)
        .group_by("queue", col(StageRow.name))
    )
    return {(name, StageName(stage)): Queued(count, oldest) for name, stage, count, oldest in rows}
