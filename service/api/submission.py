"""How a request makes a job, whichever route it comes by: once for each Idempotency-Key, and sent after the commit."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from fastapi import Depends, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import (
    ArtifactQuotaExceeded,
    DependencyUnavailable,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    InvalidRequest,
    MissingScope,
    ModelTooLarge,
    ModelUnsupported,
    NoSuchQueue,
    PDTrimError,
    PushNotAllowed,
    QueueQuotaExceeded,
    RequestInFlight,
    SourceNotAllowed,
    SourceUnreadable,
    TooLittleMemory,
    TooManyBlocks,
    Unauthorized,
)
from pdtrim.contract.jobs import Job, StageName
from pdtrim.contract.spec import JobSpec
from service import queue
from service.api.deps import ApiKeyPrefix, DatabaseDep, Project, SettingsDep
from service.api.idempotency import REPLAYED, REPLAYED_HEADER, IdempotencyKey, claimed, fingerprint
from service.api.problems import BodyTooLarge, MalformedBody, UnsupportedMediaType
from service.checking.targets import targets
from service.db import idempotency, jobs, views
from service.db.idempotency import Answered, KeyClaim
from service.db.session import transaction
from service.settings import Settings

BODY_REFUSALS: tuple[type[PDTrimError], ...] = (MalformedBody, BodyTooLarge, UnsupportedMediaType, InvalidRequest)
PREFLIGHT_REFUSALS: tuple[type[PDTrimError], ...] = (
    Unauthorized,
    MissingScope,
    SourceNotAllowed,
    SourceUnreadable,
    ModelTooLarge,
    ModelUnsupported,
    TooManyBlocks,
    TooLittleMemory,
    NoSuchQueue,
    PushNotAllowed,
    DependencyUnavailable,
)
"""What `service.checking.preflight` says, and what stands before it."""
SUBMISSION_REFUSALS: tuple[type[PDTrimError], ...] = (
    *BODY_REFUSALS,
    *PREFLIGHT_REFUSALS,
    InvalidIdempotencyKey,
    RequestInFlight,
    IdempotencyKeyReused,
    QueueQuotaExceeded,
    ArtifactQuotaExceeded,
)
HEADERS: dict[str, Any] = {
    "Location": {"description": "Path of the job.", "schema": {"type": "string"}},
    **REPLAYED_HEADER,
}


@dataclass(frozen=True)
class NewJob:
    """A job that passed its checks."""

    spec: JobSpec
    model_revision: str | None
    cut_from: str | None = None
    queue: str | None = None
    """Whose workers have room for it, where it names none; None for the first of the service."""


@dataclass(frozen=True)
class Submission:
    """Who submits, and under which key."""

    response: Response
    settings: Settings
    database: Database
    project: str
    api_key: str | None
    idempotency_key: str | None

    async def __call__(
        self, body: BaseModel, prepare: Callable[[], Awaitable[NewJob]], *, cut_from: str | None = None
    ) -> Job:
        """Make the job that `prepare` finds fit, unless `body` made one under this key before.

        Raises: what `prepare` raises; IdempotencyKeyReused, RequestInFlight; QueueQuotaExceeded, ArtifactQuotaExceeded.
        """
        said = partial(fingerprint, body, cut_from)
        async with claimed(self.database, self.project, self.idempotency_key, said) as found:
            if isinstance(found, Answered):
                self.response.headers.update({"Location": f"/v1/jobs/{found.job_id}", REPLAYED: "true"})
                return Job.model_validate(found.response)
            shown = await run_in_threadpool(self._insert, await prepare(), found)
        self.response.headers["Location"] = f"/v1/jobs/{shown.id}"
        return shown

    def _insert(self, new: NewJob, claim: KeyClaim | None) -> Job:
        """The job, in the database and sent."""
        with transaction(self.database) as session:
            row, stages, sent = jobs.insert_new(
                session,
                new.spec,
                project=self.project,
                api_key=self.api_key,
                limits=self.settings.quotas,
                model_revision=new.model_revision,
                cut_from=new.cut_from,
                default_queue=new.queue or self.settings.queues[0],
                targets=targets(new.spec, self.settings),
            )
            shown = views.job(row, stages)
            if claim is not None:
                idempotency.settle(session, claim, row.id, shown.model_dump(mode="json"))
        if sent:
            queue.try_to_send(self.settings, queue.WakeUp(row.id, StageName.SCORING, row.queue))
        return shown


async def _submission(
    response: Response,
    settings: SettingsDep,
    database: DatabaseDep,
    project: Project,
    api_key: ApiKeyPrefix,
    idempotency_key: IdempotencyKey,
) -> Submission:
    return Submission(response, settings, database, project, api_key, idempotency_key)


Submit = Annotated[Submission, Depends(_submission)]
