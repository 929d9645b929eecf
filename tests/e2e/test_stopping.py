"""A worker that is told to stop, as an autoscaler or a drained node does: it hands its stage back, and ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from sqlmodel import select

from service import queue
from service.contract.jobs import StageName, StageStatus
from service.contract.spec import JobSpec
from service.db import jobs
from service.db.session import connect, migrate, transaction
from service.db.tables import StageRow
from service.settings import Settings
from tests.processes import running, wait_until

PING = [sys.executable, "-m", "service.cli", "ping"]
SPEC = {"model": "reference", "prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}}


def test_a_worker_answers_pings_until_it_is_told_to_stop_and_then_hands_its_stage_back(
    environment: dict[str, str], empty_redis_url: str, tmp_path: Path
) -> None:
    environment = environment | {"PDTRIM_BROKER_URL": empty_redis_url, "PDTRIM_SHUTDOWN_SECONDS": "0"}
    settings = Settings(data_dir=Path(environment["PDTRIM_DATA_DIR"]), broker_url=empty_redis_url)
    engine = connect(settings.database_url)
    migrate(engine)

    def row() -> StageRow:
        with transaction(engine) as session:
            return session.exec(select(StageRow).where(StageRow.name == StageName.SCORING)).one()

    def ping() -> int:
        return subprocess.run(PING, env=environment, cwd=tmp_path, check=False).returncode

    with running(["worker"], environment, tmp_path / "worker.log") as worker:
        wait_until(lambda: ping() == 0, what="the worker to answer")
        with transaction(engine) as session:
            job_id = jobs.create(session, JobSpec.model_validate(SPEC)).id
        queue.send(settings, job_id, StageName.SCORING)
        wait_until(lambda: row().status == StageStatus.RUNNING, what="the worker to take the stage")
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(60) == 0
    assert ping() == 1
    handed_back = row()
    engine.dispose()
    assert handed_back.status == StageStatus.QUEUED
    assert (handed_back.attempt, handed_back.attempts_forgiven, handed_back.lease_expires_at) == (1, 1, None)
    assert "handed_back" in (tmp_path / "worker.log").read_text()


def test_a_ping_forgives_a_broker_that_is_away(environment: dict[str, str], tmp_path: Path) -> None:
    away = environment | {"PDTRIM_BROKER_URL": "redis://127.0.0.1:1/0"}
    done = subprocess.run(PING, env=away, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert (done.returncode, "out of reach" in done.stdout + done.stderr) == (0, True)
