"""Queries on jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import ColumnElement, cast, insert
from sqlalchemy.dialects.postgresql import JSONB
from sqlmodel import Session, col, select
from sqlmodel.sql.expression import SelectOfScalar
from uuid_utils import uuid7

from pdtrim.contract.access import Quotas
from pdtrim.contract.errors import (
    CursorNotFound,
    DeadlineExceeded,
    JobNotCancellable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    PDTrimError,
)
from pdtrim.contract.jobs import Action, JobStatus, Stage, StageName, StageStatus
from pdtrim.contract.publications import PublicationTarget
from pdtrim.contract.spec import JobSpec
from service.db import events, publications, quotas
from service.db.specs import spec_of
from service.db.tables import JobRow, StageRow, now
from service.observing import tracing

EXISTS = col(JobRow.deleted_at).is_(None)
LOOKED_THROUGH = 100


def insert_new(
    session: Session,
    spec: JobSpec,
    *,
    project: str,
    api_key: str | None,
    limits: Quotas,
    model_revision: str | None,
    default_queue: str,
    cut_from: str | None = None,
    targets: Sequence[PublicationTarget] = (),
) -> tuple[JobRow, list[Stage], bool]:
    """Insert a job, its stages and its first event. Returns, beside job and stages, whether the first of them is to be
    sent after the commit, rather than held back until fewer others run.

    Past the unit of work, whose bookkeeping takes more than the statements do: a submission is to be quick. So the
    row returned is only to be looked at. `limits` are the project's; `default_queue` is for jobs that name none.
    Raises: QueueQuotaExceeded, ArtifactQuotaExceeded.
    """
    sent = quotas.admit(session, project, api_key, limits)
    job = JobRow(
        id=f"job_{uuid7().hex}",
        project=project,
        api_key=api_key,
        status=JobStatus.QUEUED,
        queue=spec.queue or default_queue,
        priority=spec.priority,
        spec=spec.model_dump(mode="json"),
        labels=dict(spec.metadata),
        model_revision=model_revision,
        cut_from=cut_from,
        trace=tracing.carried(),
        last_event=1,
    )
    first = {"status": StageStatus.QUEUED, **_sending(sent)}
    waiting = {"status": StageStatus.PENDING, "sent_at": None, "sends": 0, "message": ""}
    stages = [
        {"job_id": job.id, "name": name, "position": position, "attempt": 0, "progress": 0.0}
        | (waiting if position else first)
        for position, name in enumerate(StageName)
    ]
    connection = session.connection()
    connection.execute(insert(JobRow), job.model_dump())
    connection.execute(insert(StageRow), stages)
    message = "Job created." if cut_from is None else f"Job created, cut from the frontier of {cut_from}."
    publications.add(session, job.id, targets)
    events.begin(session, job, "job.created", message)
    return job, [Stage.model_validate(stage) for stage in stages], sent


def _sending(sent: bool) -> dict[str, Any]:
    """What a queued stage says of its message: it is under way, or held back."""
    return (
        {"sent_at": now(), "sends": 1, "message": ""}
        if sent
        else {"sent_at": None, "sends": 0, "message": quotas.HELD_BACK}
    )


def _queue(stage: StageRow, *, sent: bool) -> None:
    stage.status = StageStatus.QUEUED
    stage.sqlmodel_update(_sending(sent))


def is_sent(stages: Sequence[StageRow]) -> bool:
    """Whether a job's queued stage goes to the broker now, rather than being held back until fewer others run."""
    return any(stage.status == StageStatus.QUEUED and stage.sent_at is not None for stage in stages)


def get(session: Session, job_id: str) -> JobRow:
    """The job. Raises: JobNotFound."""
    row = session.get(JobRow, job_id)
    if row is None or row.deleted_at is not None:
        raise JobNotFound(f"No job {job_id} exists. List the jobs with GET /v1/jobs.")
    return row


def check_project(session: Session, job_id: str, project: str) -> None:
    """Raises: JobNotFound when the project has no such job, whether another has it or not."""
    found = select(JobRow.id).where(JobRow.id == job_id, JobRow.project == project, EXISTS)
    if session.exec(found).first() is None:
        raise JobNotFound(f"No job {job_id} exists. List the jobs with GET /v1/jobs.")


