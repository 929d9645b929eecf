"""Events and the word of them, on SQLite and on PostgreSQL."""

from __future__ import annotations

import anyio
import psycopg
import pytest
from anyio import to_thread
from sqlalchemy import Engine as Database

from pdtrim.contract.spec import JobSpec
from service.db import deletion, events, jobs, notices
from service.db.session import connect, transaction
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def new_job(database: Database, count: int = 1) -> str:
    """A job with so many events."""
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        for number in range(2, count + 1):
            events.append(session, job_id, "stage.progress", f"{number}")
    return job_id


def test_news_are_the_events_after_those_that_are_known(database: Database) -> None:
    long, short, quiet, unread, deleted = (
        new_job(database, 6),
        new_job(database, 3),
        new_job(database),
        new_job(database),
        new_job(database),
    )
    with transaction(database) as session:
        jobs.request_cancel(session, short)
        jobs.request_cancel(session, deleted)
        deletion.mark(session, deleted)

    with transaction(database) as session:
        known = {long: 1, short: 2, quiet: 1, unread: None, deleted: 0, "job_none": 0}
        found = events.news(session, known, limit=3)

    assert {job_id: [row.number for row in one.events] for job_id, one in found.items()} == {
        long: [2, 3, 4],
        short: [3, 4],
        quiet: [],
        unread: [],
    }
    assert {job_id: (one.last, one.final) for job_id, one in found.items()} == {
        long: (6, False),
        short: (4, True),
        quiet: (1, False),
        unread: (1, False),
    }


def test_a_new_job_has_the_first_event(database: Database) -> None:
    job_id = new_job(database)
    with transaction(database) as session:
        rows, more = events.page(session, job_id, after=0, limit=5)
        assert jobs.get(session, job_id).last_event == 1
    assert [(row.number, row.type) for row in rows] == [(1, "job.created")]
    assert not more


def test_who_listens_hears_of_what_was_committed_to_jobs_that_exist(postgres_database_url: str) -> None:
    database = connect(postgres_database_url)

    def write() -> str:
        undone = new_job(database)
        with transaction(database) as session:
            events.append(session, undone, "job.paused", "")
            session.rollback()
        job_id = new_job(database)
        with transaction(database) as session:
            events.append(session, job_id, "stage.progress", "")
            events.append(session, job_id, "stage.progress", "")
        return job_id

    async def heard() -> tuple[str, str | None]:
        with anyio.fail_after(10):
            listening = notices.listen(database)
            assert await anext(listening) is None
            written = await to_thread.run_sync(write)
            first = await anext(listening)
            await listening.aclose()  # type: ignore[attr-defined]
            return written, first

    written, first = anyio.run(heard)
    database.dispose()
    assert first == written


def test_who_cannot_listen_is_told(postgres_url: str) -> None:
    async def listen() -> None:
        async for _ in notices.listen(connect(postgres_url.removesuffix("postgres") + "none")):
            pass

    with pytest.raises(psycopg.OperationalError):
        anyio.run(listen)
