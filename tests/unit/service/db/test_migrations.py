"""Databases of earlier versions move forward with what is in them, on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from service.contract.access import DEFAULT_PROJECT
from service.contract.jobs import StageName
from service.contract.spec import JobSpec
from service.db import events, jobs
from service.db.session import connect, migrate, schema_is_current, transaction

JOB_ID = "job_" + "1" * 32
SPEC = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
AT = "2026-01-02 03:04:05+00:00"


@pytest.fixture(params=["sqlite", "postgresql"])
def first_version(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """A database at revision 0001 with a job in it."""
    sqlite = request.param == "sqlite"
    url = f"sqlite:///{tmp_path}/jobs.db" if sqlite else request.getfixturevalue("postgres_database_url")
    engine = connect(url)
    migrate(engine, "0001")
    statements = [
        "INSERT INTO jobs (id, status, spec, labels, versions, last_event, created_at) "
        "VALUES (:job, 'queued', :spec, '{}', '{}', 1, :at)",
        "INSERT INTO events (job_id, number, type, message, data, created_at) "
        "VALUES (:job, 1, 'job.created', 'Job created.', '{}', :at)",
        "INSERT INTO stages (job_id, name, position, status, attempt, sends, progress, message, metrics) "
        "VALUES (:job, 'scoring', 0, 'queued', 0, 1, 0, '', '{}')",
    ]
    with engine.begin() as connection:
        for statement in statements:
            connection.execute(text(statement), {"job": JOB_ID, "spec": json.dumps(SPEC), "at": AT})
    yield engine
    engine.dispose()


def test_a_job_of_the_first_version_is_there_after_migrating(first_version: Engine) -> None:
    migrate(first_version)

    assert schema_is_current(first_version)
    with transaction(first_version) as session:
        assert [row.id for row in jobs.page(session, DEFAULT_PROJECT, limit=10)[0]] == [JOB_ID]
        job = jobs.get(session, JOB_ID)
        assert JobSpec.model_validate(job.spec) == JobSpec.model_validate(SPEC)
        assert [row.name for row in jobs.stages(session, [JOB_ID])[JOB_ID]] == [StageName.SCORING]
        assert [row.type for row in events.page(session, JOB_ID, after=0, limit=10)[0]] == ["job.created"]


def test_what_a_job_kept_before_there_were_quotas_counts(first_version: Engine) -> None:
    migrate(first_version, "0005")
    with first_version.begin() as connection:
        for number in range(2):
            connection.execute(
                text(
                    "INSERT INTO artifacts (id, job_id, stage, name, key, uri, size, sha256, created_at) "
                    "VALUES (:id, :job, 'scoring', :id, '', '', 5000000000, '', :at)"
                ),
                {"id": f"art_{number}", "job": JOB_ID, "at": AT},
            )

    migrate(first_version)

    with transaction(first_version) as session:
        assert jobs.get(session, JOB_ID).artifact_bytes == 10_000_000_000