def lock(session: Session, job_id: str) -> JobRow:
    """The job, locked until the transaction ends; every change of a job or stage begins here. Raises: JobNotFound."""
    row = session.exec(_locked(job_id)).first()
    if row is None:
        raise JobNotFound(f"No job {job_id} exists. List the jobs with GET /v1/jobs.")
    return row


def lock_if_free(session: Session, job_id: str) -> JobRow | None:
    """The job, locked as by `lock`; None when it does not exist, or another process holds its lock."""
    return session.exec(_locked(job_id, skip_locked=True)).first()


def _locked(job_id: str, *, skip_locked: bool = False) -> SelectOfScalar[JobRow]:
    query = select(JobRow).where(JobRow.id == job_id, EXISTS).with_for_update(skip_locked=skip_locked)
    return query.execution_options(populate_existing=True)


def stages(session: Session, job_ids: list[str]) -> dict[str, list[StageRow]]:
    """The stages of jobs in their order, by job."""
    found: dict[str, list[StageRow]] = {job_id: [] for job_id in job_ids}
    rows = session.exec(select(StageRow).where(col(StageRow.job_id).in_(job_ids)).order_by(col(StageRow.position)))
    for row in rows:
        found[row.job_id].append(row)
    return found


def queues(session: Session, job_ids: list[str]) -> dict[str, str]:
    """The queues of jobs, by job; those that are gone are left out."""
    return dict(session.exec(select(JobRow.id, JobRow.queue).where(col(JobRow.id).in_(job_ids))).all())


