"""Deleting jobs: first they are marked, which hides them from everyone; later their files go, and then their rows.

Whoever is interrupted on the way leaves the mark behind, and the next one begins again with the files.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import ColumnElement, delete, func, update
from sqlmodel import Session, col, select

from pdtrim.contract.errors import JobNotDeletable
from pdtrim.contract.jobs import Action, JobStatus
from service.db import jobs, notices
from service.db.tables import IdempotencyRow, JobRow, now

MARKED_AT_ONCE = 1000


def mark(session: Session, job_id: str) -> None:
    """Delete a finished or paused job as far as anyone can see. Raises: JobNotFound; JobNotDeletable."""
    job = jobs.lock(session, job_id)
    jobs.check_possible(job, Action.DELETE, JobNotDeletable)
    job.deleted_at = now()
    session.flush()
    _free_keys(session, [job_id])
    notices.send(session, job_id)


def mark_finished(session: Session, *, before: datetime, limit: int) -> list[str]:
    """Delete, as far as anyone can see, the first jobs that finished before a time; returns their ids."""
    final = [status for status in JobStatus if status.final]
    first = (
        select(JobRow.id)
        .where(col(JobRow.finished_at) < before, col(JobRow.deleted_at).is_(None), col(JobRow.status).in_(final))
        .order_by(col(JobRow.finished_at))
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    # Not as a part of the update, where PostgreSQL may run it, and apply its limit, more than once.
    job_ids = list(session.exec(first).all())
    session.exec(update(JobRow).where(col(JobRow.id).in_(job_ids)).values(deleted_at=now()))
    _free_keys(session, job_ids)
    return job_ids


def mark_beyond(session: Session, *, most_bytes: int) -> list[str]:
    """Delete, as far as anyone can see, those finished jobs that finished first, until all others keep at most so many
    bytes of artifacts; returns their ids.
    """
    kept = session.exec(select(func.coalesce(func.sum(JobRow.artifact_bytes), 0)).where(*_keeps_files())).one()
    if kept <= most_bytes:
        return []
    final = [status for status in JobStatus if status.final]
    oldest = session.exec(
        select(JobRow.id, JobRow.artifact_bytes)
        .where(*_keeps_files(), col(JobRow.status).in_(final))
        .order_by(col(JobRow.finished_at), col(JobRow.id))
        .limit(MARKED_AT_ONCE)
    )
    excess, job_ids = kept - most_bytes, []
    for job_id, size in oldest:
        if excess <= 0:
            break
        job_ids.append(job_id)
        excess -= size
    # One that is resumed meanwhile stays.
    found = session.exec(
        update(JobRow)
        .where(col(JobRow.id).in_(job_ids), col(JobRow.status).in_(final), col(JobRow.deleted_at).is_(None))
        .values(deleted_at=now())
        .returning(col(JobRow.id))
        .execution_options(synchronize_session=False)
    )
    marked = list(found.scalars())
    _free_keys(session, marked)
    return marked


def _keeps_files() -> tuple[ColumnElement[bool], ...]:
    """The condition of the index `ix_jobs_kept`."""
    return col(JobRow.artifact_bytes) > 0, col(JobRow.deleted_at).is_(None)


def _free_keys(session: Session, job_ids: list[str]) -> None:
    """A request that is sent again must not be answered with a job that is gone."""
    session.exec(delete(IdempotencyRow).where(col(IdempotencyRow.job_id).in_(job_ids)))


def marked(session: Session, *, before: datetime, limit: int) -> list[str]:
    """Jobs marked before a time, in the order of their marks."""
    query = select(JobRow.id).where(col(JobRow.deleted_at) < before).order_by(col(JobRow.deleted_at)).limit(limit)
    return list(session.exec(query).all())


def postpone(session: Session, job_id: str) -> None:
    """Mark a job anew whose files could not be deleted, so that others are not kept waiting behind it."""
    session.exec(update(JobRow).where(*_is_marked(job_id)).values(deleted_at=now()))


def remove(session: Session, job_id: str) -> None:
    """Delete a marked job's row, and by cascade all rows that refer to it. Its files are to be gone by now."""
    session.exec(delete(JobRow).where(*_is_marked(job_id)))


def _is_marked(job_id: str) -> tuple[ColumnElement[bool], ...]:
    return col(JobRow.id) == job_id, col(JobRow.deleted_at).is_not(None)
