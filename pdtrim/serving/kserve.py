"""A pair as an LLMInferenceService, serving.kserve.io/v1alpha2 of KServe 0.20: one URI, and a folder of it a half."""

from __future__ import annotations

from pdtrim.contract.results import Half
from pdtrim.serving.deployment import SHARED_MEMORY, Deployment, Manifest, engine_container

API_VERSION = "serving.kserve.io/v1alpha2"
KSERVE_VERSION = "0.20"
MOUNTED = "/mnt/models"
"""Where KServe puts what the URI names."""
PORTS: dict[Half, int] = {"prefill": 8000, "decode": 8001}
"""Decode's engine is behind a sidecar that has 8000."""


def documents(deployment: Deployment) -> list[Manifest]:
    """One object."""
    store = deployment.store
    return [
        {
            "apiVersion": API_VERSION,
            "kind": "LLMInferenceService",
            "metadata": {"name": deployment.name, "labels": deployment.labels("pair")},
            "spec": {
                "model": {
                    "uri": store.uri if store.bucket else f"pvc://{deployment.claim}",
                    "name": deployment.serving.name,
                },
                "router": {"route": {}, "scheduler": {}},
                "replicas": 1,
                "template": _pod(deployment, "decode"),
                "prefill": {"replicas": 1, "template": _pod(deployment, "prefill")},
            },
        }
    ]


def notes(deployment: Deployment) -> list[str]:
    """What stands above it."""
    lines = [
        f"kubectl apply -f FILE, where KServe {KSERVE_VERSION} serves LLMInferenceServices.",
        "The engines speak plain HTTP: for clusters whose ingress settings have enableLLMInferenceServiceTLS false.",
    ]
    if deployment.store.bucket:
        return [*lines, "KServe's storage initializer reads the bucket, by the credentials of the service account."]
    return [
        *lines,
        f"Fill a PersistentVolumeClaim {deployment.claim}: pdtrim download {deployment.job} --to VOLUME",
    ]


def _pod(deployment: Deployment, half: Half) -> Manifest:
    """What is laid over KServe's own template: the container `main`, and memory that processes share."""
    main = engine_container(deployment, half, name="main", port=PORTS[half], root=MOUNTED, mounts=[])
    return {"containers": [main], "volumes": [SHARED_MEMORY]}
