"""The tables. Alembic's migrations create them; these classes only describe them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Index, String, UniqueConstraint, text
from sqlalchemy.types import TypeDecorator
from sqlmodel import Field, SQLModel

from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.publications import PublicationStatus, PublicationTarget
from pdtrim.contract.queues import DEFAULT_QUEUE, Priority
from pdtrim.contract.webhooks import DeliveryStatus, DisabledReason, MessageFormat
from service.observing.redaction import redact, scrub


def now() -> datetime:
    """The current time, with its zone."""
    return datetime.now(UTC)


class UtcDateTime(TypeDecorator[datetime]):
    """A point in time in UTC; SQLite keeps no zone, so it is put back on the way out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value is not None and value.tzinfo is None else value


class RedactedText(TypeDecorator[str]):
    """Text for users, from which secrets are taken on the way in."""

    impl = String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else redact(value)


class RedactedJson(TypeDecorator[Any]):
    """Data for users, from which secrets are taken on the way in."""

    impl = JSON
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return scrub(value)


Name = String(32)
ALIVE = text("deleted_at IS NULL")
BEGAN = text("started_at IS NOT NULL")
KEPT = text("artifact_bytes > 0 AND deleted_at IS NULL")


class JobRow(SQLModel, table=True):
    """A job. Its id is a UUID version 7, so ids sort by creation.

    With `deleted_at` it exists for the reconciler alone, which has its files to delete, and then this row.
    `api_key` is the prefix of the key that it was made with, `artifact_bytes` the size of what its stages recorded.
    `cut_from` is the job from whose frontier it was cut, which may be gone. `trace` holds the headers that make its
    stages part of the trace of the request that queued it.
    PostgreSQL has an index of `labels` too.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_project_id", "project", "id"),
        Index("ix_jobs_project_status_id", "project", "status", "id"),
        Index("ix_jobs_project_started_at", "project", "started_at", postgresql_where=BEGAN, sqlite_where=BEGAN),
        Index("ix_jobs_finished_at", "finished_at", postgresql_where=ALIVE, sqlite_where=ALIVE),
        Index("ix_jobs_kept", "project", "api_key", "artifact_bytes", postgresql_where=KEPT, sqlite_where=KEPT),
    )

    id: str = Field(primary_key=True, max_length=40)
    project: str = Field(default=DEFAULT_PROJECT, max_length=64)
    api_key: str | None = Field(default=None, max_length=12)
    status: JobStatus = Field(sa_type=Name, index=True)
    queue: str = Field(default=DEFAULT_QUEUE, max_length=48)
    priority: Priority = Field(default=Priority.NORMAL, sa_type=Name)
    spec: dict[str, Any] = Field(sa_type=JSON)
    labels: dict[str, str] = Field(sa_type=JSON)
    model_revision: str | None = None
    cut_from: str | None = Field(default=None, max_length=40)
    versions: dict[str, str] = Field(default_factory=dict, sa_type=JSON)
    trace: dict[str, str] | None = Field(default=None, sa_type=JSON)
    error: dict[str, Any] | None = Field(default=None, sa_type=RedactedJson)
    last_event: int = 0
    artifact_bytes: int = Field(default=0, sa_type=BigInteger)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    deleted_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)


class StageRow(SQLModel, table=True):
    """A stage of a job. `attempt` numbers the claims of it and fences out workers whose lease was taken over.

    A queued one with `sent_at` has a message under way that wakes a worker; one with `not_before` rests until then.
    A resume forgives the attempts before it: they stay numbered, and no longer count against the most allowed.
    """

    __tablename__ = "stages"
    __table_args__ = (Index("ix_stages_status_lease", "status", "lease_expires_at"),)

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", max_length=40, ondelete="CASCADE")
    name: StageName = Field(primary_key=True, sa_type=Name)
    position: int
    status: StageStatus = Field(sa_type=Name)
    attempt: int = 0
    attempts_forgiven: int = 0
    worker: str | None = None
    lease_expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    sends: int = 0
    sent_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    not_before: datetime | None = Field(default=None, sa_type=UtcDateTime)
    progress: float = 0.0
    message: str = Field(default="", sa_type=RedactedText)
    metrics: dict[str, Any] = Field(default_factory=dict, sa_type=JSON)
    error: dict[str, Any] | None = Field(default=None, sa_type=RedactedJson)
    started_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    paused_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    finished_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class EventRow(SQLModel, table=True):
    """An event of a job."""

    __tablename__ = "events"

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", max_length=40, ondelete="CASCADE")
    number: int = Field(primary_key=True)
    type: str = Field(max_length=32)
    stage: StageName | None = Field(default=None, sa_type=Name)
    message: str = Field(sa_type=RedactedText)
    data: dict[str, Any] = Field(default_factory=dict, sa_type=RedactedJson)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class ArtifactRow(SQLModel, table=True):
    """A file in the artifact store, recorded by the transaction that completed its stage."""

    __tablename__ = "artifacts"
    __table_args__ = (UniqueConstraint("job_id", "stage", "name"),)

    id: str = Field(primary_key=True, max_length=40)
    job_id: str = Field(foreign_key="jobs.id", max_length=40, ondelete="CASCADE")
    stage: StageName = Field(sa_type=Name)
    name: str = Field(max_length=512)
    key: str = Field(max_length=1024)
    uri: str = Field(max_length=2048)
    size: int = Field(sa_type=BigInteger)
    sha256: str = Field(max_length=64)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class IdempotencyRow(SQLModel, table=True):
    """A client's name for a request to create a job. Without `job_id` the request is not answered yet.

    `token` names the request that holds the key and fences out one whose claim was taken over.
    """

    __tablename__ = "idempotency_keys"

    project: str = Field(primary_key=True, max_length=64)
    key: str = Field(primary_key=True, max_length=128)
    fingerprint: str = Field(max_length=64)
    token: str = Field(max_length=32)
    job_id: str | None = Field(default=None, foreign_key="jobs.id", max_length=40, ondelete="CASCADE", index=True)
    response: dict[str, Any] | None = Field(default=None, sa_type=JSON)
    reserved_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)


class ApiKeyRow(SQLModel, table=True):
    """An API key. Its secret is not here, only the SHA-256 of it. A limit that is empty is the service's."""

    __tablename__ = "api_keys"

    prefix: str = Field(primary_key=True, max_length=12)
    secret_sha256: str = Field(max_length=64)
    project: str = Field(max_length=64)
    name: str = Field(max_length=128)
    scopes: list[str] = Field(sa_type=JSON)
    rate_limit: str | None = Field(default=None, max_length=32)
    max_running_jobs: int | None = None
    max_queued_jobs: int | None = None
    max_artifact_bytes: int | None = Field(default=None, sa_type=BigInteger)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
    expires_at: datetime | None = Field(default=None, sa_type=UtcDateTime)
    revoked_at: datetime | None = Field(default=None, sa_type=UtcDateTime)


