from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import text

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from pdtrim.contract.spec import JobSpec
from service.db import artifacts, stages
from service.db.session import connect, migrate, transaction
from service.settings import Settings
from service.storage import StoreUnavailable, open_store
from tests.found import RESULTS
from tests.observing import lines, logged
from tests.running import run_stage
from tests.servers import free_ports
from tests.stored_jobs import store_job
from workers.running.attempt import Worker
from workers.running.lease import StopRequested
from workers.running.metrics import WorkerMetrics
from workers.stages import STAGES
from workers.stages.context import StageContext

SPEC = JobSpec.model_validate({"model": "reference", "prefill": {"remove_blocks": 1}, "decode": {"remove_blocks": 2}})
SECONDS = "pdtrim_worker_stage_duration_seconds"
Stage = Callable[[StageContext], Result]


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    settings = Settings(data_dir=tmp_path / "data", log_format="json", retry_seconds=0.2)
    database = connect(settings.database_url)
    migrate(database)
    return Worker(settings, database, open_store(settings.artifacts_url), name="host:1")


def run(worker: Worker, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a new job's first stage with another content; returns the job's id."""
    monkeypatch.setitem(STAGES, StageName.SCORING, stage)
    with transaction(worker.database) as session:
        job_id = store_job(session, SPEC).id
    run_stage(worker, job_id, StageName.SCORING)
    return job_id


def ended(worker: Worker, outcome: str) -> float:
    labels = {"stage": "scoring", "outcome": outcome}
    return worker.metrics.registry.get_sample_value(f"{SECONDS}_count", labels) or 0.0


def writes(context: StageContext) -> Result:
    found = RESULTS[StageName.SCORING]
    context.write_json("a.json", found)
    return found


def raises(error: Exception) -> Stage:
    def stage(context: StageContext) -> Result:
        raise error

    return stage


@pytest.mark.parametrize(
    ("stage", "outcome"),
    [
        (writes, "succeeded"),
        (raises(RuntimeError("x")), "failed"),
        (raises(StoreUnavailable("x")), "released"),
        (raises(StopRequested()), "stopped"),
        (raises(stages.LeaseLost("x")), "lease_lost"),
    ],
)
def test_every_attempt_is_counted_by_its_outcome(
    stage: Stage, outcome: str, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(worker, stage, monkeypatch)
    found = {name: ended(worker, name) for name in ("succeeded", "failed", "released", "stopped", "lease_lost")}
    assert found == {name: float(name == outcome) for name in found}
    assert worker.metrics.registry.get_sample_value("pdtrim_worker_leases_lost_total") == (outcome == "lease_lost")


def test_an_outcome_that_cannot_be_recorded_is_none_of_the_others(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose_the_database(context: StageContext) -> Result:
        with worker.database.begin() as connection:
            connection.execute(text("ALTER TABLE stages RENAME TO hidden"))
        raise RuntimeError

    run(worker, lose_the_database, monkeypatch)
    assert ended(worker, "unrecorded") == 1


def test_bytes_are_those_of_the_recorded_artifacts(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = run(worker, writes, monkeypatch)
    with transaction(worker.database) as session:
        sizes = [row.size for row in artifacts.of_stage(session, job_id, StageName.SCORING)]
    counted = worker.metrics.registry.get_sample_value("pdtrim_worker_artifact_bytes_total", {"stage": "scoring"})
    assert counted == sum(sizes) > 0


def test_a_stages_log_lines_say_whose_they_are(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    with logged(worker.settings) as stream:
        job_id = run(worker, raises(RuntimeError("x")), monkeypatch)
    found = [line for line in lines(stream) if line["logger"] == "workers.running.attempt"]
    assert [line["event"] for line in found] == ["stage started", "the stage failed", "stage ended"]
    for line in found:
        ids = (line["job_id"], line["stage"], line["attempt"], line["worker"])
        assert ids == (job_id, "scoring", 1, "host:1")
    assert found[-1]["outcome"] == "failed"


def test_lines_of_the_thread_that_renews_the_lease_carry_the_ids_too(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_for_a_warning(context: StageContext) -> Result:
        with worker.database.begin() as connection:
            connection.execute(text("ALTER TABLE stages RENAME TO hidden"))
        while "not renewed" not in stream.getvalue():
            context.check()
        with worker.database.begin() as connection:
            connection.execute(text("ALTER TABLE hidden RENAME TO stages"))
        return RESULTS[StageName.SCORING]

    monkeypatch.setattr("workers.running.lease.HEARTBEAT_S", 0.02)
    with logged(worker.settings) as stream:
        job_id = run(worker, wait_for_a_warning, monkeypatch)
    line = next(line for line in lines(stream) if "not renewed" in line["event"])
    assert (line["job_id"], line["attempt"]) == (job_id, 1)
    assert ended(worker, "succeeded") == 1


def test_the_metrics_are_served_on_a_port_and_a_port_in_use_is_no_failure(tmp_path: Path) -> None:
    metrics, (port,) = WorkerMetrics(), free_ports(1)
    metrics.serve(port)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        assert b"pdtrim_worker_leases_lost_total 0.0" in response.read()
    with (
        socket.create_server(("0.0.0.0", 0)) as taken,
        logged(Settings(data_dir=tmp_path, log_format="json")) as stream,
    ):
        metrics.serve(taken.getsockname()[1])
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert "cannot be had" in line["event"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use")
def test_device_memory_is_what_pytorch_has_taken() -> None:
    metrics = WorkerMetrics()
    held = torch.zeros(2**20, device="cuda")

    def read(kind: str) -> float:
        labels = {"device": "0", "kind": kind}
        return metrics.registry.get_sample_value("pdtrim_worker_device_memory_bytes", labels) or 0.0

    assert held.nbytes <= read("allocated") <= read("reserved") < read("total")
    assert 0 < read("free") < read("total")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_device_there_is_no_device_memory() -> None:
    found = [family for family in WorkerMetrics().registry.collect() if "device_memory" in family.name]
    assert [family.samples for family in found] == [[]]
