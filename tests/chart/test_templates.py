"""What the chart makes is what Kubernetes takes, and what the service needs."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils

from pdtrim.contract.spec import JobSpec
from service.settings import Settings
from tests.chart.custom_resources import SHAPES
from tests.chart.pod_security import violations
from tests.chart.rendering import (
    BUNDLED,
    CHART,
    EVERYTHING,
    EXTERNAL,
    GPU_POOLS,
    KEDA,
    ROOT,
    SCENARIOS,
    Document,
    environment,
    notes,
    of_kind,
    pods,
    render,
)

OLDEST, NEWEST = "1.33", utils.all_versions()[-1]
WARNING = 2
scenarios = pytest.mark.parametrize("values", SCENARIOS.values(), ids=SCENARIOS.keys())


@scenarios
def test_helm_finds_nothing_to_complain_about(values: Document) -> None:
    found = helm_python.lint(str(CHART), values, strict=True, namespace="ml", kube_version="1.33.0")
    assert (found["total_charts_linted"], found["errors"]) == (1, [])
    assert [message for message in found["messages"] if message["severity"] >= WARNING] == []


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@scenarios
def test_every_document_is_one_that_kubernetes_knows(values: Document, version: str) -> None:
    """Kinds that are not Kubernetes' own have no schema there; `custom_resources` has their shapes."""
    for document in render(values):
        if document["kind"] in SHAPES:
            SHAPES[document["kind"]].model_validate(document)
        else:
            kubernetes_validate.validate(document, version, strict=True)


def test_every_kind_is_rendered_by_some_scenario() -> None:
    kinds = {document["kind"] for values in SCENARIOS.values() for document in render(values)}
    assert kinds == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Ingress", "Job", "NetworkPolicy", "Pod",
        "PodDisruptionBudget", "Secret", "Service", "ServiceAccount", "StatefulSet", *SHAPES,
    }  # fmt: skip


def test_a_misspelt_key_would_be_found() -> None:
    (deployment,) = [d for d in render({}) if d["metadata"]["name"] == "pdtrim-gateway" and d["kind"] == "Deployment"]
    deployment = deepcopy(deployment)
    deployment["spec"]["template"]["spec"]["tolerationz"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, NEWEST, strict=True)


@scenarios
def test_no_two_documents_have_one_name(values: Document) -> None:
    names = [(document["kind"], document["metadata"]["name"]) for document in render(values)]
    assert len(set(names)) == len(names)


@scenarios
def test_every_pod_passes_the_restricted_standard_and_more(values: Document) -> None:
    found = pods(render(values))
    assert {"Deployment pdtrim-gateway", "Job pdtrim-migration", "Pod pdtrim-test"} <= found.keys()
    for name, pod in found.items():
        assert violations(pod) == [], name
        assert pod["automountServiceAccountToken"] is False, name
        # Kubernetes would set PDTRIM_PORT for a Service called pdtrim.
        assert pod["enableServiceLinks"] is False, name
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"], name
            assert container["resources"]["limits"]["memory"], name
            assert not container["image"].endswith((":latest", ":")), name


