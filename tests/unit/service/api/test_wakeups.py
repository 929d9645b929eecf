"""What wakes the streams of events, on SQLite and on PostgreSQL."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import pytest
from anyio import to_thread
from sqlalchemy import Engine as Database
from sqlalchemy import event, text

from pdtrim.contract.spec import JobSpec
from service.api import wakeups
from service.api.wakeups import EventFeeds, Feed
from service.db import deletion, events, jobs
from service.db.events import News
from service.db.session import transaction
from service.db.tables import EventRow
from tests.stored_jobs import store_job
from tests.unit.service.db.conftest import database

__all__ = ["database"]

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often where looking is all there is, and hardly ever where the database tells."""
    monkeypatch.setattr(wakeups, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(wakeups, "SWEEP_SECONDS", 3600.0)
    monkeypatch.setattr(wakeups, "RETRY_SECONDS", 0.05)


def found(*numbers: int, last: int, final: bool = False) -> News:
    rows = [EventRow(job_id="j", number=one, type="t", message="") for one in numbers]
    return News(final=final, last=last, events=rows)


def new_job(database: Database) -> str:
    with transaction(database) as session:
        return store_job(session, SPEC).id


def append(database: Database, job_id: str, type_: str = "stage.progress") -> None:
    with transaction(database) as session:
        events.append(session, job_id, type_, "")


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *rest: object) -> None:
        seen.append(statement)

    event.listen(database, "before_cursor_execute", note)
    yield seen
    event.remove(database, "before_cursor_execute", note)


async def until(feed: Feed, condition: Callable[[], bool]) -> None:
    """Wait as a stream does. Raises: TimeoutError."""
    with anyio.fail_after(10):
        while not condition():
            await feed.changed.wait()


def run(database: Database, story: Callable[[EventFeeds], Awaitable[None]]) -> None:
    async def main() -> None:
        async with wakeups.running(database) as running:
            await story(running)

    anyio.run(main)


def test_a_feed_has_the_events_after_a_number_as_long_as_they_are_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wakeups, "KEPT", 3)
    feed = Feed()
    assert feed.after(0) == []

    feed.take(found(last=2))
    assert feed.after(2) == []
    assert feed.after(1) is None  # It came before anyone watched.

    assert feed.take(found(3, 4, last=5))
    assert not feed.take(found(5, 6, last=5))
    assert [part.split(b"\n")[0] for part in feed.after(3) or []] == [b"event: t"] * 3
    assert len(feed.after(5) or []) == 1
    assert feed.after(9) == []
    assert feed.after(2) is None  # One more than are kept.


def test_a_feed_is_over_once_it_has_the_last_event_of_a_final_job() -> None:
    feed = Feed()
    feed.take(found(last=1))
    feed.take(found(2, last=3, final=True))
    assert not feed.over
    feed.take(found(3, last=3, final=True))
    assert feed.over
    feed.take(found(4, last=4))  # It was resumed.
    assert not feed.over
    feed.take(None)
    assert feed.over


def test_a_feed_wakes_nobody_for_nothing() -> None:
    feed = Feed()
    feed.take(found(last=1))
    before = feed.changed
    feed.take(found(last=1))
    assert feed.changed is before
    feed.take(found(2, last=2))
    assert feed.changed is not before


def test_an_event_is_read_once_for_all_who_watch(database: Database) -> None:
    job_id = new_job(database)

    async def story(running: EventFeeds) -> None:
        feeds = []

        async def watch() -> None:
            with running.watching(job_id) as feed:
                feeds.append(feed)
                await until(feed, lambda: feed.head == 2)

        with statements(database) as seen:
            async with anyio.create_task_group() as group:
                for _ in range(50):
                    group.start_soon(watch)
                while not feeds or feeds[0].head is None:
                    await anyio.sleep(0.01)
                await to_thread.run_sync(append, database, job_id)
        assert len(set(map(id, feeds))) == 1
        assert sum("FROM events" in statement for statement in seen) == 1

    run(database, story)


def test_what_nobody_watches_any_more_is_not_read(database: Database) -> None:
    job_id = new_job(database)

    async def story(running: EventFeeds) -> None:
        with running.watching(job_id) as feed:
            await until(feed, lambda: feed.head == 1)
        await anyio.sleep(0.3)  # What was being read is read to its end.
        with statements(database) as seen:
            await anyio.sleep(0.3)
        assert seen == []

    run(database, story)


def test_a_deletion_ends_a_feed(database: Database) -> None:
    job_id = new_job(database)
    with transaction(database) as session:
        jobs.request_pause(session, job_id)

    def delete() -> None:
        with transaction(database) as session:
            deletion.mark(session, job_id)

    async def story(running: EventFeeds) -> None:
        with running.watching(job_id) as feed:
            await until(feed, lambda: feed.head == 2)
            await to_thread.run_sync(delete)
            await until(feed, lambda: feed.over)

    run(database, story)


def test_a_feed_goes_on_after_a_read_that_failed(database: Database) -> None:
    job_id = new_job(database)

    def rename(old: str, new: str) -> None:
        with database.begin() as connection:
            connection.execute(text(f"ALTER TABLE {old} RENAME TO {new}"))

    async def story(running: EventFeeds) -> None:
        with running.watching(job_id) as feed:
            await until(feed, lambda: feed.head == 1)
            await to_thread.run_sync(rename, "jobs", "hidden")
            running.wake(job_id)
            await anyio.sleep(0.2)
            await to_thread.run_sync(rename, "hidden", "jobs")
            await to_thread.run_sync(append, database, job_id)
            await until(feed, lambda: feed.head == 2)

    run(database, story)


def test_what_happened_while_the_listener_was_cut_off_is_read(database: Database) -> None:
    if database.dialect.name == "sqlite":
        pytest.skip("SQLite has no listener")
    job_id = new_job(database)

    def cut_off_and_append() -> None:
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            cut = connection.execute(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND query LIKE 'LISTEN%'"
                )
            )
            assert cut.scalar_one() >= 1  # One that was cut off before may be about to end.
        append(database, job_id)

    async def story(running: EventFeeds) -> None:
        with running.watching(job_id) as feed:
            await until(feed, lambda: feed.head == 1)
            for head in (2, 3):
                while "LISTEN" not in await to_thread.run_sync(listening, database):
                    await anyio.sleep(0.02)
                await to_thread.run_sync(cut_off_and_append)
                await until(feed, lambda head=head: feed.head == head)  # type: ignore[misc]

    run(database, story)


def listening(database: Database) -> str:
    with database.connect() as connection:
        rows = connection.execute(text("SELECT query FROM pg_stat_activity WHERE datname = current_database()"))
        return " ".join(row[0] for row in rows if row[0].startswith("LISTEN"))
