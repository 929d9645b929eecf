"""A job on PostgreSQL, Valkey and S3, with the gateway and a worker as processes of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import redis
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from pdtrim.client import Client
from pdtrim.contract.jobs import JobStatus, StageName
from tests import servers
from tests.processes import running, wait_until
from tests.tiny_job import tiny_spec, write_tiny_model


@pytest.fixture
def production(
    environment: dict[str, str], postgres_database_url: str, empty_redis_url: str, s3: servers.S3Server, s3_url: str,
    tmp_path: Path,
) -> dict[str, str]:  # fmt: skip
    (port,) = servers.free_ports(1)
    return environment | s3.environment | {
        "PDTRIM_DATABASE_URL": postgres_database_url,
        "PDTRIM_BROKER_URL": empty_redis_url,
        "PDTRIM_ARTIFACTS_URL": s3_url,
        "PDTRIM_S3_ENDPOINT_URL": s3.endpoint_url,
        "PDTRIM_PORT": str(port),
        "PDTRIM_API_KEY": "a-long-secret",
        "PDTRIM_ALLOWED_SOURCES": json.dumps([tmp_path.as_uri()]),
        "PDTRIM_RESEND_SECONDS": "1",
        "PDTRIM_QUEUES": '["gpu-24g", "gpu-80g"]',
    }  # fmt: skip


def test_a_job_whose_message_was_lost_gives_a_pair_whose_files_alone_reproduce_the_reported_loss(
    production: dict[str, str], tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model")
    url = f"http://127.0.0.1:{production['PDTRIM_PORT']}"
    with running(["gateway"], production, tmp_path / "gateway.log"), Client(url, api_key="a-long-secret") as client:
        wait_until(client.ready, what="the gateway to be ready")
        job_id = client.create(tiny_spec(model, queue="gpu-80g")).id
        with redis.Redis.from_url(production["PDTRIM_BROKER_URL"]) as broker:
            assert broker.flushall()
        with running(["worker", "--queue", "gpu-80g"], production, tmp_path / "worker.log"):
            list(client.events(job_id))
        job = client.get(job_id)
        assert job.status == JobStatus.SUCCEEDED, job.error
        artifacts = list(client.artifacts(job_id))
        assert all(artifact.uri.startswith(production["PDTRIM_ARTIFACTS_URL"]) for artifact in artifacts)
        for artifact in artifacts:
            client.download(job_id, artifact, tmp_path / "got" / artifact.stage / artifact.name)

    # From here on only the downloaded files and transformers are used.
    got = tmp_path / "got"
    prefill, decode = (
        AutoModelForCausalLM.from_pretrained(got / "export" / role, dtype=torch.float32).eval()
        for role in ("prefill", "decode")
    )
    layer_map = json.loads((got / "export" / "decode" / "pdtrim.json").read_text())["kv_layer_map"]
    ids = load_file(got / StageName.SCORING / "windows.safetensors")["validation"]
    report = json.loads((got / StageName.EVALUATION / "report.json").read_text())["pair"]
    prompt_tokens = report["prompt_tokens"]
    with torch.no_grad():
        prompt = prefill(input_ids=ids[:, : prompt_tokens - 1], use_cache=True)
        cache = DynamicCache(config=decode.config)
        cache.layers = [prompt.past_key_values.layers[source] for source in layer_map]
        logits = decode(input_ids=ids[:, prompt_tokens - 1 : -1], past_key_values=cache, use_cache=True).logits
    loss = float(F.cross_entropy(logits.flatten(0, 1), ids[:, prompt_tokens:].flatten()))
    assert loss == pytest.approx(report["distilled_loss"], abs=1e-4)
