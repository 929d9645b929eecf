"""Figures for the metrics, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import event

from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, stages
from service.db import statistics as figures
from service.db.session import connect, migrate, transaction
from service.db.tables import EventRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def create(database: Database) -> str:
    with transaction(database) as session:
        return store_job(session, SPEC).id


def take(database: Database, job_id: str, stage: StageName) -> stages.Claim:
    with transaction(database) as session:
        claim = stages.claim(session, job_id, stage, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


def age(database: Database, job_id: str, number: int, hours: int) -> None:
    """Move an event into the past."""
    with transaction(database) as session:
        session.get_one(EventRow, (job_id, number)).created_at -= timedelta(hours=hours)


def queued(database: Database) -> dict[StageName, tuple[int, int]]:
    """How many stages wait, and for how many hours the first of them does."""
    with transaction(database) as session:
        found = figures.queued_stages(session)
    assert {queue for queue, _ in found} <= {"default"}
    return {name: (one.count, (now() - one.oldest) // timedelta(hours=1)) for (_, name), one in found.items()}


def test_jobs_are_counted_by_state_without_deleted_ones(database: Database) -> None:
    for _ in range(2):
        create(database)
    running, paused, deleted = (create(database) for _ in range(3))
    take(database, running, StageName.SCORING)
    with transaction(database) as session:
        jobs.request_pause(session, paused)
        jobs.request_cancel(session, deleted)
        deletion.mark(session, deleted)

    with transaction(database) as session:
        counts = figures.jobs_by_status(session)

    assert counts.keys() == set(JobStatus)
    assert {status: count for status, count in counts.items() if count} == {
        JobStatus.QUEUED: 2,
        JobStatus.RUNNING: 1,
        JobStatus.PAUSED: 1,
    }


def test_a_stage_waits_from_when_it_was_queued_last(database: Database) -> None:
    assert queued(database) == {}
    first, second, third = (create(database) for _ in range(3))
    age(database, first, 1, hours=5)
    age(database, second, 1, hours=3)
    age(database, third, 1, hours=8)
    assert queued(database) == {StageName.SCORING: (3, 8)}

    claim = take(database, third, StageName.SCORING)
    assert queued(database) == {StageName.SCORING: (2, 5)}
    with transaction(database) as session:
        stages.release(session, claim, "fault", max_attempts=5, pause_seconds=10)
    assert queued(database) == {StageName.SCORING: (3, 5)}

    claim = take(database, first, StageName.SCORING)
    with transaction(database) as session:
        stages.complete(session, claim, artifacts=[], metrics={}, versions={})
    assert queued(database) == {StageName.SCORING: (2, 3), StageName.REMOVAL: (1, 0)}


def test_sending_again_does_not_make_a_stage_younger(database: Database) -> None:
    age(database, create(database), 1, hours=2)
    with transaction(database) as session:
        assert stages.due(session, resend_seconds=1, at=now() + timedelta(minutes=1))
    assert queued(database) == {StageName.SCORING: (1, 2)}


@pytest.mark.parametrize("query", [figures.jobs_by_status, figures.queued_stages])
def test_no_table_is_read_from_end_to_end(query: object, tmp_path: Path) -> None:
    database = connect(f"sqlite:///{tmp_path}/jobs.db")
    migrate(database)
    statements: list[tuple[str, object]] = []
    event.listen(database, "before_cursor_execute", lambda *given: statements.append((given[2], given[3])))
    with transaction(database) as session:
        query(session)  # type: ignore[operator]
    statement, parameters = next(one for one in statements if one[0].startswith("SELECT"))
    with database.connect() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]  # type: ignore[arg-type]
    database.dispose()
    reads = [step for step in plan if any(table in step for table in ("jobs", "stages", "events"))]
    assert reads
    assert all("INDEX" in step for step in reads), plan
