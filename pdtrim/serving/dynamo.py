"""A pair as a DynamoGraphDeployment, nvidia.com/v1beta1 of Dynamo 1.5."""

from __future__ import annotations

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import HALVES
from pdtrim.serving.deployment import (
    CHECKPOINTS_MOUNT,
    SHARED_MEMORY,
    Deployment,
    Manifest,
    checkpoints_volume,
    engine_container,
    fetch_containers,
    filling,
)
from pdtrim.serving.deployment import IMAGE as ENGINE_IMAGE
from pdtrim.serving.engines import VLLM_VERSION

API_VERSION = "nvidia.com/v1beta1"
DYNAMO_VERSION = "1.5.0"
IMAGE = f"pdtrim-dynamo:{DYNAMO_VERSION}"
"""Dynamo's runtime with pdtrim-vllm, and the vLLM that this is made for."""
FRONTEND_IMAGE = f"nvcr.io/nvidia/ai-dynamo/vllm-runtime:{DYNAMO_VERSION}"
PORT = 9090
"""Where Dynamo's worker tells how it is; requests reach it another way."""
WORKER = ["python3", "-m", "dynamo.vllm"]


def documents(deployment: Deployment) -> list[Manifest]:
    """One object: frontend, prefill and decode."""
    frontend: Manifest = {
        "name": "Frontend",
        "type": "frontend",
        "replicas": 1,
        "podTemplate": {"spec": {"containers": [{"name": "main", "image": FRONTEND_IMAGE}]}},
    }
    return [
        {
            "apiVersion": API_VERSION,
            "kind": "DynamoGraphDeployment",
            "metadata": {"name": deployment.name, "labels": deployment.labels("pair")},
            "spec": {
                "backendFramework": "vllm",
                "components": [frontend, *(_component(deployment, half) for half in HALVES)],
            },
        }
    ]


def notes(deployment: Deployment) -> list[str]:
    """What stands above it."""
    return [
        f"kubectl apply -f FILE, where Dynamo's operator {DYNAMO_VERSION} runs.",
        f"pdtrim-vllm is made for vLLM {VLLM_VERSION}, and refuses others when it starts. The runtime of Dynamo "
        f"{DYNAMO_VERSION} has an earlier one:",
        f"the image {image(deployment)} is to be that runtime with this vLLM and pdtrim-vllm in it.",
        *filling(deployment),
    ]


def image(deployment: Deployment) -> str:
    """The engines' image: the one asked for, or one that has Dynamo in it."""
    return IMAGE if deployment.image == ENGINE_IMAGE else deployment.image


def _component(deployment: Deployment, half: Half) -> Manifest:
    container = engine_container(deployment, half, name="main", port=PORT, mounts=[CHECKPOINTS_MOUNT])
    model, folder, *rest = container["args"]
    # Dynamo's worker has no server of its own; the operator gives it ports and probes, its image a user.
    kept = {name: part for name, part in container.items() if name not in _OPERATORS}
    main = {
        **kept,
        "image": image(deployment),
        "command": WORKER,
        "args": [model, folder, "--disaggregation-mode", half, *_without(rest, "--host", "--port")],
    }
    pod: Manifest = {"containers": [main], "volumes": [SHARED_MEMORY, checkpoints_volume(deployment, half)]}
    fetching = fetch_containers(deployment, half)
    return {
        "name": f"{half.capitalize()}Worker",
        "type": half,
        "replicas": 1,
        "runtimeVersionOverride": DYNAMO_VERSION,
        "podTemplate": {"spec": {**pod, "initContainers": fetching} if fetching else pod},
    }


_OPERATORS = ("ports", "securityContext", "startupProbe", "readinessProbe", "livenessProbe")


def _without(options: list[str], *names: str) -> list[str]:
    """The options without those of these names and their values."""
    kept: list[str] = []
    skip = False
    for option in options:
        if skip or option in names:
            skip = option in names
            continue
        kept.append(option)
    return kept
