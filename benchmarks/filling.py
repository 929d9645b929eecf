"""A database as years of use leave it, written by the database itself: copies of one job that ran to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlmodel import SQLModel

from pdtrim.contract.jobs import StageName
from pdtrim.contract.spec import JobSpec
from service.db import jobs, stages
from service.db.session import transaction
from service.db.tables import EventRow, JobRow, StageRow
from tests.stored_jobs import store_job

ID = "'job_' || lpad(to_hex(n), 32, '0')"
"""Older than every id that is made today."""
BATCH = 100_000
QUEUED_EVERY = 1000


def _template(database: Database, spec: JobSpec) -> str:
    """A job that succeeded, with ten events."""
    with transaction(database) as session:
        job_id = store_job(session, spec, project="template").id
    for stage in StageName:
        with transaction(database) as session:
            claim = stages.claim(session, job_id, stage, worker="w", lease_seconds=60)
            assert claim is not None
            stages.complete(session, claim, artifacts=[], metrics={}, versions={"torch": "2"})
    with transaction(database) as session:
        count = jobs.get(session, job_id).last_event
        session.execute(text("DELETE FROM events WHERE job_id = :job AND number > 10"), {"job": job_id})
        session.execute(text("UPDATE jobs SET last_event = 10 WHERE id = :job"), {"job": job_id})
        assert count >= 10
    return job_id


def _copies(table: type[SQLModel], changed: Mapping[str, str], key: str) -> str:
    """SQL that copies a template's rows for every n of a range, with some columns computed from n."""
    names = [column.name for column in table.__table__.columns]  # type: ignore[attr-defined]
    values = ", ".join(changed.get(name, f"t.{name}") for name in names)
    return (
        f"INSERT INTO {table.__tablename__} ({', '.join(names)}) SELECT {values} "
        f"FROM generate_series(CAST(:first AS int), CAST(:last AS int)) n CROSS JOIN {table.__tablename__} t "
        f"WHERE t.{key} = :template ORDER BY n"
    )


def fill(
    database: Database,
    spec: Mapping[str, Any],
    *,
    count: int,
    project: str,
    tables: Sequence[type[SQLModel]] = (JobRow, StageRow, EventRow),
) -> None:
    """`count` jobs with five stages and ten events each: one of a thousand is queued, the others are finished.

    Labels: `team`, one of 20; `run`, its own in every job. Of the `tables` alone that are given.
    """
    template = _template(database, JobSpec.model_validate(spec))
    waits = f"n % {QUEUED_EVERY} = 0"
    job = {
        "id": ID,
        "project": f"'{project}'",
        "status": f"CASE WHEN {waits} THEN 'queued' WHEN n % 10 = 1 THEN 'failed' ELSE t.status END",
        "labels": "json_build_object('team', 'team-' || n % 20, 'run', 'run-' || n)",
        "created_at": "t.created_at - make_interval(secs => 30 * (:count - n))",
        "finished_at": f"CASE WHEN {waits} THEN NULL ELSE t.finished_at - make_interval(secs => 30 * (:count - n)) END",
    }
    stage = {
        "job_id": ID,
        "status": f"CASE WHEN {waits} THEN CASE WHEN t.position = 0 THEN 'queued' ELSE 'pending' END ELSE t.status END",
        "sent_at": "now()",
    }
    copies = {
        JobRow: _copies(JobRow, job, "id"),
        StageRow: _copies(StageRow, stage, "job_id"),
        EventRow: _copies(EventRow, {"job_id": ID}, "job_id"),
    }
    for first in range(1, count + 1, BATCH):
        with database.begin() as connection:
            # Copies refer to what the template referred to; checking sixteen million references takes minutes.
            connection.execute(text("SET LOCAL session_replication_role = replica"))
            for table in tables:
                connection.execute(
                    text(copies[table]),
                    {"first": first, "last": min(first + BATCH - 1, count), "template": template, "count": count},
                )
    with transaction(database) as session:
        session.execute(text("DELETE FROM jobs WHERE id = :template"), {"template": template})
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE"))
