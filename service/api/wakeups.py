"""Wakes the streams of events.

What happens in a job is read once for all its streams, one read at a time for all jobs: a stream that waits holds
neither a thread nor a connection. PostgreSQL says when there is something to read. That is a hint only: every few
seconds all watched jobs are looked at anyway, and on SQLite that is all there is.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import islice

import anyio
import psycopg
from anyio import CapacityLimiter, to_thread
from fastapi.sse import format_sse_event
from sqlalchemy import Engine as Database

from pdtrim.contract.jobs import Event
from service.db import events, notices
from service.db.events import News
from service.db.session import DATABASE_FAULTS, transaction

POLL_SECONDS = 0.5
"""Between two looks at all watched jobs, where the database says nothing by itself."""
SWEEP_SECONDS = 5.0
"""The same where it does: for notices that were lost, as by a pooler that hands connections round."""
RETRY_SECONDS = 1.0
"""Between two tries of what the database did not do."""
BATCH = 100
"""Jobs in one read, and events of each."""
KEPT = 200
"""Events of a job at hand; streams that are further behind read for themselves."""
log = logging.getLogger(__name__)


def frame(event: Event) -> bytes:
    """An event as it is sent."""
    return format_sse_event(id=str(event.number), event=event.type, data_str=event.model_dump_json())


class Feed:
    """A watched job's latest events as they are sent. `head` numbers the newest, and is None before the first read."""

    def __init__(self) -> None:
        self.watchers = 0
        self.head: int | None = None
        self.over = False
        """Whether the job is final, or gone, and adds nothing to these events."""
        self.changed = anyio.Event()
        self._kept: deque[bytes] = deque(maxlen=KEPT)

    def after(self, number: int) -> list[bytes] | None:
        """All events above `number`; None when not all of them are at hand."""
        missing = (self.head or 0) - number
        if missing > len(self._kept):
            return None
        return list(islice(self._kept, len(self._kept) - missing, None)) if missing > 0 else []

    def take(self, found: News | None) -> bool:
        """Add what a read found, nothing where the job is gone, and wake the streams; whether there is more to read."""
        before = self.head, self.over
        if found is None:
            self.over = True
        else:
            self.head = found.last if self.head is None else self.head + len(found.events)
            self._kept.extend(frame(Event.model_validate(row)) for row in found.events)
            self.over = found.final and self.head >= found.last
        if (self.head, self.over) != before:
            self.changed.set()
            self.changed = anyio.Event()
        return found is not None and found.last > (self.head or 0)


class EventFeeds:
    """The feeds of all jobs that are watched in this process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._feeds: dict[str, Feed] = {}
        self._stale: dict[str, Feed] = {}
        self._called = anyio.Event()
        self._reader = CapacityLimiter(1)

    @contextmanager
    def watching(self, job_id: str) -> Iterator[Feed]:
        """The job's feed, which is kept up as long as somebody watches it."""
        if job_id not in self._feeds:
            self._feeds[job_id] = Feed()
            self.wake(job_id)
        feed = self._feeds[job_id]
        feed.watchers += 1
        try:
            yield feed
        finally:
            feed.watchers -= 1
            if not feed.watchers:
                del self._feeds[job_id]

    def wake(self, job_id: str) -> None:
        """Read on in a job, if it is watched."""
        if job_id in self._feeds:
            self._stale[job_id] = self._feeds[job_id]
            self._called.set()

    def wake_all(self) -> None:
        """Read on in every watched job."""
        for job_id in self._feeds:
            self.wake(job_id)

    async def read(self) -> None:
        """Read what jobs were woken for, through every outage of the database; never ends."""
        away = False
        while True:
            await self._called.wait()
            taken = {job_id: self._stale.pop(job_id) for job_id in list(islice(self._stale, BATCH))}
            if not self._stale:
                self._called = anyio.Event()
            try:
                found = await to_thread.run_sync(self._news, taken, limiter=self._reader)
            except Exception as error:
                if not away:
                    log.warning("streams of events wait for the database: %s", error, exc_info=_unforeseen(error))
                away = True
                again = list(taken)
                await anyio.sleep(RETRY_SECONDS)
            else:
                away = False
                again = [job_id for job_id, feed in taken.items() if feed.take(found.get(job_id))]
            for job_id in again:
                self.wake(job_id)

    def _news(self, feeds: dict[str, Feed]) -> dict[str, News]:
        with transaction(self._database) as session:
            return events.news(session, {job_id: feed.head for job_id, feed in feeds.items()}, limit=BATCH)

    async def listen(self) -> None:
        """Wake the jobs that the database has word of, whenever there is a connection; never ends."""
        away = False
        while True:
            try:
                async for job_id in notices.listen(self._database):
                    if job_id is None:
                        away = False
                        self.wake_all()  # Nobody told what happened before.
                    else:
                        self.wake(job_id)
            except Exception as error:
                if not away:
                    log.warning("no notices from the database for now: %s", error, exc_info=_unforeseen(error))
                away = True
            await anyio.sleep(RETRY_SECONDS)

    async def sweep(self, pause_s: float) -> None:
        """Wake all watched jobs every so often; never ends."""
        while True:
            await anyio.sleep(pause_s)
            self.wake_all()


def _unforeseen(error: Exception) -> Exception | None:
    return None if isinstance(error, (*DATABASE_FAULTS, psycopg.Error)) else error


@asynccontextmanager
async def running(database: Database) -> AsyncIterator[EventFeeds]:
    """The feeds of events, which work as long as the block lasts."""
    feeds, told = EventFeeds(database), notices.has_notices(database)
    async with anyio.create_task_group() as group:
        group.start_soon(feeds.read)
        group.start_soon(feeds.sweep, SWEEP_SECONDS if told else POLL_SECONDS)
        if told:
            group.start_soon(feeds.listen)
        yield feeds
        group.cancel_scope.cancel()
