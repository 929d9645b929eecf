"""Figures for the metrics, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, event

from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, stages
from service.db import statistics as figures
from service.db.session import connect, migrate, transaction
from service.db.tables import EventRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def create(engine: Engine) -> str:
    with transaction(engine) as session:
        return store_job(session, SPEC).id


def take(engine: Engine, job_id: str, stage: StageName) -> stages.Claim:
    with transaction(engine) as session:
        claim = stages.claim(session, job_id, stage, worker="w", lease_seconds=60)
    assert claim is not None
    return claim


def age(engine: Engine, job_id: str, number: int, hours: int) -> None:
    """Move an event into the past."""
    with transaction(engine) as session:
        session.get_one(EventRow, (job_id, number)).created_at -= timedelta(hours=hours)


def queued(engine: Engine) -> dict[StageName, tuple[int, int]]:
    """How many stages wait, and for how many hours the first of them does."""
    with transaction(engine) as session:
        found = figures.queued_stages(session)
    assert {queue for queue, _ in found} <= {"default"}
    return {name: (one.count, (now() - one.oldest) // timedelta(hours=1)) for (_, name), one in found.items()}


def test_jobs_are_counted_by_state_without_deleted_ones(engine: Engine) -> None:
    for _ in range(2):
        create(engine)
    running, paused, deleted = (create(engine) for _ in range(3))
    take(engine, running, StageName.SCORING)
    with transaction(engine) as session:
        jobs.request_pause(session, paused)
        jobs.request_cancel(session, deleted)
        deletion.mark(session, deleted)

    with transaction(engine) as session:
        counts = figures.jobs_by_status(session)

    assert counts.keys() == set(JobStatus)
    assert {status: count for status, count in counts.items() if count} == {
        JobStatus.QUEUED: 2,
        JobStatus.RUNNING: 1,
        JobStatus.PAUSED: 1,
    }


def test_a_stage_waits_from_when_it_was_queued_last(engine: Engine) -> None:
    assert queued(engine) == {}
    first, second, third = (create(engine) for _ in range(3))
    age(engine, first, 1, hours=5)
    age(engine, second, 1, hours=3)
    age(engine, third, 1, hours=8)
    assert queued(engine) == {StageName.SCORING: (3, 8)}

    claim = take(engine, third, StageName.SCORING)
    assert queued(engine) == {StageName.SCORING: (2, 5)}
    with transaction(engine) as session:
        stages.release(session, claim, "fault", max_attempts=5, pause_seconds=10)
    assert queued(engine) == {StageName.SCORING: (3, 5)}

    claim = take(engine, first, StageName.SCORING)
    with transaction(engine) as session:
        stages.complete(session, claim, artifacts=[], metrics={}, versions={})
    assert queued(engine) == {StageName.SCORING: (2, 3), StageName.REMOVAL: (1, 0)}


def test_sending_again_does_not_make_a_stage_younger(engine: Engine) -> None:
    age(engine, create(engine), 1, hours=2)
    with transaction(engine) as session:
        assert stages.due(session, resend_seconds=1, at=now() + timedelta(minutes=1))
    assert queued(engine) == {StageName.SCORING: (1, 2)}


@pytest.mark.parametrize("query", [figures.jobs_by_status, figures.queued_stages])
def test_no_table_is_read_from_end_to_end(query: object, tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/jobs.db")
    migrate(engine)
    statements: list[tuple[str, object]] = []
    event.listen(engine, "before_cursor_execute", lambda *given: statements.append((given[2], given[3])))
    with transaction(engine) as session:
        query(session)  # type: ignore[operator]
    statement, parameters = next(one for one in statements if one[0].startswith("SELECT"))
    with engine.connect() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]  # type: ignore[arg-type]
    engine.dispose()
    reads = [step for step in plan if any(table in step for table in ("jobs", "stages", "events"))]
    assert reads
    assert all("INDEX" in step for step in reads), plan
