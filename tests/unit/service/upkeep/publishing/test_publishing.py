"""Finished jobs handed on: to a real MLflow server, and to a stand-in for the hub's HTTP interface."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import constants
from pydantic import SecretStr
from sqlmodel import select
from transformers import AutoModelForCausalLM

from pdtrim.contract.jobs import StageName
from pdtrim.contract.publications import PublicationStatus
from service.db import publications, stages
from service.db.session import transaction
from service.db.tables import PublicationRow, now
from service.settings import Settings
from service.upkeep.publishing import outbox
from tests.found import RESULTS, evaluation, model_figures
from tests.gateway import Gateway, problem_of, serve
from tests.hub import use_hub
from tests.hub_uploads import UploadHub, serve_upload_hub
from tests.processes import wait_until
from tests.servers import free_ports
from tests.tiny_job import write_tiny_model

FOUND = RESULTS | {
    StageName.EVALUATION: evaluation(
        models={name: model_figures(perplexity={"value": 12.5, "standard_error": 1}) for name in ("dense", "decode")},
        tasks={"my task!": {"decode": {"acc": {"value": 0.75, "stderr": None}}}},
    )
}
SHORT = {"calibration": {"window_tokens": 32}}
TOKEN = "hf_" + "x" * 30


@pytest.fixture(scope="module")
def mlflow_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a database and a folder of its own."""
    folder, (port,) = tmp_path_factory.mktemp("mlflow"), free_ports(1)
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files"),
    ]  # fmt: skip
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: _answers(f"{url}/health"), what="MLflow to start")
        yield url
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=1).is_success
    except httpx.TransportError:
        return False


def play(gateway: Gateway, job_id: str, model: Path) -> None:
    """A job that leaves a real checkpoint for decode."""
    files = {f"decode/{path.name}": path.read_bytes() for path in model.iterdir()}
    card = {"decode/README.md": b"---\ntags: [pdtrim]\n---\n# measured\n", "report.html": b"<html>"}
    left = {
        StageName.SCORING: {"scores.json": b"{}", "windows.safetensors": b"0" * 9},
        StageName.REMOVAL: {"plan.json": b"{}"},
        StageName.EXPORT: {**files, "decode/README.md": b"# unmeasured"},
        StageName.EVALUATION: {**card, "figures/a.png": b"png"},
    }
    for stage in StageName:
        claim = gateway.claim(job_id, stage)
        recorded = []
        for name, content in left.get(stage, {}).items():
            key = f"jobs/{job_id}/{stage.value}/1/{name}"
            recorded.append(
                stages.NewArtifact(name=name, key=key, **vars(gateway.app.state.store.put_bytes(key, content)))
            )
        metrics = FOUND[stage].model_dump(mode="json")
        with transaction(gateway.database) as session:
            stages.complete(session, claim, artifacts=recorded, metrics=metrics, versions={"torch": "2"})


def publish(gateway: Gateway) -> int:
    return outbox.publish(gateway.database, gateway.settings, gateway.app.state.store)


def shown(gateway: Gateway, job_id: str) -> dict[str, Any]:
    (one,) = gateway.client.get(f"/v1/jobs/{job_id}/publications").json()["data"]
    return dict(one)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "models" / "tiny")


def settled(settings: Settings, **changes: Any) -> Settings:
    # Reconciled by hand alone.
    return settings.model_copy(update={"reconcile_in_gateway": False, **changes})


def test_a_job_becomes_one_run_with_its_files_and_a_model_that_loads_however_often_it_is_published(
    mlflow_url: str, gateway_settings: Settings, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient
    from mlflow.artifacts import download_artifacts

    settings = settled(gateway_settings, mlflow_tracking_uri=mlflow_url, mlflow_experiment="pruning")
    with serve(settings, tiny) as gateway:
        job_id = gateway.create(**SHORT, metadata={"team": "serving"})
        assert publish(gateway) == 0
        assert shown(gateway, job_id)["status"] == PublicationStatus.PENDING
        play(gateway, job_id, tiny)
        with monkeypatch.context() as broken:
            broken.setattr(MlflowClient, "create_model_version", lambda *given, **named: 1 / 0)
            assert publish(gateway) == 1
        assert shown(gateway, job_id)["error"].startswith("ZeroDivisionError")
        for _ in range(2):
            assert gateway.client.post(f"/v1/jobs/{job_id}/publications").status_code == 202
            assert publish(gateway) == 1
            assert shown(gateway, job_id)["status"] == PublicationStatus.SUCCEEDED, shown(gateway, job_id)

        (url,) = shown(gateway, job_id)["urls"]

    client = MlflowClient(mlflow_url)
    experiment = client.get_experiment_by_name("pruning")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert url.endswith(run.info.run_id)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["pdtrim.job"], run.data.tags["pdtrim.metadata.team"]) == (job_id, "serving")
    assert run.data.params["search.algorithm"] == "annealing"
    assert run.data.params["decode.remove_blocks"] == "2"
    wanted = {"decode.perplexity.value": 12.5, "pair.distilled_loss": 3.2, "search.losses.controls.decode_only": 0.3}
    assert wanted.items() <= run.data.metrics.items()
    assert run.data.metrics["tasks.my task_.decode.acc.value"] == 0.75
    assert len(client.get_metric_history(run.info.run_id, "decode.perplexity.value")) == 1
    top = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert top == {"decode", "evaluation", "removal", "scoring"}
    assert [entry.path for entry in client.list_artifacts(run.info.run_id, "scoring")] == ["scoring/scores.json"]
    (version,) = client.search_model_versions("name='pdtrim-tiny-decode'")
    assert version.tags == {"pdtrim.job": job_id, "pdtrim.role": "decode"}
    # As a user does it.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_url)
    folder = Path(download_artifacts("models:/pdtrim-tiny-decode/1", dst_path=str(tmp_path / "got")))
    assert (folder / "README.md").read_bytes().endswith(b"# measured\n")
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 5


