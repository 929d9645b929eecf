"""The pair that a real job exports: submitted over HTTP to a running service, downloaded, its answers computed.

Call it as `python serving/vllm_tests/make_job.py FOLDER`, where `service` and `workers` are installed; the folder's
name is one of `JOBS`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx

from pdtrim.client import Client
from pdtrim.contract.jobs import JobStatus
from tests.processes import pdtrim_up, wait_until
from vllm_tests.make_pairs import expect

JOBS: dict[str, Any] = {
    "job": {"prefill": {"remove_blocks": 2}, "decode": {"remove_blocks": 4}},
    "job_parts": {"prefill": {"remove_blocks": 0, "kv_only_blocks": 4}, "decode": {"remove_blocks": 0}},
}
"""What each half gives up."""
SHARED: dict[str, Any] = {
    "model": "reference",
    "calibration": {"windows": 8, "window_tokens": 64},
    "search": {"evaluations": 24},
    "distillation": {"heal_tokens": 4096, "threshold": 0.965},
    "evaluation": {"speed_tokens": 2, "speed_repeats": 1},
}
SECONDS = 900


def run_job(folder: Path) -> None:
    """`POST /v1/jobs`, until it has succeeded; its checkpoints into `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = os.environ | {"PDTRIM_DATA_DIR": f"{scratch}/data", "OMP_NUM_THREADS": "1"}
        with pdtrim_up(environment, Path(scratch)) as url, Client(url) as client:
            answer = httpx.post(f"{url}/v1/jobs", json=SHARED | JOBS[folder.name])
            assert answer.status_code == 201, answer.text
            job = answer.json()["id"]
            wait_until(lambda: client.get(job).status.final, seconds=SECONDS, what="the job to end")
            assert client.get(job).status == JobStatus.SUCCEEDED, client.get(job)
            for artifact in client.artifacts(job):
                if artifact.stage == "export":
                    client.download(job, artifact, folder / artifact.name)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    run_job(target)
    expect(target)
