"""`pdtrim up` through deaths and stops: no job, finished stage or artifact is lost, and no process is left running."""

from __future__ import annotations

import json
import time
from pathlib import Path

import httpx
import pytest

from pdtrim.client import Client, ServiceError
from pdtrim.contract.jobs import Event, JobStatus, StageName
from tests.processes import pdtrim_up, processes_of, wait_until
from tests.tiny_job import tiny_spec, write_tiny_model

# Long enough on the tiny model to be met in the middle.
LONG_SEARCH = {
    "prefill": {"remove_blocks": 3},
    "decode": {"remove_blocks": 4},
    "calibration": {"windows": 96, "window_tokens": 128},
    "search": {"algorithm": "exhaustive"},
}
LONG_HEALING = {"heal_tokens": 12_288, "batch_windows": 4, "threshold": 1.0}


def test_a_worker_killed_in_the_middle_costs_neither_the_job_nor_a_finished_stage(
    environment: dict[str, str], tmp_path: Path
) -> None:
    data_dir = Path(environment["PDTRIM_DATA_DIR"])
    spec = tiny_spec(write_tiny_model(tmp_path / "model", blocks=8), distillation=LONG_HEALING, **LONG_SEARCH)
    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        job_id = client.create(spec).id
        events: list[Event] = []
        to_kill = [StageName.REMOVAL, StageName.DISTILLATION]
        for event in client.events(job_id):
            events.append(event)
            if event.stage in to_kill and event.progress:
                to_kill.remove(event.stage)
                for process in processes_of("celery", data_dir):
                    process.kill()
        job = client.get(job_id)
        artifacts = list(client.artifacts(job_id))
        for artifact in artifacts:  # The client compares every SHA-256.
            client.download(job_id, artifact, tmp_path / "all" / artifact.stage / artifact.name)

    assert to_kill == []
    assert job.status == JobStatus.SUCCEEDED
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    started = [(event.stage, event.data["attempt"]) for event in events if event.type == "stage.started"]
    killed = (StageName.REMOVAL, StageName.DISTILLATION)
    assert started == [(name, attempt) for name in StageName for attempt in ((1, 2) if name in killed else (1,))]
    assert [event.stage for event in events if event.type == "stage.succeeded"] == list(StageName)
    assert len({(artifact.stage, artifact.name) for artifact in artifacts}) == len(artifacts)
    assert processes_of("", data_dir) == []


def test_a_job_is_paused_within_seconds_survives_a_stop_of_the_whole_service_and_is_deleted_with_its_files(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment |= {"PDTRIM_QUEUES": '["default", "gpu-80g"]'}
    data_dir = Path(environment["PDTRIM_DATA_DIR"])
    # A model below the current folder.
    spec = tiny_spec(write_tiny_model(tmp_path / "mine"), distillation=LONG_HEALING, queue="gpu-80g", priority="low")
    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        refused = httpx.post(f"{url}/v1/jobs", json=tiny_spec(Path("/etc")))
        job_id = client.create(spec).id
        wait_until(lambda: client.get(job_id).stages[2].progress > 0.1, what="distillation to be on its way")
        asked_at = time.monotonic()
        client.pause(job_id)
        wait_until(lambda: client.get(job_id).status == JobStatus.PAUSED, what="the job to be paused")
        paused_after = time.monotonic() - asked_at
        client.resume(job_id)
        wait_until(lambda: client.get(job_id).stages[2].attempt == 2, what="distillation to go on")
    assert processes_of("", data_dir) == []

    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        events = list(client.events(job_id))
        client.delete(job_id)
        with pytest.raises(ServiceError, match="No such job"):
            client.get(job_id)
        wait_until(lambda: not (data_dir / "artifacts" / "jobs" / job_id).exists(), what="the files to be deleted")

    assert refused.json()["code"] == "source_not_allowed"
    assert json.loads(refused.content)["param"] == "model.source"
    assert paused_after < 5
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert events[-1].type == "job.succeeded"
    assert [event.stage for event in events if event.type == "stage.succeeded"] == list(StageName)
    started = [(event.stage, event.data["attempt"]) for event in events if event.type == "stage.started"]
    attempts = {StageName.DISTILLATION: (1, 2, 3)}
    assert started == [(name, attempt) for name in StageName for attempt in attempts.get(name, (1,))]
