"""Marking jobs as deleted and removing their rows, on SQLite and on PostgreSQL."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import JobNotDeletable, JobNotFound
from pdtrim.contract.jobs import ErrorInfo, StageName
from pdtrim.contract.spec import JobSpec
from service.db import deletion, jobs, stages
from service.db.session import transaction
from service.db.stages import LeaseLost
from service.db.tables import JobRow, now
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


def create_paused(database: Database) -> str:
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        jobs.request_pause(session, job_id)
    return job_id


def marked(database: Database, *, seconds: float = 1, limit: int = 10) -> list[str]:
    with transaction(database) as session:
        return deletion.marked(session, before=now() + timedelta(seconds=seconds), limit=limit)


def test_marked_jobs_are_found_in_order_once_they_waited(database: Database) -> None:
    first, second, third = (create_paused(database) for _ in range(3))
    for job_id in (second, first):
        with transaction(database) as session:
            deletion.mark(session, job_id)

    assert marked(database) == [second, first]
    assert marked(database, limit=1) == [second]
    assert marked(database, seconds=-60) == []
    with transaction(database) as session:
        deletion.postpone(session, second)
        deletion.postpone(session, third)
    assert marked(database) == [first, second]


def test_only_marked_jobs_are_removed(database: Database) -> None:
    gone, there = create_paused(database), create_paused(database)
    with transaction(database) as session:
        deletion.mark(session, gone)
        for job_id in (gone, there, gone):
            deletion.remove(session, job_id)
        assert session.get(JobRow, gone) is None
        assert jobs.get(session, there).id == there


def test_a_marked_job_cannot_be_changed_or_worked_on(database: Database) -> None:
    job_id = create_paused(database)
    with transaction(database) as session:
        deletion.mark(session, job_id)
    for change in (deletion.mark, jobs.resume, jobs.request_cancel, jobs.request_pause, jobs.get, jobs.lock):
        with pytest.raises(JobNotFound), transaction(database) as session:
            change(session, job_id)
    with transaction(database) as session:
        assert stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=60) is None
        stages.retire(session, job_id, StageName.SCORING, max_attempts=1)


def test_a_worker_that_comes_back_to_a_deleted_job_steps_back(database: Database) -> None:
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        claim = stages.claim(session, job_id, StageName.SCORING, worker="asleep", lease_seconds=-1)
        assert claim is not None
        jobs.request_pause(session, job_id)
        stages.retire(session, job_id, StageName.SCORING, max_attempts=5)
        deletion.mark(session, job_id)
    for _ in range(2):
        with pytest.raises(LeaseLost, match="deleted"), transaction(database) as session:
            stages.complete(session, claim, artifacts=[], metrics={}, versions={})
        with transaction(database) as session:
            deletion.remove(session, job_id)


def test_a_job_at_work_is_not_deleted_and_a_failed_one_is(database: Database) -> None:
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        claim = stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=60)
        assert claim is not None
        jobs.request_pause(session, job_id)
        with pytest.raises(JobNotDeletable, match="is pausing"):
            deletion.mark(session, job_id)
        stages.fail(session, claim, ErrorInfo(code="x", message="x"))
        deletion.mark(session, job_id)
    assert marked(database) == [job_id]


def test_only_jobs_that_finished_before_a_time_are_marked_by_it_and_once(database: Database) -> None:
    with transaction(database) as session:
        finished, unfinished = (store_job(session, SPEC).id for _ in range(2))
        jobs.request_cancel(session, finished)
    for seconds, expected in ((-60, []), (60, [finished]), (60, [])):
        with transaction(database) as session:
            assert deletion.mark_finished(session, before=now() + timedelta(seconds=seconds), limit=9) == expected
    with transaction(database) as session:
        assert jobs.get(session, unfinished).id == unfinished
    assert marked(database) == [finished]


def test_those_that_finished_first_are_marked_first(database: Database) -> None:
    with transaction(database) as session:
        third, first, second = (store_job(session, SPEC).id for _ in range(3))
        for job_id in (first, second, third):
            jobs.request_cancel(session, job_id)
    before = now() + timedelta(seconds=60)
    with transaction(database) as session:
        assert set(deletion.mark_finished(session, before=before, limit=2)) == {first, second}
    with transaction(database) as session:
        assert deletion.mark_finished(session, before=before, limit=2) == [third]
