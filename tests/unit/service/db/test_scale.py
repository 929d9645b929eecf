"""On PostgreSQL with some thousand jobs, the queries of requests and reconciler find what they look for by an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import event
from sqlmodel import Session

from benchmarks.filling import fill
from pdtrim.contract.jobs import JobStatus
from service.db import deletion, events, jobs, stages, urgency
from service.db.session import connect, transaction
from service.db.tables import now
from tests import servers

SPEC = {"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}}
COUNT = 2000
LONG_AGO = now() - timedelta(days=9)
JOB = f"job_{COUNT // 2:032x}"


@pytest.fixture(scope="module")
def filled(postgres_url: str, migrated_database: str) -> Iterator[Database]:
    with servers.postgres_database(postgres_url, template=migrated_database) as url:
        database = connect(url)
        fill(database, SPEC, count=COUNT, project="serving")
        yield database
        database.dispose()


def plans(database: Database, query: Callable[[Session], object]) -> list[str]:
    """How PostgreSQL goes about the statements of a query."""
    seen: list[tuple[str, object]] = []

    def note(connection: object, cursor: object, statement: str, parameters: object, *rest: object) -> None:
        seen.append((statement, parameters))

    event.listen(database, "before_cursor_execute", note)
    with transaction(database) as session:
        query(session)
        session.rollback()
    event.remove(database, "before_cursor_execute", note)
    with database.connect() as connection:
        return [
            "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))  # type: ignore[arg-type]
            for statement, parameters in seen
        ]


@pytest.mark.parametrize(
    ("index", "query"),
    [
        ("ix_stages_status_lease", lambda session: urgency.most_urgent(session, ["default"], max_running_jobs=9)),
        ("ix_jobs_project_started_at", lambda session: urgency.most_urgent(session, ["default"])),
        ("Index", lambda session: jobs.page(session, "serving", limit=20, after=JOB)),
        ("Index", lambda session: jobs.page(session, "serving", limit=20, status=JobStatus.QUEUED)),
        ("ix_jobs_project_status_id", lambda session: jobs.page(session, "serving", limit=20, status=JobStatus.FAILED)),
        ("ix_jobs_labels", lambda session: jobs.page(session, "serving", limit=20, metadata={"run": "run-7"})),
        ("ix_jobs_labels", lambda session: jobs.page(session, "serving", limit=20, metadata={"none": "such"})),
        ("events_pkey", lambda session: events.page(session, JOB, after=3, limit=20)),
        ("events_pkey", lambda session: events.news(session, {JOB: 3, f"job_{7:032x}": 5}, limit=20)),
        ("stages_pkey", lambda session: jobs.stages(session, [JOB])),
        ("ix_stages_status_lease", stages.expired),
        ("ix_stages_status_lease", lambda session: stages.due(session, resend_seconds=30)),
        ("ix_jobs_finished_at", lambda session: deletion.mark_finished(session, before=LONG_AGO, limit=5)),
        ("ix_jobs_deleted_at", lambda session: deletion.marked(session, before=now(), limit=5)),
    ],
)
def test_a_query_reads_no_table_from_end_to_end(
    filled: Database, index: str, query: Callable[[Session], object]
) -> None:
    found = plans(filled, query)
    assert any(index in plan for plan in found), found
    # Of keys there are few.
    assert not any("Seq Scan" in line and "api_keys" not in line for plan in found for line in plan.splitlines()), found


def test_jobs_are_listed_by_all_their_labels(filled: Database) -> None:
    with transaction(filled) as session:
        both, _ = jobs.page(session, "serving", limit=20, metadata={"team": "team-7", "run": "run-27"})
        neither, _ = jobs.page(session, "serving", limit=20, metadata={"team": "team-8", "run": "run-27"})
        team, more = jobs.page(session, "serving", limit=20, metadata={"team": "team-7"})
    assert [row.labels["run"] for row in both] == ["run-27"]
    assert neither == []
    assert [row.labels["run"] for row in team] == [f"run-{1987 - 20 * step}" for step in range(20)]
    assert more