def test_what_the_restricted_standard_forbids_is_found() -> None:
    assert violations({"containers": [{"name": "c"}]}) == [
        "c: runAsNonRoot is not true",
        "c: seccompProfile is not one of ('RuntimeDefault', 'Localhost')",
        "c: allowPrivilegeEscalation is not false",
        "c: capabilities are not dropped",
    ]
    good = pods(render({}))["Deployment pdtrim-gateway"]
    spoilt: tuple[Document, ...] = (
        {"hostNetwork": True},
        {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
        {"securityContext": {**good["securityContext"], "runAsUser": 0}},
        {"securityContext": {**good["securityContext"], "sysctls": [{"name": "kernel.shm"}]}},
        {"initContainers": [{"name": "init"}]},
    )
    for change in spoilt:
        assert violations({**good, **change}), change
    container = good["containers"][0]
    for context in ({"privileged": True}, {"procMount": "Unmasked"}, {"capabilities": {"drop": ["ALL"], "add": ["X"]}}):
        worse = {**container, "securityContext": {**container["securityContext"], **context}}
        assert violations({**good, "containers": [worse]}), context


@scenarios
def test_selectors_find_their_pods_and_only_theirs(values: Document) -> None:
    documents = render(values)
    templates = {
        f"{document['kind']} {document['metadata']['name']}": document["spec"]["template"]["metadata"]["labels"]
        for document in documents
        if document["kind"] in ("Deployment", "StatefulSet")
    }

    def found(labels: dict[str, str]) -> list[str]:
        return [name for name, has in templates.items() if labels.items() <= has.items()]

    for document in documents:
        name, kind, spec = document["metadata"]["name"], document["kind"], document.get("spec", {})
        if kind in ("Deployment", "StatefulSet", "PodDisruptionBudget"):
            (selected,) = found(spec["selector"]["matchLabels"])
            assert selected.split()[1] == name
        elif kind == "Service":
            (selected,) = found(spec["selector"])
            assert selected.split()[1] == name
        elif kind in ("ServiceMonitor", "PodMonitor"):
            assert found(spec["selector"]["matchLabels"])


@scenarios
def test_every_variable_is_one_that_the_service_reads(values: Document) -> None:
    known = {f"PDTRIM_{name.upper()}" for name in Settings.model_fields}
    documents = render(values)
    given = set(of_kind(documents, "ConfigMap")["pdtrim-settings"]["data"])
    for pod in pods(documents).values():
        for container in pod["containers"]:
            given |= environment(container).keys()
    ours = {name for name in given if name.startswith("PDTRIM_")}
    assert ours - known == set()
    assert {"PDTRIM_DATABASE_URL", "PDTRIM_BROKER_URL", "PDTRIM_ARTIFACTS_URL", "PDTRIM_API_KEY"} <= ours


@scenarios
@pytest.mark.parametrize("component", ["gateway", "reconciler", "worker-default"])
def test_the_service_starts_with_what_its_pod_gives_it(
    values: Document, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = render(values)
    (container,) = pods(documents)[f"Deployment pdtrim-{component}"]["containers"]
    secrets = {
        "PDTRIM_DATABASE_URL": "postgresql+psycopg://u:p@h/n",
        "PDTRIM_BROKER_URL": "redis://h:6379/0",
        "PDTRIM_API_KEY": "key",
        "PDTRIM_SESSION_SECRET": "0123456789abcdef",
    }
    given = dict(of_kind(documents, "ConfigMap")["pdtrim-settings"]["data"])
    given |= {name: variable.get("value", secrets.get(name, "x")) for name, variable in environment(container).items()}
    if component == "gateway":
        assert given["PDTRIM_API_KEY"] == "key"
        assert given["PDTRIM_SESSION_SECRET"] == "0123456789abcdef"
    else:
        assert {"PDTRIM_API_KEY", "PDTRIM_SESSION_SECRET"}.isdisjoint(given)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.broker_url == "redis://h:6379/0"
    assert settings.artifacts_url.startswith("s3://")
    assert settings.allowed_sources == ["reference", "builtin:", "hf://"]
    assert settings.reconcile_in_gateway is False


def test_settings_of_every_type_arrive_as_they_are_meant() -> None:
    data = of_kind(render(EXTERNAL), "ConfigMap")["pdtrim-settings"]["data"]
    assert data["PDTRIM_MAX_MODEL_BYTES"] == "1000000000000"
    assert (data["PDTRIM_RETENTION_DAYS"], data["PDTRIM_LOG_LEVEL"]) == ("90", "DEBUG")


def test_pools_of_workers_differ_as_they_say() -> None:
    documents = render(GPU_POOLS)
    found = pods(documents)
    default, big, cpu = (found[f"Deployment pdtrim-worker-{pool}"] for pool in ("default", "big", "cpu"))
    assert default["containers"][0]["args"] == ["worker", "--queue", "default"]
    assert default["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert big["containers"][0]["args"] == ["worker", "--queue", "gpu-80g", "--queue", "gpu-141g"]
    assert big["containers"][0]["resources"]["limits"] == {"memory": "192Gi", "amd.com/gpu": 4}
    assert big["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}
    assert [toleration["key"] for toleration in big["tolerations"]] == ["dedicated"]
    volumes = {volume["name"]: volume for volume in big["volumes"]}
    assert volumes["scratch"]["ephemeral"]["volumeClaimTemplate"]["spec"]["storageClassName"] == "local-nvme"
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "16Gi"}
    assert set(cpu["containers"][0]["resources"]["limits"]) == {"memory"}
    assert cpu["containers"][0]["image"] == "pdtrim-worker:0.1.0-cpu"
    assert "tolerations" not in cpu
    queues = of_kind(documents, "ConfigMap")["pdtrim-settings"]["data"]["PDTRIM_QUEUES"]
    assert json.loads(queues) == ["default", "cpu", "gpu-141g", "gpu-80g"]


@scenarios
def test_a_worker_has_time_to_hand_its_stage_back_before_it_is_killed(values: Document) -> None:
    for name, pod in pods(render(values)).items():
        if name.startswith("Deployment pdtrim-worker-"):
            seconds = int(environment(pod["containers"][0])["PDTRIM_SHUTDOWN_SECONDS"]["value"])
            assert pod["terminationGracePeriodSeconds"] >= seconds + 10


def test_what_scales_itself_has_no_fixed_number() -> None:
    documents = render(KEDA)
    deployments = of_kind(documents, "Deployment")
    for name in ("pdtrim-gateway", "pdtrim-worker-default", "pdtrim-worker-big"):
        assert "replicas" not in deployments[name]["spec"]
    scaled = of_kind(documents, "ScaledObject")
    assert scaled["pdtrim-worker-default"]["spec"]["minReplicaCount"] == 0
    assert scaled["pdtrim-worker-big"]["spec"]["maxReplicaCount"] == 8
    (target,) = of_kind(documents, "TriggerAuthentication")["pdtrim-database"]["spec"]["secretTargetRef"]
    assert (target["name"], target["key"]) == ("keda", "dsn")
    assert deployments["pdtrim-reconciler"]["spec"]["replicas"] == 1


def test_secrets_are_the_users_unless_servers_are_bundled() -> None:
    own = render(EXTERNAL)
    assert of_kind(own, "Secret") == {}
    variables = environment(pods(own)["Deployment pdtrim-gateway"]["containers"][0])
    named = {name: v["valueFrom"]["secretKeyRef"] for name, v in variables.items() if "valueFrom" in v}
    assert named == {
        "PDTRIM_DATABASE_URL": {"name": "rds", "key": "url"},
        "PDTRIM_BROKER_URL": {"name": "elasticache", "key": "url"},
        "PDTRIM_API_KEY": {"name": "pdtrim-key", "key": "key"},
        "PDTRIM_SESSION_SECRET": {"name": "pdtrim-key", "key": "session"},
        "HF_TOKEN": {"name": "hub", "key": "HF_TOKEN"},
    }
    holders = {
        name
        for name, pod in pods(own).items()
        if any("PDTRIM_HUB_PUSH_TOKEN" in environment(one) for one in pod["containers"])
    }
    assert holders == {"Deployment pdtrim-reconciler"}
    bundled = render(BUNDLED)
    made = of_kind(bundled, "Secret")["pdtrim-bundled"]["stringData"]
    for pod in pods(bundled).values():
        for container in pod["containers"]:
            for variable in environment(container).values():
                if "valueFrom" in variable:
                    reference = variable["valueFrom"]["secretKeyRef"]
                    assert reference["name"] == "pdtrim-bundled"
                    assert reference["key"] in made
    assert made["POSTGRES_PASSWORD"] in made["PDTRIM_DATABASE_URL"]
    assert set(of_kind(bundled, "StatefulSet")) == {"pdtrim-postgresql", "pdtrim-store", "pdtrim-valkey"}


def test_the_database_is_migrated_before_what_is_there_is_replaced() -> None:
    hooks = {"default": "pre-install,pre-upgrade", "bundled": "post-install,pre-upgrade"}
    for scenario, hook in hooks.items():
        job = of_kind(render(SCENARIOS[scenario]), "Job")["pdtrim-migration"]
        assert job["metadata"]["annotations"]["helm.sh/hook"] == hook
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["args"] == ["migrate"]
        # On a first install nothing else of the release is there yet.
        assert "envFrom" not in container
        assert "serviceAccountName" not in job["spec"]["template"]["spec"]


def test_only_the_ports_that_are_meant_to_be_are_reachable() -> None:
    policies = of_kind(render(EVERYTHING), "NetworkPolicy")
    ports = {
        name: [port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]]
        for name, policy in policies.items()
        if "ingress" in policy["spec"]
    }
    assert ports == {
        "pdtrim-gateway": ["http"],
        "pdtrim-worker": ["metrics"],
        **{f"pdtrim-{server}": ["server"] for server in ("postgresql", "valkey", "store")},
    }
    assert policies["pdtrim-others"]["spec"]["policyTypes"] == ["Ingress"]
    (_, _, allowed) = policies["pdtrim-egress"]["spec"]["egress"]
    assert allowed == {"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}


def test_the_job_of_helm_test_is_one_that_the_service_takes() -> None:
    documents = render({})
    (container,) = pods(documents)["Pod pdtrim-test"]["containers"]
    assert container["args"] == ["submit", "/job/job.yaml", "--watch", "--url", "http://pdtrim-gateway:80"]
    spec = JobSpec.model_validate(yaml.safe_load(of_kind(documents, "ConfigMap")["pdtrim-test"]["data"]["job.yaml"]))
    assert spec.model.source == "reference"


def test_versions_agree() -> None:
    about: dict[str, Any] = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert f'version = "{about["appVersion"]}"' in (ROOT / "pyproject.toml").read_text()


def test_the_longest_names_are_short_enough_for_labels() -> None:
    longest = {**EVERYTHING, "pools": {"p" * 16: {"autoscaling": {"enabled": True}}}}
    names = [document["metadata"]["name"] for document in render(longest, "r" * 53)]
    assert max(map(len, names)) <= 63
    assert all(name.startswith("prod-pdtrim") for name in (d["metadata"]["name"] for d in render({}, "prod")))


def test_the_notes_say_where_the_service_is_and_warn_of_jobs_that_nobody_takes() -> None:
    assert "port-forward service/pdtrim-gateway 8000:80" in notes({})
    assert "https://pdtrim.example.com" in notes(EVERYTHING)
    assert "will wait" not in notes(GPU_POOLS)
    assert "will wait" in notes({"pools": {"default": None, "cpu": {"queues": ["cpu"]}}})
    assert "will wait" not in notes({"pools": {"default": None, "cpu": {"queues": ["cpu"]}}, "defaultQueue": "cpu"})


@pytest.mark.parametrize("way", ["ingress", "httpRoute"])
def test_proxies_are_believed_where_there_are_some(way: str) -> None:
    def believed(values: Document) -> Any:
        (container,) = pods(render(values))["Deployment pdtrim-gateway"]["containers"]
        return environment(container).get("FORWARDED_ALLOW_IPS", {}).get("value")

    behind = {way: {"enabled": True, "parentRefs": [{"name": "public"}]} if way == "httpRoute" else {"enabled": True}}
    assert believed({}) is None
    assert "10.0.0.0/8" in believed(behind).split(",")
    assert believed({**behind, "gateway": {"trustedProxies": ["10.1.2.3"]}}) == "10.1.2.3"
    assert believed({**behind, "gateway": {"trustedProxies": []}}) is None