def page(
    session: Session,
    project: str,
    *,
    limit: int,
    after: str | None = None,
    status: JobStatus | None = None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[list[JobRow], bool]:
    """Jobs of a project, newest first, and whether more follow. Raises: CursorNotFound."""
    query = select(JobRow).where(JobRow.project == project, EXISTS)
    if status is not None:
        query = query.where(JobRow.status == status)
    if metadata:
        query = query.where(*_labelled(session, metadata))
    if after is not None:
        cursor = session.get(JobRow, after)
        if cursor is None or cursor.project != project or cursor.deleted_at is not None:
            raise CursorNotFound(f"`after` names no job: {after}", param="after")
        query = query.where(JobRow.id < after)
    rows = session.exec(query.order_by(col(JobRow.id).desc()).limit(limit + 1)).all()
    return list(rows[:limit]), len(rows) > limit


def newest_like(session: Session, project: str, source: str) -> tuple[str, JobSpec, list[StageRow]] | None:
    """The newest of the project's last jobs that succeeded on a model, and its stages; none that was cut."""
    recent = (
        select(JobRow.id)
        .where(JobRow.project == project, JobRow.status == JobStatus.SUCCEEDED, EXISTS, col(JobRow.cut_from).is_(None))
        .order_by(col(JobRow.id).desc())
        .limit(LOOKED_THROUGH)
        .subquery()
    )
    on_model = col(JobRow.spec)["model"]["source"].as_string() == source
    found = session.exec(
        select(JobRow).join(recent, recent.c.id == JobRow.id).where(on_model).order_by(col(JobRow.id).desc()).limit(1)
    ).first()
    return None if found is None else (found.id, spec_of(found), stages(session, [found.id])[found.id])


def _labelled(session: Session, labels: Mapping[str, str]) -> list[ColumnElement[bool]]:
    """Whether a job carries labels; on PostgreSQL as its index on them can tell."""
    if session.get_bind().dialect.name == "postgresql":
        return [cast(col(JobRow.labels), JSONB).contains(dict(labels))]
    return [col(JobRow.labels)[key].as_string() == value for key, value in labels.items()]


def check_possible(job: JobRow, asked: Action, refusal: type[PDTrimError]) -> None:
    """Raises: `refusal`, saying what the job's state is and what it allows."""
    possible = JobStatus(job.status).possible
    if asked not in possible:
        allowed = ", ".join(possible) or "nothing, until that is done"
        raise refusal(f"Job {job.id} is {job.status}: {asked} is not possible. Possible now: {allowed}.")


def request_cancel(session: Session, job_id: str) -> JobRow:
    """Cancel a job: at once when no worker holds a stage, else by asking the worker. Idempotent while cancelling.

    Raises: JobNotFound; JobNotCancellable when the job succeeded or failed.
    """
    job = lock(session, job_id)
    if job.status in (JobStatus.CANCELLING, JobStatus.CANCELLED):
        return job
    check_possible(job, Action.CANCEL, JobNotCancellable)
    if _has_worker(session, job_id):
        job.status = JobStatus.CANCELLING
        events.append(session, job_id, "job.cancelling", "Cancellation requested; the running stage is being stopped.")
    else:
        finish_cancel(session, job)
    session.refresh(job)
    return job


def finish_cancel(session: Session, job: JobRow) -> None:
    """Mark a locked job and its unfinished stages cancelled."""
    for row in stages(session, [job.id])[job.id]:
        if row.status != StageStatus.SUCCEEDED:
            row.status = StageStatus.CANCELLED
            row.lease_expires_at = None
            row.paused_at, row.finished_at = None, row.paused_at or now()
    job.status = JobStatus.CANCELLED
    job.finished_at = now()
    session.flush()
    events.append(session, job.id, "job.cancelled", "Job cancelled.")


def request_pause(session: Session, job_id: str) -> JobRow:
    """Pause a job: at once when no worker holds a stage, else by asking the worker. Idempotent until it is resumed.

    Raises: JobNotFound; JobNotPausable when the job is finished or being cancelled.
    """
    job = lock(session, job_id)
    if job.status in (JobStatus.PAUSING, JobStatus.PAUSED):
        return job
    check_possible(job, Action.PAUSE, JobNotPausable)
    if _has_worker(session, job_id):
        job.status = JobStatus.PAUSING
        events.append(session, job_id, "job.pausing", "Pause requested; the running stage is being stopped.")
    else:
        finish_pause(session, job)
    session.refresh(job)
    return job


def finish_pause(session: Session, job: JobRow) -> None:
    """Mark a locked job paused, and the stage whose turn it is."""
    for row in stages(session, [job.id])[job.id]:
        if row.status in (StageStatus.QUEUED, StageStatus.RUNNING):
            row.status, row.lease_expires_at, row.paused_at = StageStatus.PAUSED, None, now()
    job.status = JobStatus.PAUSED
    session.flush()
    events.append(session, job.id, "job.paused", "Job paused.")


def resume(session: Session, job_id: str, *, limits: Quotas = quotas.NONE) -> tuple[JobRow, StageName]:
    """Queue the first unfinished stage of a paused, failed or cancelled job, as if no attempt at it had been made.

    Returns the job and that stage, which the caller sends after the commit if `is_sent`. `limits` are the project's.
    Raises: JobNotFound; JobNotResumable; QueueQuotaExceeded, ArtifactQuotaExceeded.
    """
    job = lock(session, job_id)
    check_possible(job, Action.RESUME, JobNotResumable)
    sent = quotas.admit(session, job.project, job.api_key, limits)
    unfinished = [row for row in stages(session, [job_id])[job_id] if row.status != StageStatus.SUCCEEDED]
    for row in unfinished:
        stopped_at = row.paused_at or row.finished_at
        if row.error is not None and row.error["code"] == DeadlineExceeded.code:
            # What took too long gets as much time again.
            row.started_at, row.progress = None, 0.0
        elif row.started_at is not None and stopped_at is not None:
            # So that the time between start and finish stays the time it ran, and the finish can be estimated from it.
            row.started_at += now() - stopped_at
        row.status, row.error, row.message = StageStatus.PENDING, None, ""
        row.paused_at = row.finished_at = None
    first = unfinished[0]
    _queue(first, sent=sent)
    first.attempts_forgiven, first.not_before = first.attempt, None
    job.status, job.error, job.finished_at = JobStatus.QUEUED, None, None
    job.trace = tracing.carried()
    session.flush()
    stage = StageName(first.name)
    events.append(session, job_id, "job.resumed", f"Job resumed with stage {stage}.", data={"stage": stage})
    session.refresh(job)
    return job, stage


def _has_worker(session: Session, job_id: str) -> bool:
    return any(row.status == StageStatus.RUNNING for row in stages(session, [job_id])[job_id])
