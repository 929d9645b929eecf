"""The chart as Helm renders it, without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "pdtrim"
Document = dict[str, Any]
GPU_POOLS: Document = {
    "pools": {
        "default": {"gpu": {"count": 1}},
        "big": {
            "replicas": 2,
            "queues": ["gpu-80g", "gpu-141g"],
            "gpu": {"count": 4, "resource": "amd.com/gpu"},
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
            "tolerations": [{"key": "dedicated", "operator": "Equal", "value": "pruning", "effect": "NoSchedule"}],
            "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
            "resources": {"requests": {"cpu": "8", "memory": "128Gi"}, "limits": {"memory": "192Gi"}},
            "scratch": {"size": "1Ti", "storageClassName": "local-nvme"},
            "sharedMemory": "16Gi",
            "shutdownSeconds": 300,
            "runtimeClassName": "nvidia",
            "priorityClassName": "batch",
        },
        "cpu": {"queues": ["cpu"], "gpu": {"count": 0}, "image": {"tag": "0.1.0-cpu"}, "tolerations": []},
    }
}
EXTERNAL: Document = {
    "database": {"existingSecret": "rds", "key": "url"},
    "broker": {"existingSecret": "elasticache", "key": "url"},
    "store": {
        "url": "s3://models/pruned",
        "endpointUrl": "https://s3.internal:9000",
        "publicEndpointUrl": "https://s3.example.com",
        "region": "eu-central-1",
        "existingSecret": "",
    },
    "apiKey": {"existingSecret": "pdtrim-key", "key": "key"},
    "session": {"existingSecret": "pdtrim-key", "key": "session"},
    "hub": {"existingSecret": "hub", "pushSecret": "hub-push"},
    "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/pdtrim"}},
    "settings": {
        "PDTRIM_RETENTION_DAYS": 90,
        "PDTRIM_MAX_MODEL_BYTES": 10**12,
        "PDTRIM_LOG_LEVEL": "DEBUG",
        "PDTRIM_OIDC_ISSUER": "https://login.example.com",
        "PDTRIM_OIDC_AUDIENCE": "pdtrim",
        "PDTRIM_OIDC_SCOPES": {"engineer": "admin"},
    },
    "environment": [{"name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector:4318"}],
    "volumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models", "readOnly": True}}],
    "volumeMounts": [{"name": "models", "mountPath": "/models", "readOnly": True}],
    "imagePullSecrets": [{"name": "registry"}],
    "security": {"runAsUser": None, "fsGroup": None},
    "gateway": {"image": {"repository": "registry/pdtrim-gateway", "digest": f"sha256:{'0' * 64}"}},
}
KEDA: Document = {
    "pools": {
        "default": {"autoscaling": {"enabled": True}},
        "big": {"queues": ["gpu-80g"], "autoscaling": {"enabled": True, "minReplicas": 1, "maxReplicas": 8}},
    },
    "gateway": {"autoscaling": {"enabled": True}},
    "keda": {"existingSecret": "keda", "key": "dsn"},
}
BUNDLED: Document = {"bundled": {name: {"enabled": True} for name in ("postgresql", "valkey", "store", "apiKey")}}
EVERYTHING: Document = {
    **BUNDLED,
    "commonLabels": {"team": "inference"},
    "pools": {**GPU_POOLS["pools"], "default": {"autoscaling": {"enabled": True}}},
    "gateway": {"autoscaling": {"enabled": True}, "service": {"annotations": {"a": "b"}}, "podAnnotations": {"a": "b"}},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"nginx.ingress.kubernetes.io/proxy-read-timeout": "3600"},
        "tls": [{"secretName": "tls", "hosts": ["pdtrim.example.com"]}],
    },
    "httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["pdtrim.example.com"],
    },
    "networkPolicy": {
        "gatewayFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "ingress"}}}],
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}],
    },
    "monitoring": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "podMonitor": {"enabled": True},
        "alerts": {"enabled": True},
        "dashboard": {"enabled": True, "annotations": {"folder": "ML"}},
    },
}
SCENARIOS: dict[str, Document] = {
    "default": {},
    "gpu pools": GPU_POOLS,
    "external services": EXTERNAL,
    "keda": KEDA,
    "bundled": BUNDLED,
    "everything": EVERYTHING,
}


@cache
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def render(values: Document, release: str = "pdtrim") -> list[Document]:
    """Every document of a release in the namespace `ml`. Raises: HelmError."""
    return list(_documents(json.dumps(values), release))


@cache
def _documents(values: str, release: str) -> tuple[Document, ...]:
    return tuple(_parse(chart().render(json.loads(values), name=release, namespace="ml")))


def _parse(files: dict[str, str]) -> Iterator[Document]:
    for name, text in files.items():
        if not name.endswith("NOTES.txt"):
            yield from (document for document in yaml.safe_load_all(text) if document)


def notes(values: Document) -> str:
    """What is printed after an installation."""
    files = chart().render(values, name="pdtrim", namespace="ml")
    return files["pdtrim/templates/NOTES.txt"]


def of_kind(documents: list[Document], kind: str) -> dict[str, Document]:
    """The documents of a kind, by name."""
    return {document["metadata"]["name"]: document for document in documents if document["kind"] == kind}


def pods(documents: list[Document]) -> dict[str, Document]:
    """Every pod's specification, by the kind and name of what makes it."""
    found = {}
    for document in documents:
        name = f"{document['kind']} {document['metadata']['name']}"
        if document["kind"] == "Pod":
            found[name] = document["spec"]
        elif "template" in document.get("spec", {}):
            found[name] = document["spec"]["template"]["spec"]
    return found


def environment(container: Document) -> dict[str, Document]:
    """A container's own variables, by name."""
    return {variable["name"]: variable for variable in container.get("env", [])}
