"""A pair on plain Kubernetes: a Deployment and a Service for each half, and for the router in front of them."""

from __future__ import annotations

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import HALVES
from pdtrim.serving.deployment import (
    CHECKPOINTS_MOUNT,
    SHARED_MEMORY,
    UNPRIVILEGED,
    Deployment,
    Manifest,
    checkpoints_volume,
    engine_container,
    fetch_containers,
    filling,
)
from pdtrim.serving.engines import ROUTER, router_options

PORT = 8000
METRICS_PORT = 29000


def documents(deployment: Deployment) -> list[Manifest]:
    """Six objects."""
    return [
        one
        for component, pod in (
            ("prefill", engine_pod(deployment, "prefill")),
            ("decode", engine_pod(deployment, "decode")),
            ("router", _router_pod(deployment)),
        )
        for one in (_deployment(deployment, component, pod), _service(deployment, component))
    ]


def notes(deployment: Deployment) -> list[str]:
    """What stands above them."""
    return [
        f"kubectl apply -f FILE; the endpoint is http://{deployment.name}-router:{PORT}/v1",
        *filling(deployment),
    ]


def engine_pod(deployment: Deployment, half: Half) -> Manifest:
    """The pod of one half."""
    container = engine_container(deployment, half, name="vllm", port=PORT, mounts=[CHECKPOINTS_MOUNT])
    pod: Manifest = {
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": [SHARED_MEMORY, checkpoints_volume(deployment, half)],
    }
    fetching = fetch_containers(deployment, half)
    return {**pod, "initContainers": fetching} if fetching else pod


def _router_pod(deployment: Deployment) -> Manifest:
    urls = {half: f"http://{deployment.name}-{half}:{PORT}" for half in HALVES}
    health = {"httpGet": {"path": "/health", "port": PORT}}
    return {
        "enableServiceLinks": False,
        "automountServiceAccountToken": False,
        "containers": [
            {
                "name": "router",
                "image": deployment.image,
                "command": ["python3", *ROUTER],
                "args": [
                    *("--host", "0.0.0.0"),
                    *("--port", str(PORT)),
                    *("--prometheus-host", "0.0.0.0"),
                    *("--prometheus-port", str(METRICS_PORT)),
                    # It waits for the engines, which load their weights meanwhile.
                    *("--worker-startup-timeout-secs", "1800"),
                    *("--worker-startup-check-interval", "5"),
                    *router_options(deployment.serving, prefill=urls["prefill"], decode=urls["decode"]),
                ],
                "ports": [
                    {"name": "http", "containerPort": PORT, "protocol": "TCP"},
                    {"name": "metrics", "containerPort": METRICS_PORT, "protocol": "TCP"},
                ],
                "startupProbe": {**health, "periodSeconds": 5, "failureThreshold": 400},
                "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
                "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
                "securityContext": UNPRIVILEGED,
            }
        ],
    }


def _deployment(deployment: Deployment, component: str, pod: Manifest) -> Manifest:
    labels = deployment.labels(component)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{deployment.name}-{component}", "labels": labels},
        "spec": {
            "replicas": 1,
            # Two at a time would ask for twice the devices.
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def _service(deployment: Deployment, component: str) -> Manifest:
    labels = deployment.labels(component)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": f"{deployment.name}-{component}", "labels": labels},
        "spec": {
            "selector": labels,
            "ports": [{"name": "http", "port": PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }
