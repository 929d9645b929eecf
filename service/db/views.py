"""Database rows as the interface shows them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from pydantic import TypeAdapter

from pdtrim.contract.jobs import AnyStage, Artifact, ErrorInfo, Event, Job, JobStatus, Page, Stage, StageStatus
from pdtrim.contract.publications import Publication
from pdtrim.contract.webhooks import Delivery, Webhook
from service.db.specs import spec_of
from service.db.tables import ArtifactRow, DeliveryRow, EventRow, JobRow, PublicationRow, StageRow, WebhookRow, now

STAGES: TypeAdapter[list[AnyStage]] = TypeAdapter(list[AnyStage])
LEAST_PROGRESS = 0.01  # Below it, an extrapolation says nothing.


def job(row: JobRow, stages: Sequence[StageRow | Stage]) -> Job:
    """The job with its stages and the finish that its progress promises."""
    return Job(
        id=row.id,
        status=JobStatus(row.status),
        spec=spec_of(row),
        queue=row.queue,
        metadata=row.labels,
        stages=STAGES.validate_python(list(stages)),
        error=None if row.error is None else ErrorInfo.model_validate(row.error),
        model_revision=row.model_revision,
        cut_from=row.cut_from,
        versions=row.versions,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        estimated_finish=estimated_finish(row, stages, at=now()),
    )


def estimated_finish(row: JobRow, stages: Sequence[StageRow | Stage], *, at: datetime) -> datetime | None:
    """When the running stage ends if it goes on as fast as so far; None where there is too little to go by.

    Stages that have not begun count nothing: how long they take depends on what this one finds.
    """
    running = [stage for stage in stages if stage.status == StageStatus.RUNNING]
    if row.status != JobStatus.RUNNING or not running:
        return None
    stage = running[0]
    if stage.started_at is None or stage.progress < LEAST_PROGRESS:
        return None
    elapsed = (at - stage.started_at).total_seconds()
    return at + timedelta(seconds=elapsed * (1.0 - stage.progress) / stage.progress)


def jobs(rows: Sequence[JobRow], stages: dict[str, list[StageRow]], has_more: bool) -> Page[Job]:
    """A page of jobs."""
    return Page[Job](
        data=[job(row, stages[row.id]) for row in rows],
        has_more=has_more,
        first_id=rows[0].id if rows else None,
        last_id=rows[-1].id if rows else None,
    )


def events(rows: Sequence[EventRow], has_more: bool) -> Page[Event]:
    """A page of events; its ids are their numbers."""
    return Page[Event](
        data=[Event.model_validate(row) for row in rows],
        has_more=has_more,
        first_id=str(rows[0].number) if rows else None,
        last_id=str(rows[-1].number) if rows else None,
    )


def artifacts(rows: Sequence[ArtifactRow], has_more: bool) -> Page[Artifact]:
    """A page of artifacts."""
    return Page[Artifact](
        data=[Artifact.model_validate(row) for row in rows],
        has_more=has_more,
        first_id=rows[0].id if rows else None,
        last_id=rows[-1].id if rows else None,
    )


def webhooks(rows: Sequence[WebhookRow], has_more: bool) -> Page[Webhook]:
    """A page of webhooks."""
    return Page[Webhook](
        data=[Webhook.model_validate(row) for row in rows],
        has_more=has_more,
        first_id=rows[0].id if rows else None,
        last_id=rows[-1].id if rows else None,
    )


def deliveries(rows: Sequence[DeliveryRow], has_more: bool) -> Page[Delivery]:
    """A page of deliveries."""
    return Page[Delivery](
        data=[Delivery.model_validate(row) for row in rows],
        has_more=has_more,
        first_id=rows[0].id if rows else None,
        last_id=rows[-1].id if rows else None,
    )


def publications(rows: Sequence[PublicationRow]) -> Page[Publication]:
    """All of a job's publications; there are few."""
    return Page[Publication](
        data=[Publication.model_validate(row) for row in rows],
        has_more=False,
        first_id=rows[0].target if rows else None,
        last_id=rows[-1].target if rows else None,
    )
