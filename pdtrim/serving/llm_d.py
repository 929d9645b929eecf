"""A pair as values of llm-d's chart llm-d-modelservice, version 0.4.12."""

from __future__ import annotations

from pdtrim.contract.results import Half
from pdtrim.serving.deployment import (
    CHECKPOINTS,
    CHECKPOINTS_MOUNT,
    SHARED_MEMORY,
    Deployment,
    Manifest,
    checkpoints_volume,
    engine_container,
    fetch_containers,
    filling,
)

CHART_VERSION = "0.4.12"
PREFILL_PORT = 8000
"""Prefill's engine listens where the chart's `routing.servicePort` is; in front of decode's is a sidecar."""
DECODE_PORT = 8200


def documents(deployment: Deployment) -> list[Manifest]:
    """The chart's values."""
    store = deployment.store
    return [
        {
            "fullnameOverride": deployment.name,
            "modelArtifacts": {
                "name": deployment.serving.name,
                # Both halves lie below it; the containers below have a folder each.
                "uri": store.uri if store.bucket else f"pvc://{deployment.claim}/",
                "mountPath": CHECKPOINTS,
                "labels": {"llm-d.ai/inference-serving": "true", "llm-d.ai/model": deployment.name},
            },
            "accelerator": {"type": "nvidia" if deployment.serving.device == "cuda" else "cpu"},
            "routing": {
                "servicePort": PREFILL_PORT,
                "proxy": {"enabled": True, "connector": "nixlv2", "secure": False, "targetPort": DECODE_PORT},
            },
            "prefill": _half(deployment, "prefill", PREFILL_PORT),
            "decode": _half(deployment, "decode", DECODE_PORT),
        }
    ]


def notes(deployment: Deployment) -> list[str]:
    """What stands above them."""
    return [
        f"Values of the chart llm-d-modelservice {CHART_VERSION}: helm install {deployment.name} "
        f"llm-d-modelservice/llm-d-modelservice --version v{CHART_VERSION} -f FILE",
        *filling(deployment),
    ]


def _half(deployment: Deployment, half: Half, port: int) -> Manifest:
    container = engine_container(deployment, half, name="vllm", port=port, mounts=[CHECKPOINTS_MOUNT])
    values: Manifest = {
        "create": True,
        "replicas": 1,
        "containers": [{**container, "modelCommand": "custom", "mountModelVolume": False}],
        "volumes": [SHARED_MEMORY, checkpoints_volume(deployment, half)],
    }
    fetching = fetch_containers(deployment, half)
    return {**values, "initContainers": fetching} if fetching else values