class WebhookRow(SQLModel, table=True):
    """A webhook. Its secrets are kept as they are: whoever signs with them has to know them.

    After a rotation the earlier secret signs too, until `previous_secret_until`. `failing_since` is the first failure
    since the last success.
    """

    __tablename__ = "webhooks"
    __table_args__ = (Index("ix_webhooks_project_id", "project", "id"),)

    id: str = Field(primary_key=True, max_length=40)
    project: str = Field(max_length=64)
    url: str = Field(max_length=2048)
    events: list[str] = Field(sa_type=JSON)
    description: str = Field(max_length=512)
    format: MessageFormat = Field(sa_type=Name)
    secret: str = Field(max_length=64)
    previous_secret: str | None = Field(default=None, max_length=64)
    previous_secret_until: datetime | None = Field(default=None, sa_type=UtcDateTime)
    enabled: bool = True
    disabled_reason: DisabledReason | None = Field(default=None, sa_type=Name)
    failing_since: datetime | None = Field(default=None, sa_type=UtcDateTime)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class DeliveryRow(SQLModel, table=True):
    """A message to a webhook, written by the transaction that records the event it announces.

    `next_attempt_at` says when it is due; a sender that claims it moves that on by a lease. `attempt` numbers the
    claims and fences out a sender whose lease ran out; `attempts_forgiven` is as in a stage. It outlives its job.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (Index("ix_webhook_deliveries_webhook_id_id", "webhook_id", "id"),)

    id: str = Field(primary_key=True, max_length=40)
    webhook_id: str = Field(foreign_key="webhooks.id", max_length=40, ondelete="CASCADE")
    job_id: str | None = Field(default=None, max_length=40)
    type: str = Field(max_length=32)
    data: dict[str, Any] = Field(sa_type=RedactedJson)
    status: DeliveryStatus = Field(sa_type=Name)
    attempt: int = 0
    attempts_forgiven: int = 0
    attempts: list[dict[str, Any]] = Field(default_factory=list, sa_type=RedactedJson)
    next_attempt_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    created_at: datetime = Field(default_factory=now, sa_type=UtcDateTime, index=True)


class PublicationRow(SQLModel, table=True):
    """A job's results on their way to a target, written with the job and due from its success on.

    `attempt` numbers the claims and fences out a publisher whose lease ran out; a claim moves `next_attempt_at` on.
    """

    __tablename__ = "publications"

    job_id: str = Field(primary_key=True, foreign_key="jobs.id", max_length=40, ondelete="CASCADE")
    target: PublicationTarget = Field(primary_key=True, sa_type=Name)
    status: PublicationStatus = Field(sa_type=Name)
    attempt: int = 0
    attempts_forgiven: int = 0
    error: str = Field(default="", sa_type=RedactedText)
    urls: list[str] = Field(default_factory=list, sa_type=RedactedJson)
    next_attempt_at: datetime | None = Field(default=None, sa_type=UtcDateTime, index=True)
    updated_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)


class DeviceRow(SQLModel, table=True):
    """A kind of worker in a queue: what it computes on, and how fast that was when the last of them started."""

    __tablename__ = "devices"

    queue: str = Field(primary_key=True, max_length=48)
    kind: str = Field(primary_key=True, max_length=8)
    name: str = Field(primary_key=True, max_length=128)
    count: int = Field(primary_key=True)
    memory_bytes: int = Field(primary_key=True, sa_type=BigInteger)
    host_bytes: int = Field(sa_type=BigInteger)
    disk_bytes: int = Field(sa_type=BigInteger)
    flops: float
    bfloat16_flops: float | None = None
    bytes_per_second: float
    call_seconds: float
    seen_at: datetime = Field(default_factory=now, sa_type=UtcDateTime)
