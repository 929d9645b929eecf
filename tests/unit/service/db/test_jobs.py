"""Creating and listing jobs, on SQLite and on PostgreSQL."""

from __future__ import annotations

import pytest
from sqlalchemy import Engine as Database

from pdtrim.contract.access import DEFAULT_PROJECT
from pdtrim.contract.errors import CursorNotFound, JobNotCancellable, JobNotFound
from pdtrim.contract.jobs import ErrorInfo, JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db import jobs, stages
from service.db.session import migrate, schema_is_current, transaction
from tests.stored_jobs import store_job


def create_job(database: Database, **metadata: str) -> str:
    spec = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}, "metadata": metadata}
    with transaction(database) as session:
        return store_job(session, JobSpec.model_validate(spec)).id


def test_migrating_twice_changes_nothing(database: Database) -> None:
    migrate(database)
    assert schema_is_current(database)


def test_a_new_job_has_its_stages_and_only_the_first_is_queued(database: Database) -> None:
    job_id = create_job(database)
    with transaction(database) as session:
        rows = jobs.stages(session, [job_id])[job_id]
    assert [row.name for row in rows] == list(StageName)
    assert [row.status for row in rows] == [StageStatus.QUEUED] + [StageStatus.PENDING] * 4


def test_pages_run_from_newest_to_oldest_without_gap_or_overlap(database: Database) -> None:
    created = [create_job(database) for _ in range(5)]
    with transaction(database) as session:
        first, more = jobs.page(session, DEFAULT_PROJECT, limit=3)
        second, end = jobs.page(session, DEFAULT_PROJECT, limit=3, after=first[-1].id)
    assert [row.id for row in first + second] == created[::-1]
    assert (more, end) == (True, False)


def test_jobs_are_filtered_by_status_and_by_every_label(database: Database) -> None:
    wanted = create_job(database, team="serving", tier="gold")
    create_job(database, team="serving")
    with transaction(database) as session:
        by_labels, _ = jobs.page(session, DEFAULT_PROJECT, limit=10, metadata={"team": "serving", "tier": "gold"})
        running, _ = jobs.page(session, DEFAULT_PROJECT, limit=10, status=JobStatus.RUNNING)
    assert [row.id for row in by_labels] == [wanted]
    assert running == []


def test_an_unknown_cursor_is_refused(database: Database) -> None:
    with pytest.raises(CursorNotFound, match="job_nowhere"), transaction(database) as session:
        jobs.page(session, DEFAULT_PROJECT, limit=1, after="job_nowhere")


def test_an_unknown_job_is_named(database: Database) -> None:
    with pytest.raises(JobNotFound, match="job_nowhere"), transaction(database) as session:
        jobs.get(session, "job_nowhere")
    with pytest.raises(JobNotFound, match="job_nowhere"), transaction(database) as session:
        jobs.request_cancel(session, "job_nowhere")


def test_a_finished_job_cannot_be_cancelled(database: Database) -> None:
    job_id = create_job(database)
    with transaction(database) as session:
        claim = stages.claim(session, job_id, StageName.SCORING, worker="w", lease_seconds=60)
        assert claim is not None
        stages.fail(session, claim, ErrorInfo(code="x", message="x"))
    with pytest.raises(JobNotCancellable, match="failed"), transaction(database) as session:
        jobs.request_cancel(session, job_id)
