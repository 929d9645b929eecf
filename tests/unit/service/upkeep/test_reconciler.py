"""What the reconciler deletes, with a store that fails and beside another reconciler."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from threading import Barrier, Event, Thread
from threading import enumerate as enumerate_threads

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine as Database
from sqlmodel import Session, select

from pdtrim.contract.jobs import JobStatus, StageName
from pdtrim.contract.spec import JobSpec
from service.app import create_app
from service.db import deletion, jobs, stages
from service.db.session import connect, migrate, transaction
from service.db.tables import JobRow, StageRow, now
from service.queue import BrokerUnavailable
from service.settings import Settings
from service.storage import ArtifactStore, StoreUnavailable, open_store
from service.upkeep.reconciler import PURGED_AT_ONCE, Reconciler, _repeat, purge, sweep
from tests.processes import wait_until
from tests.servers import free_ports
from tests.stored_jobs import store_job

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data").model_copy(update={"lease_seconds": 0.0})


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = connect(settings.database_url)
    migrate(database)
    yield database
    database.dispose()


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings.artifacts_url)


def deleted(database: Database, store: ArtifactStore, files: int = 3) -> str:
    """A job that is marked as deleted, with files."""
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        jobs.request_cancel(session, job_id)
        deletion.mark(session, job_id)
    for number in range(files):
        store.put_bytes(f"jobs/{job_id}/scoring/1/{number}/file", b"x")
    return job_id


def exists(database: Database, job_id: str) -> bool:
    with transaction(database) as session:
        return session.get(JobRow, job_id) is not None


@pytest.mark.parametrize(
    ("ask", "ended"), [(jobs.request_pause, JobStatus.PAUSED), (jobs.request_cancel, JobStatus.CANCELLED)]
)
def test_a_job_whose_worker_died_before_it_stopped_is_stopped(
    ask: Callable[[Session, str], JobRow], ended: JobStatus, database: Database, settings: Settings
) -> None:
    with transaction(database) as session:
        job_id = store_job(session, SPEC).id
        stages.claim(session, job_id, StageName.SCORING, worker="dead", lease_seconds=0.0)
        assert ask(session, job_id).status != ended

    assert sweep(database, settings) == 0

    with transaction(database) as session:
        assert jobs.get(session, job_id).status == ended


def test_a_lease_passes_before_files_go(database: Database, store: ArtifactStore, settings: Settings) -> None:
    job_id = deleted(database, store)

    assert purge(database, settings.model_copy(update={"lease_seconds": 60.0}), store) == 0

    assert exists(database, job_id)
    assert len(list(store.list_keys(f"jobs/{job_id}"))) == 3


def test_a_process_that_dies_between_files_and_rows_leaves_the_rest_to_the_next(
    database: Database, store: ArtifactStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = deleted(database, store)

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    for place in ("shutil.rmtree", "service.upkeep.reconciler.deletion.remove"):
        with monkeypatch.context() as patch:
            patch.setattr(place, die)
            with pytest.raises(KeyboardInterrupt):
                purge(database, settings, store)
        assert exists(database, job_id)

    assert purge(database, settings, store) == 1
    assert not exists(database, job_id)
    assert list(store.list_keys("")) == []


def test_a_job_whose_files_cannot_be_deleted_keeps_no_other_waiting(
    database: Database, store: ArtifactStore, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, other = deleted(database, store), deleted(database, store)
    rmdir = os.rmdir

    def refuse(path: str | Path, **where: int) -> None:
        if stuck in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        rmdir(path, **where)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        with pytest.raises(StoreUnavailable, match="Permission denied"):
            purge(database, settings, store)
        with pytest.raises(StoreUnavailable, match="Permission denied"):
            purge(database, settings, store)
    assert [exists(database, job_id) for job_id in (stuck, other)] == [True, False]

    assert purge(database, settings, store) == 1


def test_two_reconcilers_delete_side_by_side(database: Database, store: ArtifactStore, settings: Settings) -> None:
    job_ids = [deleted(database, store, files=15) for _ in range(3)]
    together = Barrier(3)

    def purge_all(number: int) -> None:
        together.wait()
        while any(exists(database, job_id) for job_id in job_ids):
            purge(database, settings, store)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(purge_all, range(3)))

    assert list(store.list_keys("")) == []


def test_finished_jobs_go_when_they_are_older_than_the_retention(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    long_ago = now() - timedelta(days=3)
    with transaction(database) as session:
        old, resumed, young, paused = (store_job(session, SPEC) for _ in range(4))
        for job in (old, resumed, young):
            jobs.request_cancel(session, job.id)
        jobs.request_pause(session, paused.id)
        old.finished_at = resumed.finished_at = long_ago
        for job in (old, resumed, young, paused):
            job.created_at = long_ago
        jobs.resume(session, resumed.id)
    for job in (old, young):
        store.put_bytes(f"jobs/{job.id}/scoring/1/file", b"x")

    assert purge(database, settings, store) == 0
    assert purge(database, settings.model_copy(update={"retention_days": 2.0}), store) == 1

    assert [exists(database, job.id) for job in (old, resumed, young, paused)] == [False, True, True, True]
    assert list(store.list_keys("")) == [f"jobs/{young.id}/scoring/1/file"]


def test_finished_jobs_go_in_their_order_while_more_is_kept_than_the_retention(
    database: Database, store: ArtifactStore, settings: Settings
) -> None:
    with transaction(database) as session:
        found = [store_job(session, SPEC) for _ in range(5)]
        paused, *finished = found
        jobs.request_pause(session, paused.id)
        for hours, job in enumerate(finished):
            jobs.request_cancel(session, job.id)
            job.finished_at = now() - timedelta(hours=hours)
        for job in found:
            job.artifact_bytes = 100
        finished[2].artifact_bytes = 0

    assert purge(database, settings.model_copy(update={"retention_bytes": 400}), store) == 0
    assert purge(database, settings.model_copy(update={"retention_bytes": 399}), store) == 1
    assert [exists(database, job.id) for job in finished] == [True, True, True, False]
    assert purge(database, settings.model_copy(update={"retention_bytes": 1}), store) == 2
    assert [exists(database, job.id) for job in found] == [True, False, False, True, False]


def test_an_outage_is_told_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    stopping, calls = Event(), 0

    def away_at_first() -> int:
        nonlocal calls
        calls += 1
        if calls < 4:
            raise StoreUnavailable("the bucket is away")
        stopping.wait(0.05)
        if calls == 6:
            stopping.set()
        return 0

    with caplog.at_level("WARNING", "service.upkeep.reconciler"):
        _repeat(away_at_first, 0.01, stopping)

    assert calls == 6
    assert [record.getMessage() for record in caplog.records] == [
        "the reconciler failed; it tries again until it works: the bucket is away",
        "the reconciler works again, after 3 failures",
    ]


def test_a_stop_does_not_wait_for_the_next_try() -> None:
    stopping, failed = Event(), Event()

    def fail() -> int:
        failed.set()
        raise StoreUnavailable("the bucket is away")

    thread = Thread(target=_repeat, args=(fail, 600.0, stopping))
    thread.start()
    assert failed.wait(10)
    stopping.set()
    thread.join(10)
    assert not thread.is_alive()


def test_what_a_broker_that_is_away_did_not_take_is_sent_as_soon_as_it_is_back(
    database: Database, settings: Settings, redis_url: str
) -> None:
    with transaction(database) as session:
        for _ in range(2):
            store_job(session, SPEC)
        for row in session.exec(select(StageRow)):
            row.sent_at = None

    (closed,) = free_ports(1)
    with pytest.raises(BrokerUnavailable):
        sweep(database, settings.model_copy(update={"broker_url": f"redis://127.0.0.1:{closed}/0"}))

    assert sweep(database, settings.model_copy(update={"broker_url": redis_url})) == 2


def test_a_gateway_that_is_told_so_leaves_it_to_others(settings: Settings) -> None:
    quick = settings.model_copy(update={"reconcile_seconds": 0.05, "reconcile_in_gateway": False})
    with TestClient(create_app(quick)):
        assert {"sweep", "purge"}.isdisjoint(thread.name for thread in enumerate_threads())


@pytest.mark.slow
def test_many_deleted_jobs_go_without_a_pause_between(settings: Settings, store: ArtifactStore) -> None:
    database = connect(settings.database_url)
    migrate(database)
    job_ids = [deleted(database, store) for _ in range(5 * PURGED_AT_ONCE)]
    # One pause is longer than the test.
    rarely = settings.model_copy(update={"reconcile_seconds": 60.0})

    with Reconciler(database, rarely, store):
        wait_until(lambda: not any(exists(database, job_id) for job_id in job_ids), seconds=30)

    assert list(store.list_keys("")) == []


def test_a_gateway_deletes_by_itself(settings: Settings, store: ArtifactStore) -> None:
    database = connect(settings.database_url)
    migrate(database)
    job_id = deleted(database, store)
    quick = settings.model_copy(update={"reconcile_seconds": 0.05})

    with TestClient(create_app(quick)):
        wait_until(lambda: not exists(database, job_id), what="the reconciler to delete the job")

    assert list(store.list_keys("")) == []
    database.dispose()