@pytest.fixture
def upload_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with serve_upload_hub() as hub:
        use_hub(monkeypatch, hub.url)
        yield hub


def test_checkpoints_are_pushed_once_and_a_failure_is_told_without_the_token(
    upload_hub: UploadHub, gateway_settings: Settings, tiny: Path
) -> None:
    settings = settled(gateway_settings, hub_push_organisations=["acme"], hub_push_token=SecretStr(TOKEN))
    with serve(settings, tiny) as gateway:
        job_id = gateway.create(**SHORT, push_to_hub={"repo": "acme/pruned"})
        play(gateway, job_id, tiny)
        upload_hub.refusal = 403
        assert publish(gateway) == 1
        failed = shown(gateway, job_id)
        assert (failed["status"], failed["attempt"]) == ("pending", 1)
        assert "403" in failed["error"]
        assert TOKEN not in json.dumps(failed)
        assert publish(gateway) == 0, "it is tried again only after a while"
        assert gateway.client.get(f"/v1/jobs/{job_id}").json()["status"] == "succeeded"

        upload_hub.refusal = None
        for _ in range(2):
            gateway.client.post(f"/v1/jobs/{job_id}/publications")
            assert publish(gateway) == 1
        told = shown(gateway, job_id)
        assert (told["status"], told["urls"], told["error"]) == ("succeeded", [f"{upload_hub.url}/acme/pruned"], "")

        first, second = upload_hub.repositories["acme/pruned"]
        assert first == {".gitattributes": b""}
        assert second.keys() - first.keys() == {path.name for path in tiny.iterdir()} | {"README.md"}
        assert second["README.md"].endswith(b"# measured\n")
        assert second["model.safetensors"] == (tiny / "model.safetensors").read_bytes()
        assert len(upload_hub.uploads) == 1
        assert upload_hub.private["acme/pruned"]
        assert upload_hub.tokens == {f"Bearer {TOKEN}"}

        # What was there before and would be loaded with it goes.
        upload_hub.repositories["acme/pruned"].append({**second, "model-00002-of-00002.safetensors": b"old"})
        gateway.client.post(f"/v1/jobs/{job_id}/publications")
        assert publish(gateway) == 1
        assert upload_hub.files("acme/pruned") == second


def test_jobs_go_only_where_the_service_may_push(gateway: Gateway) -> None:
    body = {**gateway.spec, "push_to_hub": {"repo": "elsewhere/pruned"}}
    refused = problem_of(gateway.client.post("/v1/jobs", json=body), 422, "push_not_allowed")
    assert refused["param"] == "push_to_hub.repo"
    job_id = gateway.create()
    assert gateway.client.get(f"/v1/jobs/{job_id}/publications").json()["data"] == []
    problem_of(gateway.client.post(f"/v1/jobs/{job_id}/publications"), 409, "nothing_to_publish")


@pytest.mark.slow
def test_a_publisher_whose_lease_ran_out_records_nothing_and_one_that_keeps_dying_is_given_up(
    gateway_settings: Settings, tiny: Path
) -> None:
    with serve(settled(gateway_settings, mlflow_tracking_uri="http://127.0.0.1:1"), tiny) as gateway:
        job_id = gateway.create(**SHORT)
        gateway.run(job_id)
        lease = timedelta(seconds=-1)
        with transaction(gateway.database) as session:
            dead = publications.claim(session, lease=lease, max_tries=2)
            alive = publications.claim(session, lease=lease, max_tries=2)
        assert dead is not None
        assert alive is not None
        with transaction(gateway.database) as session, pytest.raises(publications.PublicationLost):
            publications.succeed(session, dead, ["x"])
        with transaction(gateway.database) as session:
            assert publications.claim(session, lease=lease, max_tries=2) is None
        assert shown(gateway, job_id)["status"] == PublicationStatus.FAILED
        gateway.client.post(f"/v1/jobs/{job_id}/publications")
        gateway.client.delete(f"/v1/jobs/{job_id}")
        with transaction(gateway.database) as session:
            assert publications.claim(session, lease=lease, max_tries=2) is None
            due = session.exec(select(PublicationRow)).one().next_attempt_at
        assert due is not None
        assert due < now()
