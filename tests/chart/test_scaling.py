"""The query by which KEDA counts the work for a pool, on a real database of the service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine as Database
from sqlalchemy import text
from sqlmodel import Session

from pdtrim.contract.jobs import StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service.db.session import connect, transaction
from service.db.tables import StageRow, now
from tests.chart.rendering import KEDA, of_kind, render
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


@pytest.fixture
def database(postgres_database_url: str) -> Iterator[Database]:
    database = connect(postgres_database_url)
    yield database
    database.dispose()


def submit(session: Session, status: StageStatus, queue: str | None = None, *, held: bool = False) -> None:
    """A job whose first stage is in a state, or is held back until others end."""
    job_id = store_job(session, SPEC.model_copy(update={"queue": queue})).id
    row = session.get_one(StageRow, (job_id, StageName.SCORING))
    row.status, row.sent_at = status, None if held else now()


def test_waiting_and_running_stages_count_for_the_pool_that_takes_them(database: Database) -> None:
    demand = {
        name.removeprefix("pdtrim-worker-"): scaled["spec"]["triggers"][0]["metadata"]["query"]
        for name, scaled in of_kind(render(KEDA), "ScaledObject").items()
    }
    with transaction(database) as session:
        for status in StageStatus:
            submit(session, status)
        for status in (StageStatus.QUEUED, StageStatus.QUEUED, StageStatus.RUNNING, StageStatus.SUCCEEDED):
            submit(session, status, queue="gpu-80g")
        submit(session, StageStatus.QUEUED, queue="another")
        submit(session, StageStatus.QUEUED, held=True)
        session.flush()
        counted = {pool: session.execute(text(query)).scalar_one() for pool, query in demand.items()}
    assert counted == {"default": 2, "big": 3}
