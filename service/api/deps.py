"""What routes depend on, as annotated types.

What asks nothing of the database is a coroutine: FastAPI runs every plain function in a thread.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import Depends, Path, Query, Request
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import ArtifactNotFound, CursorNotFound, DeliveryNotFound, JobNotFound, WebhookNotFound
from service.api.auth import Caller
from service.api.problems import UnsupportedMediaType
from service.api.wakeups import EventFeeds
from service.checking.questions import Questions
from service.db import jobs, webhooks
from service.db.session import transaction
from service.settings import Settings
from service.storage import ArtifactStore

JOB_ID = re.compile(r"job_[0-9a-f]{32}")
ARTIFACT_ID = re.compile(r"art_[0-9a-f]{32}")
WEBHOOK_ID = re.compile(r"wh_[0-9a-f]{32}")
DELIVERY_ID = re.compile(r"msg_[0-9a-f]{32}")


async def json_only(request: Request) -> None:
    """Raises: UnsupportedMediaType for a body that does not call itself JSON."""
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    carries_body = "Transfer-Encoding" in request.headers or request.headers.get("Content-Length", "0") != "0"
    if carries_body and not (
        kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
    ):
        raise UnsupportedMediaType(f"Send the body as application/json, not as {kind or 'an undeclared type'}.")


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _questions(request: Request) -> Questions:
    questions: Questions = request.app.state.questions
    return questions


async def _database(request: Request) -> Database:
    database: Database = request.app.state.database
    return database


async def _store(request: Request) -> ArtifactStore:
    store: ArtifactStore = request.app.state.store
    return store


async def _event_feeds(request: Request) -> EventFeeds:
    feeds: EventFeeds = request.app.state.feeds
    return feeds


async def _project(request: Request) -> str:
    caller: Caller = request.state.caller
    return caller.project


def _api_key(request: Request) -> str | None:
    caller: Caller = request.state.caller
    return caller.api_key


def _job_id(
    job_id: Annotated[str, Path(examples=["job_0198a3f25e0e7c52b3a0d1f3b6a4c7de"])],
    database: Annotated[Database, Depends(_database)],
    project: Annotated[str, Depends(_project)],
) -> str:
    """The id of a job of the caller's project: what takes a `JobId` cannot reach across the border."""
    return own_job(job_id, database, project)


def own_job(job_id: str, database: Database, project: str) -> str:
    """The id, if the project has such a job. Raises: JobNotFound.

    What cannot be an id is refused here: a database may refuse to look for it at all.
    """
    if not JOB_ID.fullmatch(job_id):
        raise JobNotFound("No such job exists: an id is `job_` and 32 hexadecimal digits. List jobs with GET /v1/jobs.")
    with transaction(database) as session:
        jobs.check_project(session, job_id, project)
    return job_id


async def _artifact_id(artifact_id: Annotated[str, Path(examples=["art_0198a3f2a3b07d61a5e5d0c3f1b2a4c6"])]) -> str:
    if not ARTIFACT_ID.fullmatch(artifact_id):
        raise ArtifactNotFound("No such artifact exists: an id is `art_` and 32 hexadecimal digits.")
    return artifact_id


def _webhook_id(
    webhook_id: Annotated[str, Path(examples=["wh_0198a3f25e0e7c52b3a0d1f3b6a4c7de"])],
    database: Annotated[Database, Depends(_database)],
    project: Annotated[str, Depends(_project)],
) -> str:
    """The id of a webhook of the caller's project, as with jobs."""
    if not WEBHOOK_ID.fullmatch(webhook_id):
        raise WebhookNotFound("No such webhook exists: an id is `wh_` and 32 hexadecimal digits.")
    with transaction(database) as session:
        webhooks.check_project(session, webhook_id, project)
    return webhook_id


async def _delivery_id(delivery_id: Annotated[str, Path(examples=["msg_0198a3f2a3b07d61a5e5d0c3f1b2a4c6"])]) -> str:
    if not DELIVERY_ID.fullmatch(delivery_id):
        raise DeliveryNotFound("No such delivery exists: an id is `msg_` and 32 hexadecimal digits.")
    return delivery_id


def _cursor(of: re.Pattern[str]) -> Any:
    """A query parameter that takes an id. The pattern is documentation: what breaks it has a code of its own."""
    return Query(
        description="`last_id` of the page before.", max_length=64, json_schema_extra={"pattern": f"^{of.pattern}$"}
    )


async def _after_job(
    after: Annotated[str | SkipJsonSchema[None], _cursor(JOB_ID)] = None,
) -> str | None:
    if after is not None and not JOB_ID.fullmatch(after):
        raise CursorNotFound("`after` is not the id of a job.", param="after")
    return after


async def _after_artifact(
    after: Annotated[str | SkipJsonSchema[None], _cursor(ARTIFACT_ID)] = None,
) -> str | None:
    if after is not None and not ARTIFACT_ID.fullmatch(after):
        raise CursorNotFound("`after` is not the id of an artifact.", param="after")
    return after


async def _after_webhook(
    after: Annotated[str | SkipJsonSchema[None], _cursor(WEBHOOK_ID)] = None,
) -> str | None:
    if after is not None and not WEBHOOK_ID.fullmatch(after):
        raise CursorNotFound("`after` is not the id of a webhook.", param="after")
    return after


async def _after_delivery(
    after: Annotated[str | SkipJsonSchema[None], _cursor(DELIVERY_ID)] = None,
) -> str | None:
    if after is not None and not DELIVERY_ID.fullmatch(after):
        raise CursorNotFound("`after` is not the id of a delivery.", param="after")
    return after


SettingsDep = Annotated[Settings, Depends(_settings)]
QuestionsDep = Annotated[Questions, Depends(_questions)]
DatabaseDep = Annotated[Database, Depends(_database)]
StoreDep = Annotated[ArtifactStore, Depends(_store)]
EventFeedsDep = Annotated[EventFeeds, Depends(_event_feeds)]
Project = Annotated[str, Depends(_project)]
ApiKeyPrefix = Annotated[str | None, Depends(_api_key)]
JobId = Annotated[str, Depends(_job_id)]
ArtifactId = Annotated[str, Depends(_artifact_id)]
WebhookId = Annotated[str, Depends(_webhook_id)]
DeliveryId = Annotated[str, Depends(_delivery_id)]
AfterJob = Annotated[str | None, Depends(_after_job)]
AfterArtifact = Annotated[str | None, Depends(_after_artifact)]
AfterWebhook = Annotated[str | None, Depends(_after_webhook)]
AfterDelivery = Annotated[str | None, Depends(_after_delivery)]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items on the page.")]
