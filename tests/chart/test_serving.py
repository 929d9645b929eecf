"""Manifests that serve a pair, held against what those publish who apply them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from pdtrim.contract.manifests import Runtime
from pdtrim.serving.deployment import Deployment, Manifest
from pdtrim.serving.manifests import manifests
from tests.chart.rendering import ROOT
from tests.chart.test_images import run
from tests.served import JOB, deployment

NEWEST = utils.latest_version()
DEFINITIONS: Manifest = yaml.safe_load(Path(__file__).with_name("serving_definitions.yaml").read_text())
DEPLOYMENTS = {
    "bucket": deployment(),
    "folder": deployment("file:///var/lib/pdtrim/artifacts/jobs/1/export/1"),
    "cpu": deployment(device="cpu"),
    "windowed": deployment(sliding_window=512),
}
KINDS: dict[str, type] = {"string": str, "integer": int, "boolean": bool}
every = pytest.mark.parametrize("given", DEPLOYMENTS.values(), ids=DEPLOYMENTS.keys())


def written(runtime: Runtime, given: Deployment) -> list[Manifest]:
    return list(yaml.safe_load_all(manifests(runtime, given)))


@every
def test_the_compose_file_fits_its_schema(given: Deployment, tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(manifests(Runtime.COMPOSE, given))
    run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file)


def test_compose_copies_from_where_this_machine_reaches_the_store() -> None:
    given = deployment()
    store = replace(given.store, endpoint_url="http://store:8333", public_endpoint_url="http://127.0.0.1:8333")
    (file,) = written(Runtime.COMPOSE, replace(given, store=store))
    fetching = {name: one for name, one in file["services"].items() if name.startswith("fetch-")}
    assert list(fetching) == ["fetch-prefill", "fetch-decode"]
    for one in fetching.values():
        assert one["environment"]["AWS_ENDPOINT_URL"] == "http://127.0.0.1:8333"
        assert one["network_mode"] == "host"
    pods = manifests(Runtime.VLLM, replace(given, store=store))
    assert "http://store:8333" in pods
    assert "http://127.0.0.1:8333" not in pods


@every
def test_plain_kubernetes_takes_every_object(given: Deployment) -> None:
    objects = written(Runtime.VLLM, given)
    assert [one["kind"] for one in objects] == ["Deployment", "Service"] * 3
    for one in objects:
        kubernetes_validate.validate(one, NEWEST, strict=True)


@every
def test_services_lead_to_the_pods_that_the_router_asks(given: Deployment) -> None:
    objects = written(Runtime.VLLM, given)
    pods = {one["metadata"]["name"]: one["spec"]["template"] for one in objects if one["kind"] == "Deployment"}
    for service in (one for one in objects if one["kind"] == "Service"):
        pod = pods[service["metadata"]["name"]]
        assert service["spec"]["selector"] == pod["metadata"]["labels"]
        (port,) = service["spec"]["ports"]
        assert port["targetPort"] in {one["name"] for one in pod["spec"]["containers"][0]["ports"]}
    asked = re.findall(r"http://(\S+):8000", " ".join(pods[f"{given.name}-router"]["spec"]["containers"][0]["args"]))
    assert asked == [f"{given.name}-prefill", f"{given.name}-decode"]


@every
@pytest.mark.parametrize("runtime", [Runtime.DYNAMO, Runtime.KSERVE])
def test_custom_resources_use_published_fields_alone(runtime: Runtime, given: Deployment) -> None:
    (one,) = written(runtime, given)
    definition = DEFINITIONS[one["kind"]]
    assert one["apiVersion"] == definition["apiVersion"]
    assert one.keys() == {"apiVersion", "kind", "metadata", "spec"}
    check(one["spec"], definition["spec"])


@every
def test_values_of_the_chart_are_ones_that_it_has(given: Deployment) -> None:
    (values,) = written(Runtime.LLM_D, given)
    check(values, DEFINITIONS["llm-d-modelservice"]["values"])


def test_a_field_that_nobody_published_would_be_found() -> None:
    (one,) = written(Runtime.KSERVE, deployment())
    one["spec"]["prefill"]["replica"] = 1
    with pytest.raises(AssertionError, match=r"prefill\.replica"):
        check(one["spec"], DEFINITIONS["LLMInferenceService"]["spec"])
    one["spec"]["prefill"].pop("replica")
    one["spec"]["template"]["containers"][0]["comand"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check(one["spec"], DEFINITIONS["LLMInferenceService"]["spec"])


def check(found: Any, definition: Any, path: str = "") -> None:
    """Raises: AssertionError or ValidationError for a field that the definition does not have, or has otherwise."""
    if definition == "any":
        return
    if isinstance(definition, str) and definition in KINDS:
        assert type(found) is KINDS[definition], path
    elif definition == "PodTemplateSpec":
        check_pod(found["spec"])
        assert found.keys() <= {"metadata", "spec"}, path
    elif definition == "PodSpec":
        check_pod(found)
    elif definition == "Container":
        theirs = DEFINITIONS["llm-d-modelservice"]["container"]
        check_pod({"containers": [{name: part for name, part in found.items() if name not in theirs}]})
    elif isinstance(definition, list):
        for number, one in enumerate(found):
            check(one, definition[0], f"{path}[{number}]")
    else:
        for name, part in found.items():
            inner = f"{path}.{name}".lstrip(".")
            assert name in definition, inner
            check(part, definition[name], inner)


def check_pod(spec: Manifest) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, NEWEST, strict=True)


@every
@pytest.mark.parametrize("runtime", [Runtime.VLLM, Runtime.LLM_D, Runtime.DYNAMO, Runtime.KSERVE])
def test_every_volume_that_is_mounted_is_there(runtime: Runtime, given: Deployment) -> None:
    for pod in pods(written(runtime, given)):
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        containers = [*pod["containers"], *pod.get("initContainers", [])]
        mounted = {mount["name"] for one in containers for mount in one.get("volumeMounts", [])}
        assert mounted == volumes


def pods(found: Any) -> Iterator[Manifest]:
    """Whatever has containers, wherever it is."""
    if isinstance(found, dict):
        if "containers" in found:
            yield found
        found = list(found.values())
    if isinstance(found, list):
        for one in found:
            yield from pods(one)


@every
@pytest.mark.parametrize("runtime", list(Runtime))
def test_both_engines_are_told_their_half_their_role_and_their_sizes(runtime: Runtime, given: Deployment) -> None:
    text = json.dumps(written(runtime, given))
    for half, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")):
        command = next(
            command for command in commands(written(runtime, given)) if any(one.endswith(f"/{half}") for one in command)
        )
        transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
        assert (transfer["kv_role"], transfer["kv_connector_module_path"]) == (role, "pdtrim_vllm.connector")
        sizes = given.serving.sizes
        for option, number in (("--max-num-seqs", sizes.sequences), ("--max-model-len", sizes.tokens)):
            assert command[command.index(option) + 1] == str(number)
        assert ("--logits-processors" in command) is (half == "decode")
        windowed = "--disable-hybrid-kv-cache-manager" in command
        assert windowed is given.serving.pair.windowed
    assert given.name in text


def commands(found: Any) -> Iterator[list[str]]:
    """Every list of words that starts an engine."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        if "--kv-transfer-config" in found:
            yield found
        for one in found:
            yield from commands(one)


@pytest.mark.parametrize("runtime", list(Runtime))
def test_comments_name_the_job_and_how_its_checkpoints_are_had(runtime: Runtime) -> None:
    for name, given in DEPLOYMENTS.items():
        text = manifests(runtime, given)
        comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        assert JOB in comments
        if name == "folder" and runtime != Runtime.COMPOSE:
            assert f"pdtrim download {JOB}" in comments
            assert given.claim in text.replace(comments, "")


def test_the_engines_image_is_what_the_build_file_makes() -> None:
    text = (ROOT / "serving" / "Dockerfile").read_text()
    assert f"docker build -t {deployment().image} " in text
    run("hadolint", "--failure-threshold=style", ROOT / "serving" / "Dockerfile")
