"""`pdtrim up` as a user meets it: jobs over HTTP, workers that are killed, a stop that leaves nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from service.client import Client
from service.contract.jobs import Event, JobStatus, StageName
from tests.processes import pdtrim_up, processes_of, wait_until
from tests.tiny_job import tiny_spec, write_tiny_model

# What a user has beside the downloaded folder: transformers, and nothing of ours.
LOAD_AND_GENERATE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("import os", return_tensors="pt").input_ids
out = model.generate(ids, max_new_tokens=40, min_new_tokens=40, do_sample=False, use_cache=True)
assert "pdtrim" not in " ".join(sys.modules) and "workers" not in sys.modules
print(out.shape[1] - ids.shape[1], model.config.num_hidden_layers)
"""


def reference_job(**changes: object) -> dict[str, object]:
    return {
        "model": "reference",
        "prefill": {"remove_blocks": 2},
        "decode": {"remove_blocks": 4},
        "calibration": {"windows": 4, "window_tokens": 64},
        "search": {"evaluations": 30},
        "distillation": {"heal_tokens": 4096, "batch_windows": 4},
        "evaluation": {"windows": 4, "speed_tokens": 2, "speed_repeats": 1},
        **changes,
    }


def test_a_job_over_plain_http_ends_in_a_checkpoint_that_transformers_alone_loads(
    environment: dict[str, str], tmp_path: Path
) -> None:
    with pdtrim_up(environment, tmp_path) as url, httpx.Client(base_url=url, timeout=120) as http:
        job_id = http.post("/v1/jobs", json=reference_job()).raise_for_status().json()["id"]
        with http.stream("GET", f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"}) as stream:
            types = [line.removeprefix("event: ") for line in stream.iter_lines() if line.startswith("event: ")]
        assert types[-1] == "job.succeeded"
        assert types.count("stage.succeeded") == len(StageName)

        listed = http.get(f"/v1/jobs/{job_id}/artifacts", params={"limit": 100, "stage": "export"}).json()["data"]
        wanted = [artifact for artifact in listed if artifact["name"].startswith("decode/")]
        for artifact in wanted:
            content = http.get(f"/v1/jobs/{job_id}/artifacts/{artifact['id']}/content").raise_for_status().content
            path = tmp_path / artifact["name"]
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        loaded = subprocess.run(
            [sys.executable, "-c", LOAD_AND_GENERATE, str(tmp_path / "decode")],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert loaded.stdout.split() == ["40", "8"]
    assert processes_of("", Path(environment["PDTRIM_DATA_DIR"])) == []


@pytest.mark.parametrize("stage", [StageName.REMOVAL, StageName.DISTILLATION])
def test_a_worker_killed_in_the_middle_costs_neither_the_job_nor_a_finished_stage(
    stage: StageName, environment: dict[str, str], tmp_path: Path
) -> None:
    data_dir = Path(environment["PDTRIM_DATA_DIR"])
    spec = reference_job(calibration={"windows": 8, "window_tokens": 128}, distillation={"heal_tokens": 16384})
    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        job_id = client.create(spec).id
        events: list[Event] = []
        killed = False
        for event in client.events(job_id):
            events.append(event)
            if not killed and event.stage == stage and event.data.get("progress", 0) > 0.1:
                for process in processes_of("celery", data_dir):
                    process.kill()
                killed = True
        job = client.get(job_id)
        artifacts = list(client.artifacts(job_id))
        for artifact in artifacts:
            client.download(job_id, artifact, tmp_path / "all" / artifact.stage / artifact.name)

    assert killed
    assert job.status == JobStatus.SUCCEEDED
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    started = [(event.stage, event.data["attempt"]) for event in events if event.type == "stage.started"]
    expected = [(name, attempt) for name in StageName for attempt in ((1, 2) if name == stage else (1,))]
    assert started == expected
    succeeded = [event.stage for event in events if event.type == "stage.succeeded"]
    assert succeeded == list(StageName)
    assert len({(artifact.stage, artifact.name) for artifact in artifacts}) == len(artifacts)


def test_a_job_survives_a_stop_of_the_whole_service(environment: dict[str, str], tmp_path: Path) -> None:
    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        job_id = client.create(reference_job(distillation={"heal_tokens": 16384})).id
        wait_until(lambda: client.get(job_id).stages[2].progress > 0, what="distillation to begin")
    assert processes_of("", Path(environment["PDTRIM_DATA_DIR"])) == []
    with pdtrim_up(environment, tmp_path) as url, Client(url) as client:
        wait_until(lambda: client.get(job_id).status.final, what="the job to end")
        assert client.get(job_id).status == JobStatus.SUCCEEDED


def test_a_model_below_the_current_folder_may_be_named_and_another_may_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "mine")
    with pdtrim_up(environment, tmp_path) as url, httpx.Client(base_url=url) as http:
        assert http.post("/v1/jobs", json=tiny_spec(model)).status_code == 201
        refused = http.post("/v1/jobs", json=tiny_spec(Path("/etc")))
    assert refused.json()["code"] == "source_not_allowed"
    assert json.loads(refused.content)["param"] == "model.source"
