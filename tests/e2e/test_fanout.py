"""A search shared by worker processes on PostgreSQL and Valkey, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from sqlalchemy import Engine
from sqlmodel import col, select

from pdtrim.client import Client
from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import RemovalResult
from service.commands.embedded import worker_name
from service.db.session import connect, transaction
from service.db.tables import EvaluationRow, HelperRow
from service.queue import celery_app
from tests import servers
from tests.processes import running, wait_until
from tests.tiny_job import tiny_spec, write_tiny_model

PRODUCTS = ("plan.json", "search.json")


@pytest.fixture
def shared(
    environment: dict[str, str], postgres_database_url: str, empty_redis_url: str, tmp_path: Path
) -> dict[str, str]:
    (port,) = servers.free_ports(1)
    return environment | {
        "PDTRIM_DATABASE_URL": postgres_database_url,
        "PDTRIM_BROKER_URL": empty_redis_url,
        "PDTRIM_PORT": str(port),
        "PDTRIM_ALLOWED_SOURCES": json.dumps([tmp_path.as_uri()]),
    }


@pytest.fixture
def database(shared: dict[str, str]) -> Iterator[Engine]:
    engine = connect(shared["PDTRIM_DATABASE_URL"])
    yield engine
    engine.dispose()


def searched(client: Client, job_id: str, folder: Path) -> tuple[list[bytes], RemovalResult]:
    """What a job's removal stage left, and what it found; the rest of the job is not wanted."""
    for event in client.events(job_id):
        if event.type == "stage.succeeded" and event.stage == StageName.REMOVAL:
            client.cancel(job_id)
    found = {artifact.name: artifact for artifact in client.artifacts(job_id) if artifact.stage == StageName.REMOVAL}
    job = client.get(job_id)
    assert [stage.attempt for stage in job.stages if stage.name == StageName.REMOVAL] == [1]
    removal = job.result(RemovalResult)
    assert removal is not None
    for name in PRODUCTS:
        client.download(job_id, found[name], folder / job_id / name)
    return [(folder / job_id / name).read_bytes() for name in PRODUCTS], removal


def helper_at_work(database: Engine) -> str | None:
    """A worker that has claimed what it has not answered, once a helper has answered something of the same batch."""
    query = select(HelperRow.worker, col(EvaluationRow.result).is_not(None)).join(
        EvaluationRow, col(EvaluationRow.claimed_by) == HelperRow.id
    )
    with transaction(database) as session:
        found = session.exec(query).all()
    busy = [worker for worker, answered in found if not answered]
    return busy[0] if 0 < len(busy) < len(found) else None


def test_a_search_shared_by_three_workers_of_which_one_is_killed_ends_as_that_of_one_alone(
    shared: dict[str, str], database: Engine, tmp_path: Path
) -> None:
    spec = tiny_spec(
        write_tiny_model(tmp_path / "model", blocks=16),
        calibration={"windows": 384, "window_tokens": 64},
        distillation={"enabled": False},
    )
    search = {"algorithm": "greedy", "racing": False, "evaluations": 10}
    with ExitStack() as processes:
        processes.enter_context(running(["serve"], shared, tmp_path / "gateway.log"))
        workers = [processes.enter_context(running(["worker"], shared, tmp_path / f"{n}.log")) for n in range(3)]
        client = processes.enter_context(Client(f"http://127.0.0.1:{shared['PDTRIM_PORT']}"))
        wait_until(client.ready, what="the gateway to be ready")
        names = [worker_name(process.pid) for process in workers]
        broker = celery_app(shared["PDTRIM_BROKER_URL"]).control
        wait_until(lambda: len(broker.ping(names, timeout=1.0, limit=3) or []) == 3, what="the workers to be ready")

        by_one, removal = searched(client, client.create({**spec, "search": search}).id, tmp_path)
        assert (removal.workers, removal.helpers_share) == (1, 0)

        job_id = client.create({**spec, "search": {**search, "parallelism": 3}}).id
        victim = None
        while victim is None:
            time.sleep(0.02)
            victim = helper_at_work(database)
            assert not client.get(job_id).status.final, "nobody helped"
        os.kill(int(victim.rpartition(":")[2]), signal.SIGKILL)
        by_three, removal = searched(client, job_id, tmp_path)
        assert by_three == by_one
        assert removal.workers is not None
        assert removal.workers >= 2
        assert removal.helpers_share
