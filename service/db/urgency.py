"""Which of the stages that are due is run next.

Of the stages of its queues, a worker takes

1. those of the highest priority; of these
2. those of the project that has the fewest stages running; of these
3. that of the job that began first; where none has begun,
4. those of the project that began no job for longest; of these
5. that of the oldest job.

So what has begun comes to its end before more is begun, and no project waits behind all jobs of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import ColumnElement, Select, and_, case, false, func, not_, or_, select
from sqlalchemy.orm import aliased
from sqlmodel import Session, col

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.queues import Priority
from service.db import jobs, quotas
from service.db.tables import JobRow, StageRow, now

PRIORITY = case({priority: rank for rank, priority in enumerate(Priority)}, value=col(JobRow.priority))
"""Of a job, lower is more urgent."""

CANDIDATES = 100
"""More than there are workers that claim a stage in the same moment."""
COUNTED = 1000
"""Stages ahead of a job that are counted for whoever waits for it."""


def rested(at: datetime) -> ColumnElement[bool]:
    """Whether a stage is past the pause that a fault brought it."""
    not_before = col(StageRow.not_before)
    return or_(not_before.is_(None), not_before <= at)


def most_urgent(
    session: Session, queues: Sequence[str], *, max_running_jobs: int | None = None
) -> tuple[str, StageName] | None:
    """The stage that a worker of these queues takes next, its job locked; None when nothing is due.

    Jobs that other processes are just changing are passed over, and so are those that have to wait for others of
    their project or key. When there are no others these are held back, for `stages.due` to send later: whatever woke
    the worker may have been their message.
    """
    slots = quotas.Slots(session, max_running_jobs, sent=false())
    due = _due(queues)
    for job_id, name in session.execute(_in_order(and_(due, slots.left)).limit(CANDIDATES)):
        if jobs.lock_if_free(session, job_id) is not None:
            return job_id, StageName(name)
    held_up = select(StageRow).join(JobRow).where(due, not_(slots.left), col(StageRow.sent_at).is_not(None))
    for row in session.scalars(held_up.with_for_update(of=StageRow, skip_locked=True)):
        quotas.hold_back(row)
    return None


def ahead(session: Session, job_id: str, queue: str, *, max_running_jobs: int | None = None) -> int | None:
    """How many stages the workers of a queue take before that of one of its jobs, as things stand now.

    None where no stage of the job is due. More than `COUNTED` are not counted.
    """
    slots = quotas.Slots(session, max_running_jobs, sent=false())
    found = session.execute(_in_order(and_(_due([queue]), slots.left)).limit(COUNTED + 1))
    waiting = [waits for waits, _ in found]
    if job_id in waiting:
        return waiting.index(job_id)
    return COUNTED if len(waiting) > COUNTED else None


def _due(queues: Sequence[str]) -> ColumnElement[bool]:
    queued = col(StageRow.status) == StageStatus.QUEUED
    return and_(queued, rested(now()), col(JobRow.queue).in_(queues))


def _in_order(due: ColumnElement[bool]) -> Select[tuple[str, str]]:
    """Job and name of the stages that are `due`, the most urgent first.

    In one pass, with what is running in any queue: a join would look up each job by itself.
    """
    running = col(StageRow.status) == StageStatus.RUNNING
    active = (
        select(
            col(JobRow.id),
            col(StageRow.name),
            col(JobRow.project),
            col(JobRow.started_at),
            PRIORITY.label("priority"),
            due.label("due"),
            func.count().filter(running).over(partition_by=col(JobRow.project)).label("running"),
        )
        .join(StageRow)
        .where(col(StageRow.status).in_((StageStatus.QUEUED, StageStatus.RUNNING)))
        .where(col(JobRow.status).in_((JobStatus.QUEUED, *quotas.RUNNING)), col(JobRow.deleted_at).is_(None))
        .subquery()
    )
    earlier = aliased(JobRow)
    began = select(func.max(col(earlier.started_at))).where(col(earlier.project) == active.c.project).scalar_subquery()
    return (
        select(active.c.id, active.c.name)
        .where(active.c.due)
        .order_by(
            active.c.priority, active.c.running, active.c.started_at.nulls_last(), began.nulls_first(), active.c.id
        )
    )
