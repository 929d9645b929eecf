"""Webhooks, their deliveries, and the messages that they send."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, StrictBool

from pdtrim.contract.base import NO_NUL, SpecModel, storable
from pdtrim.contract.jobs import AnswerModel, ErrorInfo, JobStatus, StageName

MAX_WEBHOOKS = 50
"""For each project: every event of a job looks at all of them."""
MAX_MESSAGE = 2000
TEST_EVENT = "webhook.test"


class WebhookEvent(StrEnum):
    """What a webhook can announce: every event of a job but its progress."""

    JOB_CREATED = "job.created"
    JOB_PAUSING = "job.pausing"
    JOB_PAUSED = "job.paused"
    JOB_RESUMED = "job.resumed"
    JOB_CANCELLING = "job.cancelling"
    JOB_CANCELLED = "job.cancelled"
    JOB_FAILED = "job.failed"
    JOB_SUCCEEDED = "job.succeeded"
    STAGE_STARTED = "stage.started"
    STAGE_REQUEUED = "stage.requeued"
    STAGE_FAILED = "stage.failed"
    STAGE_SUCCEEDED = "stage.succeeded"


class MessageFormat(StrEnum):
    """How a message is written: as Standard Webhooks has it, or as CloudEvents 1.0 structured JSON."""

    STANDARD = "standard"
    CLOUDEVENTS = "cloudevents"


class DisabledReason(StrEnum):
    """Why a webhook sends nothing: someone said so, its receiver answered 410, or nothing but failures for days."""

    REQUESTED = "requested"
    GONE = "gone"
    FAILING = "failing"


class DeliveryStatus(StrEnum):
    """Life of a delivery: `pending` until its receiver takes it, or until it is given up."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


def _each_once(events: tuple[WebhookEvent, ...]) -> tuple[WebhookEvent, ...]:
    return tuple(event for event in WebhookEvent if event in events)


Url = Annotated[str, Field(min_length=1, max_length=2048, json_schema_extra=NO_NUL), AfterValidator(storable)]
Events = Annotated[tuple[WebhookEvent, ...], Field(min_length=1, max_length=100), AfterValidator(_each_once)]
Description = Annotated[str, Field(max_length=512, json_schema_extra=NO_NUL), AfterValidator(storable)]


class WebhookSpec(SpecModel):
    """A webhook to be created."""

    url: Url = Field(
        description="Where messages are sent with POST; `https://`, unless the operator allows more.",
        examples=["https://ci.example.com/pdtrim"],
    )
    events: Events = Field(description="What to announce.")
    description: Description = ""
    format: MessageFormat = MessageFormat.STANDARD


class WebhookChange(SpecModel):
    """What to change of a webhook; what is absent or null stays."""

    url: Url | None = None
    events: Events | None = None
    description: Description | None = None
    format: MessageFormat | None = None
    enabled: StrictBool | None = Field(default=None, description="Enabling forgets earlier failures.")


class Webhook(AnswerModel):
    """A webhook, without its secret."""

    object: Literal["webhook"] = "webhook"
    id: str = Field(examples=["wh_0198a3f25e0e7c52b3a0d1f3b6a4c7de"])
    url: str
    events: list[WebhookEvent]
    description: str
    format: MessageFormat
    enabled: bool
    disabled_reason: DisabledReason | None = None
    failing_since: datetime | None = Field(default=None, description="First failure since the last success.")
    created_at: datetime


class NewSecret(Webhook):
    """A webhook with its new signing secret, which is never shown again."""

    secret: str = Field(description="Signs messages as Standard Webhooks has it.", examples=["whsec_…"])


class DeliveryAttempt(AnswerModel):
    """One attempt to deliver a message."""

    number: int = Field(ge=1)
    at: datetime
    seconds: float
    response_code: int | None = Field(default=None, description="Null when there was no answer.")
    error: str = Field(default="", description="Why the attempt failed.")
    excerpt: str = Field(default="", description="Beginning of the answer's body.")


class Delivery(AnswerModel):
    """A message to a webhook. Its id is what the receiver finds in the header `webhook-id`."""

    object: Literal["webhook.delivery"] = "webhook.delivery"
    id: str = Field(examples=["msg_0198a3f25e0e7c52b3a0d1f3b6a4c7de"])
    type: str = Field(examples=["job.succeeded"])
    job_id: str | None = Field(default=None, description="Null in a test.")
    status: DeliveryStatus
    attempts: list[DeliveryAttempt] = Field(description="The latest twenty, oldest first.")
    next_attempt_at: datetime | None = None
    created_at: datetime


class JobFacts(AnswerModel):
    """What a message says about a job."""

    job_id: str
    status: JobStatus = Field(description="The job's, at the time of the event.")
    metadata: dict[str, str] = Field(description="The job's labels.")
    number: int = Field(description="The event's, as in `GET /v1/jobs/{job_id}/events`: messages may overtake others.")
    stage: StageName | None = None
    message: str = Field(max_length=MAX_MESSAGE)
    attempt: int | None = Field(default=None, description="The stage's, where the event is about one.")
    error: ErrorInfo | None = Field(default=None, description="Why job or stage failed.")


class TrialFacts(AnswerModel):
    """What a test message says."""

    webhook_id: str
    message: str


class WebhookMessage(BaseModel):
    """The body of a request to a webhook. With `format: cloudevents`, the `data` of a CloudEvents envelope is the same.

    Receivers verify the headers `webhook-id`, `webhook-timestamp` and `webhook-signature`, ignore ids they have
    seen, and answer 2xx within ten seconds.
    """

    type: str = Field(examples=["job.succeeded"])
    timestamp: datetime = Field(description="When it happened.")
    data: JobFacts | TrialFacts
