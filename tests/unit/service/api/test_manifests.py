from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pdtrim.contract.jobs import StageName
from pdtrim.contract.manifests import Runtime
from tests.gateway import Gateway, problem_of
from tests.served import config_json, files, pdtrim_json

EXPORTED = (StageName.SCORING, StageName.REMOVAL, StageName.DISTILLATION)


@pytest.fixture
def exported(gateway: Gateway) -> str:
    """A job whose checkpoints are in the store."""
    return export(gateway, files("prefill") | files("decode"))


def export(gateway: Gateway, left: dict[str, bytes]) -> str:
    job_id = gateway.create()
    for stage in EXPORTED:
        gateway.store(job_id, stage, {})
    gateway.store(job_id, StageName.EXPORT, left)
    return job_id


@pytest.mark.parametrize("runtime", list(Runtime))
def test_every_runtime_has_manifests_with_the_jobs_own_checkpoints(
    gateway: Gateway, exported: str, runtime: Runtime
) -> None:
    response = gateway.client.get(f"/v1/jobs/{exported}/manifests", params={"runtime": runtime.value})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/yaml")
    assert f"/jobs/{exported}/export/1" in response.text or runtime == Runtime.KSERVE
    assert exported in response.text.partition("\n")[0]
    assert all(isinstance(one, dict) for one in yaml.safe_load_all(response.text))


def test_compose_mounts_the_stores_folders_where_the_engines_look(gateway: Gateway, exported: str) -> None:
    text = gateway.client.get(f"/v1/jobs/{exported}/manifests?runtime=compose&device=cpu").text
    services = yaml.safe_load(text)["services"]
    for half in ("prefill", "decode"):
        (volume,) = services[half]["volumes"]
        assert Path(volume["source"], "pdtrim.json").is_file()
        assert volume["target"] in services[half]["command"]


def test_one_checkpoint_serves_both_halves(gateway: Gateway) -> None:
    job = export(gateway, files("unified"))
    services = yaml.safe_load(gateway.client.get(f"/v1/jobs/{job}/manifests?runtime=compose").text)["services"]
    assert all("/checkpoints/unified" in services[half]["command"] for half in ("prefill", "decode"))


def test_sizes_are_as_asked(gateway: Gateway, exported: str) -> None:
    asked = f"/v1/jobs/{exported}/manifests?runtime=vllm&sequences=2&tokens=512&image=registry.example/vllm:1"
    text = gateway.client.get(asked).text
    assert "- --max-num-seqs\n        - '2'\n" in text
    assert text.count("image: registry.example/vllm:1\n") == 3


def test_a_job_without_checkpoints_says_how_far_it_is(gateway: Gateway) -> None:
    waiting = gateway.create()
    answer = gateway.client.get(f"/v1/jobs/{waiting}/manifests?runtime=vllm")
    assert "its stage export, which writes them, is pending" in problem_of(answer, 409, "no_checkpoints")["detail"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "runtime"),
        ("runtime=nomad", "runtime"),
        ("runtime=vllm&sequences=0", "sequences"),
        ("runtime=vllm&tokens=1025", "tokens"),
        ("runtime=vllm&image=a%20b", "image"),
        ("runtime=vllm&cpu=1", "cpu"),
    ],
)
def test_what_cannot_be_served_is_refused(gateway: Gateway, exported: str, query: str, param: str) -> None:
    answer = gateway.client.get(f"/v1/jobs/{exported}/manifests?{query}")
    assert param in (problem_of(answer, 422, "invalid_request")["param"] or "")


def test_a_checkpoint_of_another_form_is_refused(gateway: Gateway) -> None:
    left = files("prefill") | files("decode") | {"decode/config.json": b"{}"}
    answer = gateway.client.get(f"/v1/jobs/{export(gateway, left)}/manifests?runtime=vllm")
    assert "checkpoint decode cannot be served: config.json" in problem_of(answer, 422, "invalid_request")["detail"]
    edited = files("prefill") | {
        "decode/pdtrim.json": pdtrim_json("decode", job="job_2").encode(),
        "decode/config.json": config_json("decode").encode(),
    }
    answer = gateway.client.get(f"/v1/jobs/{export(gateway, edited)}/manifests?runtime=vllm")
    assert "different jobs" in problem_of(answer, 422, "invalid_request")["detail"]
