"""In which order a woken worker runs what is due, through real messages."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from kombu import Queue
from sqlalchemy import Engine as Database
from sqlmodel import Session, col, select

from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.queues import Priority
from pdtrim.contract.spec import JobSpec
from service import queue
from service.db import jobs
from service.db.session import connect, migrate, transaction
from service.db.tables import EventRow, JobRow
from service.queue import WakeUp
from service.settings import Settings
from service.storage import open_store
from tests.processes import wait_until
from tests.running import small, working
from tests.stored_jobs import store_job
from workers.running.attempt import Worker, run_most_urgent
from workers.stages import STAGES

pytestmark = pytest.mark.server

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
QUEUES = ["default", "gpu-80g"]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings that the tasks' module reads from the environment."""
    monkeypatch.setenv("PDTRIM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PDTRIM_QUEUES", json.dumps(QUEUES))
    for stage in StageName:
        monkeypatch.setitem(STAGES, stage, small)
    return Settings()


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = connect(settings.database_url)
    migrate(database)
    yield database
    database.dispose()


def create(session: Session, priority: Priority = Priority.NORMAL, queue: str = "default") -> str:
    return store_job(session, SPEC.model_copy(update={"priority": priority, "queue": queue})).id


def submit(database: Database, settings: Settings, **wanted: Priority | str) -> str:
    with transaction(database) as session:
        job_id = create(session, **wanted)  # type: ignore[arg-type]
        came_to = jobs.queues(session, [job_id])[job_id]
    queue.send(settings, WakeUp(job_id, StageName.SCORING, came_to))
    return job_id


def started(database: Database) -> list[str]:
    """The jobs whose stages were started, in that order."""
    with transaction(database) as session:
        rows = session.exec(select(EventRow).where(EventRow.type == "stage.started").order_by(col(EventRow.created_at)))
        return [row.job_id for row in rows]


def all_ended(database: Database) -> bool:
    with transaction(database) as session:
        return all(JobStatus(status).final for status in session.exec(select(JobRow.status)))


def under_way(settings: Settings) -> Counter[tuple[str, str, str]]:
    """The messages in the broker, which are taken out: queue, task, job."""
    found: Counter[tuple[str, str, str]] = Counter()
    with queue.celery_app(settings.broker_url).connection_for_read() as connection:
        for name in QUEUES:
            channel = connection.channel()
            while message := Queue(queue.broker_queue(name), channel=channel).get(no_ack=True):
                found[name, message.headers["task"], message.payload[0][0]] += 1
    return found


def test_six_jobs_submitted_at_once_to_one_worker_end_one_after_the_other(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    six = [submit(database, settings) for _ in range(6)]
    with working(settings, monkeypatch):
        wait_until(lambda: all_ended(database), seconds=180, what="all jobs to end")
    assert started(database) == [job_id for job_id in six for _ in StageName]


def test_priorities_count_where_the_broker_keeps_messages_as_files(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_priority = {priority: submit(database, settings, priority=priority) for priority in reversed(Priority)}
    with working(settings, monkeypatch):
        wait_until(lambda: all_ended(database), seconds=180, what="all jobs to end")
    assert started(database) == [by_priority[priority] for priority in Priority for _ in StageName]


def test_messages_of_the_version_before_wake_a_worker(
    settings: Settings, database: Database, empty_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PDTRIM_BROKER_URL", empty_redis_url)
    at_redis = settings.model_copy(update={"broker_url": empty_redis_url})
    with transaction(database) as session:
        waiting = [create(session) for _ in range(3)]
    app = queue.celery_app(empty_redis_url)
    # It had a list for each priority. A message of its own may be late, too.
    for job_id, task, priority in [
        (waiting[0], "pdtrim.scoring", 3),
        (waiting[1], "pdtrim.scoring", 6),
        (waiting[2], "pdtrim.scoring", 0),
        (waiting[2], "pdtrim.removal", 3),
    ]:
        app.send_task(task, args=[job_id], queue=queue.QUEUE, priority=priority)
    with working(at_redis, monkeypatch):
        wait_until(lambda: all_ended(database), seconds=180, what="all jobs to end")
    assert started(database) == [job_id for job_id in waiting for _ in StageName]


def test_a_worker_that_is_to_end_takes_no_stage_and_leaves_its_message_to_others(
    settings: Settings, database: Database
) -> None:
    with transaction(database) as session:
        job_id = create(session)
    worker = Worker(settings, database, open_store(settings.artifacts_url), "w", stopping=lambda: True)

    run_most_urgent(worker, QUEUES, WakeUp(job_id, StageName.SCORING))

    assert started(database) == []
    assert under_way(settings) == {("default", "pdtrim.scoring", job_id): 1}


def test_a_worker_woken_by_one_queue_that_takes_a_stage_of_another_leaves_a_message_in_the_first(
    settings: Settings, database: Database
) -> None:
    with transaction(database) as session:
        normal, urgent = create(session), create(session, Priority.HIGH, "gpu-80g")
    worker = Worker(settings, database, open_store(settings.artifacts_url), "w")

    run_most_urgent(worker, QUEUES, WakeUp(normal, StageName.SCORING))

    assert started(database) == [urgent]
    assert under_way(settings) == {
        ("default", "pdtrim.scoring", normal): 1,
        ("gpu-80g", "pdtrim.removal", urgent): 1,
    }


def test_a_worker_that_is_woken_for_nothing_does_and_sends_nothing(settings: Settings, database: Database) -> None:
    worker = Worker(settings, database, open_store(settings.artifacts_url), "w")
    with transaction(database) as session:
        elsewhere = create(session, queue="gpu-80g")
    run_most_urgent(worker, ["default"], WakeUp(elsewhere, StageName.SCORING))
    assert started(database) == []
    assert not under_way(settings)
