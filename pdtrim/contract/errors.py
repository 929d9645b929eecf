"""Errors with a stable code, a status and a remedy: RFC 9457 problems on the wire, `ErrorInfo` in a job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, Field


class Refusal(BaseModel):
    """One of the reasons why a request is refused."""

    code: str = Field(examples=["no_such_queue"])
    detail: str = Field(examples=["There is no queue 'gpu'; the service has default."])
    param: str | None = Field(default=None, description="The request field at fault.", examples=["queue"])


class Problem(BaseModel):
    """RFC 9457 problem details, with the stable `code` to program against."""

    type: str = Field(default="about:blank", examples=["urn:pdtrim:problem:job_not_found"])
    title: str = Field(examples=["No such job"])
    status: int = Field(examples=[404])
    detail: str = Field(examples=["No job job_123 exists. List the jobs with GET /v1/jobs."])
    instance: str | None = Field(default=None, examples=["/v1/jobs/job_123"])
    code: str = Field(examples=["job_not_found"])
    param: str | None = Field(
        default=None, description="The request field at fault.", examples=["prefill.remove_blocks"]
    )
    request_id: str | None = None
    errors: list[Refusal] | None = Field(
        default=None,
        description="All that was found wrong, where that is more than one thing: code, status and `param` of the "
        "problem are those of the first.",
    )


class PDTrimError(Exception):
    """An error a user can act on. Subclasses fix `code`, `title` and the HTTP `status`."""

    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.others: Sequence[PDTrimError] = ()
        """What else is wrong, where more was looked at."""


def raise_all(found: Sequence[PDTrimError]) -> None:
    """Raises: the first of what was found, if anything was; the rest are its `others`."""
    if found:
        first, *first.others = found
        raise first


class InvalidRequest(PDTrimError):
    code, title, status = "invalid_request", "The request is not valid", 422


class JobNotFound(PDTrimError):
    code, title, status = "job_not_found", "No such job", 404


class ArtifactNotFound(PDTrimError):
    code, title, status = "artifact_not_found", "No such artifact", 404


class CursorNotFound(PDTrimError):
    code, title, status = "cursor_not_found", "No such cursor", 422


class JobNotCancellable(PDTrimError):
    code, title, status = "job_not_cancellable", "The job is already finished", 409


class JobNotPausable(PDTrimError):
    code, title, status = "job_not_pausable", "The job cannot be paused in its state", 409


class JobNotResumable(PDTrimError):
    code, title, status = "job_not_resumable", "The job cannot be resumed in its state", 409


class JobNotDeletable(PDTrimError):
    code, title, status = "job_not_deletable", "The job is neither finished nor paused", 409


class NoFrontier(PDTrimError):
    code, title, status = "no_frontier", "The job has no frontier yet", 409


class NoCheckpoints(PDTrimError):
    code, title, status = "no_checkpoints", "The job has no checkpoints yet", 409


class NoSuchPoint(PDTrimError):
    code, title, status = "no_such_point", "The frontier has no set of that size", 422


class SetsNotNested(PDTrimError):
    code, title, status = "sets_not_nested", "Decode would keep blocks that prefill gives up", 422


class ParentDeleted(PDTrimError):
    code, title, status = "parent_deleted", "The job that this one was cut from was deleted", 409


class WebhookNotFound(PDTrimError):
    code, title, status = "webhook_not_found", "No such webhook", 404


class DeliveryNotFound(PDTrimError):
    code, title, status = "delivery_not_found", "No such delivery", 404


class UrlNotAllowed(PDTrimError):
    code, title, status = "url_not_allowed", "The service sends nothing to this URL", 422


class WebhookDisabled(PDTrimError):
    code, title, status = "webhook_disabled", "The webhook is disabled", 409


class TooManyWebhooks(PDTrimError):
    code, title, status = "too_many_webhooks", "The project has as many webhooks as it may", 409


class InvalidIdempotencyKey(PDTrimError):
    code, title, status = "invalid_idempotency_key", "The Idempotency-Key is not valid", 400


class IdempotencyKeyReused(PDTrimError):
    code, title, status = "idempotency_key_reused", "The Idempotency-Key belongs to another request", 422


class RequestInFlight(PDTrimError):
    code, title, status = "request_in_flight", "The first request with this Idempotency-Key is not answered yet", 409


class RangeNotSatisfiable(PDTrimError):
    code, title, status = "range_not_satisfiable", "The range lies outside the artifact", 416


class Unauthorized(PDTrimError):
    code, title, status = "unauthorized", "A valid API key is needed", 401


class MissingScope(PDTrimError):
    code, title, status = "missing_scope", "The API key does not allow this", 403


class MissingProject(PDTrimError):
    code, title, status = "missing_project", "The token names no project", 403


class RateLimited(PDTrimError):
    code, title, status = "rate_limited", "Too many requests", 429


class QueueQuotaExceeded(PDTrimError):
    code, title, status = "queue_quota_exceeded", "As many jobs are queued as may be", 429


class ArtifactQuotaExceeded(PDTrimError):
    code, title, status = "artifact_quota_exceeded", "As many bytes of artifacts are kept as may be", 429


class SourceNotAllowed(PDTrimError):
    code, title, status = "source_not_allowed", "The source is not on the allow list", 422


class SourceUnreadable(PDTrimError):
    code, title, status = "source_unreadable", "The source cannot be read", 422


class ModelTooLarge(PDTrimError):
    code, title, status = "model_too_large", "The model has more bytes than this service takes", 422


class TooLittleMemory(PDTrimError):
    code, title, status = "too_little_memory", "No worker has room for the job", 422


class ModelUnsupported(PDTrimError):
    code, title, status = "model_unsupported", "The model cannot be pruned", 422


class ExtraNotInstalled(PDTrimError):
    code, title, status = "extra_not_installed", "The worker lacks an optional package that the job needs", 501


class PushNotAllowed(PDTrimError):
    code, title, status = "push_not_allowed", "The service does not push into this organisation", 422


class NothingToPublish(PDTrimError):
    code, title, status = "nothing_to_publish", "The job is handed on to nobody", 409


class NoSuchQueue(PDTrimError):
    code, title, status = "no_such_queue", "The service has no such queue", 422


class TooManyBlocks(PDTrimError):
    code, title, status = "too_many_blocks", "More blocks to remove than the model can give up", 422


class DeadlineExceeded(PDTrimError):
    code, title, status = "deadline_exceeded", "The stage took longer than it may", 504


class DependencyUnavailable(PDTrimError):
    code, title, status = "dependency_unavailable", "A server this needs is not reachable", 503
