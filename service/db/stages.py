"""Queries on stages: claims, leases, results.

A claim is one conditional change under the job's row lock. It takes a lease and raises the stage's attempt number;
every later write names that number and is refused once another worker has taken the stage over (a fencing token).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, and_, not_, or_, update
from sqlmodel import Session, col, select
from uuid_utils import uuid7

from pdtrim.contract.errors import DeadlineExceeded, JobNotFound
from pdtrim.contract.jobs import ErrorInfo, JobStatus, StageName, StageStatus
from pdtrim.contract.queues import DEFAULT_QUEUE
from service.db import events, jobs, publications, quotas
from service.db.tables import ArtifactRow, JobRow, StageRow, now
from service.db.urgency import PRIORITY, rested

DUE_AT_ONCE = 1000
MOST_DOUBLED = 8
"""From this one on, pauses are the same."""
STOPPING = (JobStatus.CANCELLING, JobStatus.PAUSING)


class LeaseLost(Exception):
    """The stage was taken over by another worker, or its job ended; nothing more may be recorded for it."""


@dataclass(frozen=True)
class Claim:
    """The right to run a stage and to record its results while the lease is renewed, until the `deadline` if any.

    `queue` is the job's, `sent` whether a message was under way for the stage; `trace` is as in the job.
    """

    job_id: str
    stage: StageName
    attempt: int
    deadline: datetime | None = field(default=None, compare=False)
    queue: str = field(default=DEFAULT_QUEUE, compare=False)
    sent: bool = field(default=True, compare=False)
    trace: Mapping[str, str] = field(default_factory=dict, compare=False)

    def answers(self, queue: str) -> bool:
        """Whether a message that came by `queue` may have been the one that was sent for this stage."""
        return self.sent and self.queue == queue


@dataclass(frozen=True)
class NewArtifact:
    """An artifact about to be recorded. `size` in bytes."""

    name: str
    key: str
    uri: str
    size: int
    sha256: str


def claim(
    session: Session,
    job_id: str,
    stage: StageName,
    *,
    worker: str,
    lease_seconds: float,
    deadline_seconds: float | None = None,
    max_running_jobs: int | None = None,
) -> Claim | None:
    """Take a queued stage; None when there is nothing to take. One whose lease ran out is first for `retire`.

    A job that waits while its project or key runs as many as it may is held back, for `due` to send later.
    """
    try:
        job = jobs.lock(session, job_id)
    except JobNotFound:
        return None
    row = session.get_one(StageRow, (job_id, stage), populate_existing=True)
    if job.status not in (JobStatus.QUEUED, JobStatus.RUNNING) or row.status != StageStatus.QUEUED:
        return None
    if job.status == JobStatus.QUEUED and not quotas.may_run(session, job, max_running_jobs):
        quotas.hold_back(row)
        return None
    row.status, row.message, row.not_before = StageStatus.RUNNING, "", None
    row.attempt += 1
    row.worker = worker
    row.lease_expires_at = now() + timedelta(seconds=lease_seconds)
    row.started_at = row.started_at or now()
    job.status = JobStatus.RUNNING
    job.started_at = job.started_at or now()
    message = (
        f"Stage {stage} started." if row.attempt == 1 else f"Stage {stage} taken up again (attempt {row.attempt})."
    )
    session.flush()
    events.append(
        session, job_id, "stage.started", message, stage=stage, data={"attempt": row.attempt, "worker": worker}
    )
    deadline = _deadline(row, job.spec.get("deadline_seconds"), deadline_seconds)
    sent = row.sent_at is not None
    return Claim(job_id, stage, row.attempt, deadline, queue=job.queue, sent=sent, trace=job.trace or {})


def _deadline(row: StageRow, *limits_s: float | None) -> datetime | None:
    """When a stage that was started is out of time, by the strictest of its limits."""
    given = [limit for limit in limits_s if limit is not None]
    return row.started_at + timedelta(seconds=min(given)) if given and row.started_at is not None else None


def _current(session: Session, claim: Claim) -> tuple[JobRow, StageRow]:
    """The job and stage of a claim, the job locked. Raises: LeaseLost."""
    try:
        job = jobs.lock(session, claim.job_id)
    except JobNotFound as error:
        raise LeaseLost(f"{claim.stage} of {claim.job_id}: the job was deleted") from error
    row = session.get_one(StageRow, (claim.job_id, claim.stage), populate_existing=True)
    if row.status != StageStatus.RUNNING or row.attempt != claim.attempt:
        raise LeaseLost(f"{claim.stage} of {claim.job_id}: attempt {claim.attempt} is no longer the one that counts")
    return job, row


def renew(session: Session, claim: Claim, *, lease_seconds: float) -> bool:
    """Renew the lease. True when the stage is to be stopped: its job is cancelled or paused. Raises: LeaseLost."""
    job, row = _current(session, claim)
    row.lease_expires_at = now() + timedelta(seconds=lease_seconds)
    return job.status in STOPPING


def record_progress(session: Session, claim: Claim, *, progress: float, message: str, data: Mapping[str, Any]) -> None:
    """Record progress (0…1) and announce it. Raises: LeaseLost."""
    _, row = _current(session, claim)
    row.progress, row.message = min(max(progress, 0.0), 1.0), message
    event_data = {"progress": round(row.progress, 4), **data}
    session.flush()
    events.append(session, claim.job_id, "stage.progress", message, stage=claim.stage, data=event_data)


def complete(
    session: Session,
    claim: Claim,
    *,
    artifacts: Sequence[NewArtifact],
    metrics: Mapping[str, Any],
    versions: Mapping[str, str],
) -> StageName | None:
    """Record a stage's artifacts and success and queue the next stage, which the caller sends after the commit.

    Raises: LeaseLost.
    """
    job, row = _current(session, claim)
    for artifact in artifacts:
        session.add(ArtifactRow(id=f"art_{uuid7().hex}", job_id=job.id, stage=claim.stage, **vars(artifact)))
    row.status, row.progress, row.message = StageStatus.SUCCEEDED, 1.0, ""
    row.metrics, row.finished_at, row.lease_expires_at = dict(metrics), now(), None
    job.versions = dict(versions)
    job.artifact_bytes += sum(artifact.size for artifact in artifacts)
    session.flush()
    events.append(
        session,
        job.id,
        "stage.succeeded",
        f"Stage {claim.stage} succeeded.",
        stage=claim.stage,
        data={"attempt": claim.attempt, "artifacts": len(artifacts), "metrics": dict(metrics)},
    )
    following = [later for later in jobs.stages(session, [job.id])[job.id] if later.position > row.position]
    if following:
        following[0].status, following[0].sent_at, following[0].sends = StageStatus.QUEUED, now(), 1
        session.flush()
        return None if _finish_stop(session, job) else StageName(following[0].name)
    # Whoever asked to stop it asked too late.
    job.status, job.finished_at = JobStatus.SUCCEEDED, now()
    publications.fall_due(session, job.id)
    session.flush()
    events.append(session, job.id, "job.succeeded", "Job succeeded.")
    return None


def fail(session: Session, claim: Claim, error: ErrorInfo) -> None:
    """Record a stage's failure and with it the job's. Raises: LeaseLost."""
    job, row = _current(session, claim)
    _fail(session, job, row, error)


def _fail(session: Session, job: JobRow, row: StageRow, error: ErrorInfo) -> None:
    details = error.model_dump()
    row.status, row.error, row.finished_at, row.lease_expires_at = StageStatus.FAILED, details, now(), None
    job.status, job.error, job.finished_at = JobStatus.FAILED, details, now()
    for later in jobs.stages(session, [job.id])[job.id]:
        if later.status == StageStatus.PENDING:
            later.status = StageStatus.CANCELLED
    session.flush()
    stage = StageName(row.name)
    events.append(session, job.id, "stage.failed", error.message, stage=stage, data=details)
    events.append(session, job.id, "job.failed", f"Job failed in {stage}: {error.message}", data=details)


def stopped(session: Session, claim: Claim) -> None:
    """Record that the worker stopped a stage because its job is cancelled or paused. Raises: LeaseLost."""
    job, _ = _current(session, claim)
    _finish_stop(session, job)


def _finish_stop(session: Session, job: JobRow) -> bool:
    """Finish what a locked job was asked for; False when it was asked for nothing."""
    if job.status == JobStatus.CANCELLING:
        jobs.finish_cancel(session, job)
    elif job.status == JobStatus.PAUSING:
        jobs.finish_pause(session, job)
    else:
        return False
    return True


def expired(session: Session) -> list[tuple[str, StageName]]:
    """Running stages whose lease ran out."""
    rows = session.exec(
        select(StageRow).where(StageRow.status == StageStatus.RUNNING, col(StageRow.lease_expires_at) < now())
    )
    return [(row.job_id, StageName(row.name)) for row in rows]


def retire(session: Session, job_id: str, stage: StageName, *, max_attempts: int) -> bool:
    """Give up a dead worker's lease: queue the stage again, finish its stopping, or fail after `max_attempts`.

    False when its lease is no longer a dead one.
    """
    job, row = _running(session, job_id, stage)
    if job is None or row is None or row.lease_expires_at is None or row.lease_expires_at >= now():
        return False
    _requeue(session, job, row, f"Worker {row.worker} fell silent", max_attempts=max_attempts)
    return True


def _running(session: Session, job_id: str, stage: StageName) -> tuple[JobRow, StageRow] | tuple[None, None]:
    """A running stage and its job, locked; or nothing, also when another process is just changing the job.

    Nobody waits for that process: it may have been stopped in the middle of its transaction.
    """
    job = jobs.lock_if_free(session, job_id)
    if job is None:
        return None, None
    row = session.get_one(StageRow, (job_id, stage), populate_existing=True)
    return (job, row) if row.status == StageStatus.RUNNING else (None, None)


def overdue(session: Session, *, deadline_seconds: float | None, grace_seconds: float) -> list[tuple[str, StageName]]:
    """Running stages that are so much past their deadline that their workers must be hanging."""
    own_limit = col(JobRow.spec)["deadline_seconds"].as_float()
    rows = session.exec(
        select(StageRow, own_limit).join(JobRow).where(StageRow.status == StageStatus.RUNNING, jobs.EXISTS)
    ).all()
    return [
        (row.job_id, StageName(row.name))
        for row, own_seconds in rows
        if _is_late(_deadline(row, own_seconds, deadline_seconds), grace_seconds)
    ]


def _is_late(deadline: datetime | None, grace_seconds: float) -> bool:
    return deadline is not None and deadline + timedelta(seconds=grace_seconds) < now()


def time_out(
    session: Session, job_id: str, stage: StageName, *, deadline_seconds: float | None, grace_seconds: float
) -> None:
    """Fail a stage that is `overdue`, or finish the stopping that its worker does not get to."""
    job, row = _running(session, job_id, stage)
    if job is None or row is None:
        return
    deadline = _deadline(row, job.spec.get("deadline_seconds"), deadline_seconds)
    if not _is_late(deadline, grace_seconds) or _finish_stop(session, job):
        return
    error = DeadlineExceeded(f"Stage {stage} is past its deadline, and worker {row.worker} does not stop.")
    _fail(session, job, row, ErrorInfo(code=error.code, message=error.message, param=error.param))


def release(session: Session, claim: Claim, reason: str, *, max_attempts: int, pause_seconds: float) -> None:
    """Hand a stage back after a fault that may pass, as `retire` does for a dead worker. Raises: LeaseLost.

    It rests for a pause that doubles with every attempt: the fault needs time to pass.
    """
    job, row = _current(session, claim)
    _requeue(session, job, row, reason, max_attempts=max_attempts)
    if row.status == StageStatus.QUEUED:
        row.not_before = now() + _pause(pause_seconds, row.attempt - row.attempts_forgiven)


def hand_back(session: Session, claim: Claim) -> None:
    """Queue a stage again because its worker is to end. It costs no attempt; the caller sends it.

    Raises: LeaseLost.
    """
    job, row = _current(session, claim)
    if _finish_stop(session, job):
        return
    row.status, row.lease_expires_at, row.sends, row.sent_at = StageStatus.QUEUED, None, 1, now()
    row.attempts_forgiven += 1
    session.flush()
    message = f"Worker {row.worker} is being stopped; stage {row.name} is queued again."
    stage = StageName(row.name)
    events.append(session, job.id, "stage.requeued", message, stage=stage, data={"attempt": row.attempt})


def _requeue(session: Session, job: JobRow, row: StageRow, reason: str, *, max_attempts: int) -> None:
    if _finish_stop(session, job):
        return
    attempts = row.attempt - row.attempts_forgiven
    if attempts >= max_attempts:
        _fail(
            session,
            job,
            row,
            ErrorInfo(code="attempts_exhausted", message=f"Given up after {attempts} attempts. {reason}."),
        )
        return
    row.status, row.lease_expires_at, row.sends, row.sent_at = StageStatus.QUEUED, None, 0, None
    session.flush()
    events.append(
        session,
        job.id,
        "stage.requeued",
        f"{reason}; stage {row.name} is queued again.",
        stage=StageName(row.name),
        data={"attempt": row.attempt},
    )


def due(
    session: Session, *, resend_seconds: float, max_running_jobs: int | None = None, at: datetime | None = None
) -> list[tuple[str, StageName]]:
    """Queued stages to send (again), at most `DUE_AT_ONCE`: never sent, or sent `resend_seconds` · 2^(sends − 1) ago.

    Marks them sent. Of jobs that wait for others of their project or key to end, the most urgent go as soon as there
    are slots for them.
    """
    at = at or now()
    waited = _waited(at, resend_seconds)
    under_way = and_(col(StageRow.sent_at).is_not(None), not_(waited))
    slots = quotas.Slots(session, max_running_jobs, sent=under_way)
    rows = session.exec(
        select(StageRow, JobRow.project, JobRow.api_key, JobRow.status)
        .join(JobRow)
        .where(StageRow.status == StageStatus.QUEUED, waited, rested(at), slots.left)
        .order_by(PRIORITY, col(JobRow.started_at).nulls_last(), col(StageRow.job_id))
        .limit(DUE_AT_ONCE)
        .with_for_update(of=StageRow, skip_locked=True)
    ).all()
    sent = []
    for row, project, api_key, status in rows:
        begins = status == JobStatus.QUEUED
        if not begins or slots.take(project, api_key):
            row.sent_at, row.sends, row.message = at, row.sends + 1, "" if begins else row.message
            row.not_before = None  # The worker's clock may be behind.
            sent.append((row.job_id, StageName(row.name)))
    return sent


def _pause(seconds: float, number: int) -> timedelta:
    """A pause that doubles with its number, from 1 on, up to a bound."""
    return timedelta(seconds=seconds * 2 ** (min(number, MOST_DOUBLED) - 1))


def _waited(at: datetime, resend_seconds: float) -> ColumnElement[bool]:
    """Whether a stage has waited for as long as its sends before demand."""
    sends, sent_at = col(StageRow.sends), col(StageRow.sent_at)
    waits = [_pause(resend_seconds, number) for number in range(1, MOST_DOUBLED + 1)]
    between = [and_(sends == number, sent_at < at - wait) for number, wait in enumerate(waits, 1)]
    return or_(
        sent_at.is_(None),
        and_(sends < 1, sent_at < at - waits[0]),
        *between,
        and_(sends > MOST_DOUBLED, sent_at < at - waits[-1]),
    )


def not_sent(session: Session, job_ids: Sequence[str]) -> None:
    """Take back that the queued stages of jobs were sent: they are due at once."""
    session.exec(
        update(StageRow)
        .where(col(StageRow.job_id).in_(job_ids), col(StageRow.status) == StageStatus.QUEUED)
        .values(sent_at=None, sends=col(StageRow.sends) - 1)
        .execution_options(synchronize_session=False)
    )
