"""Events of a job: a page, or a stream of server-sent events on the same path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from time import monotonic
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import DependencyUnavailable, InvalidRequest, JobNotFound, MissingScope, Unauthorized
from pdtrim.contract.jobs import Event, JobStatus, Page
from service.api import examples
from service.api.auth import declared
from service.api.deps import DatabaseDep, EventFeedsDep, JobId, Limit
from service.api.problems import documented
from service.api.suggestions import only_known_parameters
from service.api.wakeups import RETRY_SECONDS, EventFeeds, frame
from service.db import events, jobs, views
from service.db.session import DATABASE_FAULTS, transaction

router = APIRouter(prefix="/v1/jobs/{job_id}/events", tags=["events"], dependencies=[declared, only_known_parameters])

KEEP_ALIVE_SECONDS = 15.0
BATCH = 100
STREAM_TYPE = "text/event-stream"

MAX_NUMBER = 2**31 - 1

Number = Annotated[int, Query(ge=0, le=MAX_NUMBER, description="Only events with a higher number.")]


@dataclass(frozen=True)
class Batch:
    """What a read found: the page of events, and whether the job can add no more to it."""

    page: Page[Event]
    last: bool


def read(database: Database, job_id: str, *, after: int, limit: int) -> Batch:
    """Events above `after`, in a transaction of its own. Raises: JobNotFound."""
    with transaction(database) as session:
        # The job before its events: a job that is final here has written its last event already.
        final = JobStatus(jobs.get(session, job_id).status).final
        rows, has_more = events.page(session, job_id, after=after, limit=limit)
    return Batch(views.events(rows, has_more), last=final and not has_more)


def wants_stream(request: Request) -> bool:
    """Whether the client names the stream's media type."""
    kinds = (part.partition(";")[0].strip().lower() for part in request.headers.get("Accept", "").split(","))
    return STREAM_TYPE in kinds


async def stream(
    feeds: EventFeeds, database: Database, job_id: str, first: Batch, *, after: int
) -> AsyncIterator[bytes]:
    """The first batch, then what follows it until the job ends or is deleted, with keep-alive comments in between."""
    frames: list[bytes] | None = [frame(event) for event in first.page.data]
    over, quiet_since = first.last, monotonic()
    with feeds.watching(job_id) as feed:
        while True:
            if frames:
                yield b"".join(frames)
                after, quiet_since = after + len(frames), monotonic()
            if over:
                return
            changed, over = feed.changed, feed.over
            frames = feed.after(after)
            if frames is None:
                frames, over = await _catch_up(database, job_id, after)
            elif not frames and not over:
                with anyio.move_on_after(KEEP_ALIVE_SECONDS - (monotonic() - quiet_since)):
                    await changed.wait()
            if monotonic() - quiet_since >= KEEP_ALIVE_SECONDS:
                yield KEEPALIVE_COMMENT
                quiet_since = monotonic()


async def _catch_up(database: Database, job_id: str, after: int) -> tuple[list[bytes], bool]:
    """Events that are no longer at hand, and whether the stream ends; nothing while the database is away."""
    try:
        batch = await run_in_threadpool(read, database, job_id, after=after, limit=BATCH)
    except JobNotFound:  # It was deleted meanwhile.
        return [], True
    except DATABASE_FAULTS:  # Too late for another answer. The feeds say it in the log.
        await anyio.sleep(RETRY_SECONDS)
        return [], False
    return [frame(event) for event in batch.page.data], batch.last


@router.get(
    "",
    summary="List or follow a job's events",
    operation_id="list_events",
    response_model=Page[Event],
    responses={
        200: {
            "description": "A page of events, oldest first; or the stream of them, until the job's final event.",
            "content": {
                "application/json": {"example": examples.EVENTS},
                STREAM_TYPE: {"schema": {"type": "string"}, "example": examples.STREAM},
            },
        },
        204: {"description": "Asked for a stream: the job is over and has no event after the given one."},
        **documented(Unauthorized, MissingScope, JobNotFound, InvalidRequest, DependencyUnavailable),
    },
)
def list_events(
    request: Request,
    job_id: JobId,
    database: DatabaseDep,
    feeds: EventFeedsDep,
    after: Number = 0,
    limit: Limit = 20,
    last_event_id: Annotated[
        Annotated[int, Field(ge=0, le=MAX_NUMBER)] | SkipJsonSchema[None],
        Header(alias="Last-Event-ID", description="Streams only: resume after this event."),
    ] = None,
) -> Page[Event] | Response:
    """A page; with `Accept: text/event-stream` a stream: `id` is the number, `event` the type, `data` the event.

    A stream stays open until the job's final event and sends a comment every 15 s while nothing happens.
    """
    if not wants_stream(request):
        return read(database, job_id, after=after, limit=limit).page
    after = after if last_event_id is None else last_event_id
    batch = read(database, job_id, after=after, limit=BATCH)
    if batch.last and not batch.page.data:
        return Response(status_code=204)  # Browsers reconnect to a stream that ended, unless they get this.
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return EventSourceResponse(stream(feeds, database, job_id, batch, after=after), headers=headers)
