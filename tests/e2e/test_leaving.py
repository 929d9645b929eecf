"""A worker that is asked to end in the middle of a long stage: by SIGTERM, as by Kubernetes, or by SIGHUP."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
from sqlalchemy import Engine as Database

from pdtrim.contract.jobs import JobStatus, StageName, StageStatus
from pdtrim.contract.spec import JobSpec
from service import queue
from service.db import events, jobs
from service.db.session import connect, transaction
from service.db.tables import StageRow
from service.settings import Settings
from tests import servers
from tests.processes import running, wait_until
from tests.stored_jobs import store_job
from tests.tiny_job import tiny_spec, write_tiny_model

STAGE = StageName.DISTILLATION
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""Kubernetes sends the one, a terminal that is closed the other."""
LONG_HEALING = {"heal_tokens": 20_480, "batch_windows": 4, "threshold": 1.0}


def stage_row(database: Database, job_id: str) -> StageRow:
    with transaction(database) as session:
        return session.get_one(StageRow, (job_id, STAGE))


def test_a_worker_that_is_asked_to_end_hands_its_stage_to_another_at_no_cost(
    environment: dict[str, str], postgres_database_url: str, empty_redis_url: str, s3: servers.S3Server, s3_url: str,
    tmp_path: Path, record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    production = environment | s3.environment | {
        "PDTRIM_DATABASE_URL": postgres_database_url,
        "PDTRIM_BROKER_URL": empty_redis_url,
        "PDTRIM_ARTIFACTS_URL": s3_url,
        "PDTRIM_S3_ENDPOINT_URL": s3.endpoint_url,
        "PDTRIM_ALLOWED_SOURCES": json.dumps([tmp_path.as_uri()]),
        # One that died would end the job; nobody reconciles here, either.
        "PDTRIM_MAX_ATTEMPTS": "1",
        "PDTRIM_LEASE_SECONDS": "600",
        "PDTRIM_SHUTDOWN_SECONDS": "0",
    }  # fmt: skip
    database = connect(postgres_database_url)
    spec = tiny_spec(write_tiny_model(tmp_path / "model"), distillation=LONG_HEALING)
    with transaction(database) as session:
        job_id = store_job(session, JobSpec.model_validate(spec)).id
    settings = Settings(data_dir=tmp_path / "data", broker_url=empty_redis_url)
    queue.send(settings, queue.WakeUp(job_id, StageName.SCORING))

    def is_at(attempt: int) -> bool:
        return stage_row(database, job_id).attempt == attempt

    with ExitStack() as stack:
        # As many as the signals, and one that is left.
        names = range(1 + len(SIGNALS))
        workers = [stack.enter_context(running(["worker"], production, tmp_path / f"{n}.log")) for n in names]
        for attempt, how in enumerate(SIGNALS, 1):
            wait_until(lambda: stage_row(database, job_id).progress > 0, what="healing to be on its way")
            busy_child = int((stage_row(database, job_id).worker or "").rpartition(":")[2])
            busy = next(worker for worker in workers if worker.pid == psutil.Process(busy_child).ppid())
            asked_at = time.monotonic()
            busy.send_signal(how)
            wait_until(partial(is_at, attempt + 1), seconds=60, what="another to take the stage")
            taken = f"A worker asked to end by {how.name}: its stage is another's after"
            record_property(taken, f"{time.monotonic() - asked_at:.1f} s")
            assert busy.wait(30) == 0
            record_property(f"A worker asked to end by {how.name}: gone after", f"{time.monotonic() - asked_at:.1f} s")

        def ended() -> bool:
            with transaction(database) as session:
                return JobStatus(jobs.get(session, job_id).status).final

        wait_until(ended, what="the job to end")

    row = stage_row(database, job_id)
    handed_back = len(SIGNALS)
    assert (row.status, row.attempt, row.attempts_forgiven) == (StageStatus.SUCCEEDED, 1 + handed_back, handed_back)
    with transaction(database) as session:
        assert jobs.get(session, job_id).status == JobStatus.SUCCEEDED
        told = [event.message for event in events.page(session, job_id, after=0, limit=1000)[0] if event.stage == STAGE]
    queued_again = [message for message in told if "is being stopped; stage distillation is queued again" in message]
    assert len(queued_again) == handed_back
    database.dispose()
