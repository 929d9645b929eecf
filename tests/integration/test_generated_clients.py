"""Clients that off-the-shelf generators make of /openapi.json import, submit a job and read what its stages found.

Generators and what their clients need are in an environment of their own, which `make test` makes (`.venv-clients`).
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings
from tests.gateway import model
from tests.live_gateway import LiveGateway, live

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

__all__ = ["model"]

CLIENTS = Path(__file__).parents[2] / ".venv-clients" / "bin"

OPENAPI_PYTHON_CLIENT = """
import sys
from generated import AuthenticatedClient
from generated.api.jobs import create_job, get_job
from generated.models import HalfTarget, JobSpecInput, JobSpecInputMetadata

url, source, job_id = sys.argv[1:]
client = AuthenticatedClient(url, token="secret")
if job_id:
    job = get_job.sync(job_id, client=client)
    print([(type(stage).__name__, type(stage.metrics).__name__) for stage in job.stages])
else:
    halves = {"prefill": HalfTarget(remove_blocks=1), "decode": HalfTarget(remove_blocks=2)}
    spec = JobSpecInput(source, **halves, metadata=JobSpecInputMetadata.from_dict({"team": "serving"}))
    print(create_job.sync(client=client, body=spec).id)
"""

OPENAPI_GENERATOR = """
import sys
from generated import ApiClient, Configuration, HalfTarget, JobSpecInput, JobSpecInputModel, JobsApi

url, source, job_id = sys.argv[1:]
api = JobsApi(ApiClient(Configuration(host=url, access_token="secret")))
if job_id:
    stages = [stage.actual_instance for stage in api.get_job(job_id).stages]
    print([(type(stage).__name__, type(stage.metrics).__name__) for stage in stages])
else:
    halves = {"prefill": HalfTarget(remove_blocks=1), "decode": HalfTarget(remove_blocks=2)}
    spec = JobSpecInput(model=JobSpecInputModel(source), **halves, metadata={"team": "serving"})
    print(api.create_job(spec).id)
"""


@pytest.fixture
def gateway(tmp_path: Path, model: Path) -> Iterator[LiveGateway]:
    settings = Settings(data_dir=tmp_path / "data", api_key="secret", allowed_sources=["builtin:", model.as_uri()])
    with live(settings, model) as running:
        yield running


@pytest.mark.parametrize(
    ("generate", "program"),
    [
        (["openapi-python-client", "generate", "--path", "{document}", "--output-path", "made", "--meta", "none"],
         OPENAPI_PYTHON_CLIENT),
        (["openapi-generator-cli", "generate", "-i", "{document}", "-g", "python", "-o", ".",
          "--package-name", "generated"], OPENAPI_GENERATOR),
    ],
    ids=["openapi-python-client", "openapi-generator"],
)  # fmt: skip
def test_a_generated_client_submits_a_job_and_reads_its_results(
    gateway: LiveGateway, tmp_path: Path, generate: list[str], program: str
) -> None:
    if not CLIENTS.is_dir():
        pytest.skip("there is no .venv-clients; `make test` makes it")
    document = tmp_path / "openapi.json"
    document.write_text(json.dumps(gateway.played.app.openapi()))
    work = tmp_path / "client"
    work.mkdir()
    # The generator of OpenAPITools is a Java program; its interpreter comes by pip too.
    environment = {**os.environ, "PATH": f"{CLIENTS}:{os.environ['PATH']}", "JAVA_OPTS": "-Xmx512m"}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout.strip()

    run(*(part.format(document=document) for part in generate))
    if (work / "made").is_dir():
        (work / "made").rename(work / "generated")
    (work / "use.py").write_text(program)
    source = gateway.played.spec["model"]
    job_id = run(str(CLIENTS / "python"), "use.py", gateway.url, source, "")
    asked = httpx.get(f"{gateway.url}/v1/jobs/{job_id}", headers={"Authorization": "Bearer secret"})
    assert asked.json()["metadata"] == {"team": "serving"}
    gateway.played.run(job_id)
    read = run(str(CLIENTS / "python"), "use.py", gateway.url, source, job_id)

    names = ("Scoring", "Removal", "Distillation", "Export", "Evaluation")
    assert read == str([(f"{name}Stage", f"{name}Result") for name in names])
