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

from sqlalchemy import ColumnElement, and_, case, false, func, not_, or_
from sqlalchemy.orm import aliased
from sqlmodel import Session, col, select

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.queues import Priority
from service.db import quotas
from service.db.tables import JobRow, StageRow, now

PRIORITY = case({priority: rank for rank, priority in enumerate(Priority)}, value=col(JobRow.priority))
"""Of a job, lower is more urgent."""


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
    due = and_(
        col(StageRow.status) == StageStatus.QUEUED,
        rested(now()),
        col(JobRow.status).in_((JobStatus.QUEUED, JobStatus.RUNNING)),
        col(JobRow.deleted_at).is_(None),
        col(JobRow.queue).in_(queues),
    )
    running = (
        select(JobRow.project, func.count().label("stages"))
        .join(StageRow)
        .where(col(StageRow.status) == StageStatus.RUNNING)
        .group_by(col(JobRow.project))
        .subquery()
    )
    waiting = select(JobRow.project).join(StageRow).where(due).distinct().subquery()
    earlier = aliased(JobRow)
    began = select(func.max(earlier.started_at)).where(col(earlier.project) == waiting.c.project).scalar_subquery()
    project = select(waiting.c.project, began.label("began_at")).subquery()
    found = session.exec(
        select(StageRow.job_id, StageRow.name)
        .join(JobRow)
        .join(project, project.c.project == col(JobRow.project))
        .outerjoin(running, running.c.project == col(JobRow.project))
        .where(due, slots.left)
        .order_by(
            PRIORITY,
            func.coalesce(running.c.stages, 0),
            col(JobRow.started_at).nulls_last(),
            project.c.began_at.nulls_first(),
            col(JobRow.id),
        )
        .limit(1)
        .with_for_update(of=JobRow, skip_locked=True)
    ).first()
    if found is not None:
        return found[0], StageName(found[1])
    blocked = select(StageRow).join(JobRow).where(due, not_(slots.left), col(StageRow.sent_at).is_not(None))
    for row in session.exec(blocked.with_for_update(of=StageRow, skip_locked=True)):
        quotas.hold_back(row)
    return None
