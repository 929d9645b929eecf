"""Queries on publications: the outbox of what finished jobs are handed on to.

A publication is written with its job, and falls due in the transaction in which that succeeds. A claim moves its due
time on by a lease, which is renewed file by file; nothing is locked meanwhile. Who dies on the way leaves it to fall
due again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlmodel import Session, col, select

from pdtrim.contract.jobs import JobStatus
from pdtrim.contract.publications import PublicationStatus, PublicationTarget
from service.db.tables import JobRow, PublicationRow, now


class PublicationLost(Exception):
    """Another publisher took it over, or its job was deleted; nothing more may be recorded for it."""


@dataclass(frozen=True)
class PublicationClaim:
    """The right to make one attempt. `tries` counts since it was last asked for."""

    job_id: str
    target: PublicationTarget
    attempt: int
    tries: int


def add(session: Session, job_id: str, targets: Iterable[PublicationTarget]) -> None:
    """Have a job handed on once it has succeeded."""
    for target in targets:
        session.add(PublicationRow(job_id=job_id, target=target, status=PublicationStatus.PENDING))


def fall_due(session: Session, job_id: str) -> None:
    """Have a job handed on now. To be part of the transaction that records its success."""
    for row in of_job(session, job_id):
        row.next_attempt_at, row.updated_at = now(), now()


def of_job(session: Session, job_id: str) -> Sequence[PublicationRow]:
    """A job's publications."""
    query = select(PublicationRow).where(PublicationRow.job_id == job_id)
    return session.exec(query.order_by(col(PublicationRow.target))).all()


def ask_again(session: Session, job_id: str, targets: Iterable[PublicationTarget]) -> None:
    """Have a job handed on when it succeeds, at once if it has; to targets that took it or failed before, too."""
    # Locked, so that the job cannot succeed in between.
    job = session.get(JobRow, job_id, with_for_update=True)
    succeeded = job is not None and job.status == JobStatus.SUCCEEDED
    for target in targets:
        row = _locked(session, job_id, target)
        row = row or PublicationRow(job_id=job_id, target=target, status=PublicationStatus.PENDING)
        row.status, row.error, row.attempts_forgiven = PublicationStatus.PENDING, "", row.attempt
        row.next_attempt_at, row.updated_at = now() if succeeded else None, now()
        session.add(row)
    session.flush()


def claim(session: Session, *, lease: timedelta, max_tries: int) -> PublicationClaim | None:
    """Take the publication that has been due for longest; None when none is.

    One that no publisher lived to record `max_tries` times is given up.
    """
    alive = col(JobRow.deleted_at).is_(None)
    row = session.exec(
        select(PublicationRow)
        .join(JobRow)
        .where(col(PublicationRow.next_attempt_at) <= now(), alive)
        .order_by(col(PublicationRow.next_attempt_at))
        .limit(1)
        .with_for_update(of=PublicationRow, skip_locked=True)
    ).first()
    if row is None:
        return None
    row.attempt += 1
    row.updated_at, row.next_attempt_at = now(), now() + lease
    tries = row.attempt - row.attempts_forgiven
    if tries > max_tries:
        row.status, row.next_attempt_at = PublicationStatus.FAILED, None
        row.error = row.error or "Nobody lived to record the attempts before."
        session.flush()
        return claim(session, lease=lease, max_tries=max_tries)
    return PublicationClaim(row.job_id, PublicationTarget(row.target), row.attempt, tries)


def renew(session: Session, claim: PublicationClaim, *, lease: timedelta) -> None:
    """Keep it for longer. Raises: PublicationLost."""
    _current(session, claim).next_attempt_at = now() + lease


def succeed(session: Session, claim: PublicationClaim, urls: Sequence[str]) -> None:
    """Record that the target has it. Raises: PublicationLost."""
    row = _current(session, claim)
    row.status, row.next_attempt_at, row.updated_at = PublicationStatus.SUCCEEDED, None, now()
    row.error, row.urls = "", list(urls)


def fail(session: Session, claim: PublicationClaim, error: str, *, retry_in: timedelta | None) -> None:
    """Record a failure, and when it is tried again, if it is. Raises: PublicationLost."""
    row = _current(session, claim)
    row.error, row.updated_at = error, now()
    row.status = PublicationStatus.FAILED if retry_in is None else PublicationStatus.PENDING
    row.next_attempt_at = None if retry_in is None else now() + retry_in


def _current(session: Session, claim: PublicationClaim) -> PublicationRow:
    row = _locked(session, claim.job_id, claim.target)
    job = session.get(JobRow, claim.job_id)
    if row is None or row.attempt != claim.attempt or row.next_attempt_at is None or job is None or job.deleted_at:
        raise PublicationLost(f"{claim.target} of {claim.job_id}: attempt {claim.attempt} no longer counts")
    return row


def _locked(session: Session, job_id: str, target: PublicationTarget) -> PublicationRow | None:
    return session.exec(
        select(PublicationRow)
        .where(PublicationRow.job_id == job_id, PublicationRow.target == target)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).first()
