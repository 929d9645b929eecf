"""What manifests of every runtime have in common: where a job's checkpoints are, names, the engines' containers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pdtrim.contract.results import Half
from pdtrim.serving.engines import SERVER, VLLM_VERSION, Serving, engine_options, engine_variables

Manifest = dict[str, Any]
IMAGE = f"pdtrim-vllm:{VLLM_VERSION}"
"""What `serving/Dockerfile` makes."""
FETCH_IMAGE = "docker.io/amazon/aws-cli:2.32.8"
STORE_SECRET = "pdtrim-store"
"""Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, where the pods have no identity that may read the bucket."""
CHECKPOINTS = "/checkpoints"
SIDE_PORT = 5600
GIB = 1 << 30
START_MINUTES = 30
USER = 10001
UNPRIVILEGED: Manifest = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "runAsNonRoot": True,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class Store:
    """The folder of the store that has the checkpoints' folders, as `s3://…` or `file:///…`."""

    uri: str
    endpoint_url: str | None = None
    region: str | None = None
    public_endpoint_url: str | None = None
    """Where those reach it who are not in the service's own network, if not at `endpoint_url`."""

    @property
    def bucket(self) -> bool:
        return self.uri.startswith("s3://")


@dataclass(frozen=True)
class Deployment:
    """A job's pair on a cluster, or in containers."""

    job: str
    serving: Serving
    folders: Mapping[Half, str]
    """The checkpoints' folders in the store: `prefill` and `decode`, or twice `unified`."""
    store: Store
    image: str = IMAGE

    @property
    def name(self) -> str:
        """Of objects: the job's, as short as it stays unlikely that another job has the same."""
        return f"pdtrim-{self.job[-12:]}"

    @property
    def claim(self) -> str:
        """The volume that has the checkpoints, where the store is a folder that no cluster reaches."""
        return f"{self.name}-checkpoints"

    def labels(self, component: str) -> dict[str, str]:
        return {
            "app.kubernetes.io/name": "pdtrim-vllm",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": component,
        }


def engine_command(deployment: Deployment, half: Half, *, root: str, port: int) -> list[str]:
    """Command line of a half's engine, whose checkpoint is below `root`."""
    return [
        "python3",
        *SERVER,
        *("--model", f"{root}/{deployment.folders[half]}"),
        *("--host", "0.0.0.0"),
        *("--port", str(port)),
        *engine_options(deployment.serving, half),
    ]


def engine_environment(deployment: Deployment) -> list[Manifest]:
    """Variables of an engine in a pod. Decode asks prefill's pod for what it is sent, so each says its own address."""
    return [
        *({"name": name, "value": value} for name, value in engine_variables(deployment.serving).items()),
        {"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": str(SIDE_PORT)},
    ]


def engine_resources(deployment: Deployment, half: Half) -> Manifest:
    """Requests and limits that follow from the weights and the KV cache."""
    serving = deployment.serving
    if serving.device == "cpu":
        memory = f"{math.ceil(serving.device_bytes(half) * 1.25 / GIB) + 3}Gi"
        return {"requests": {"cpu": "2", "memory": memory}, "limits": {"memory": memory}}
    # Weights pass through memory on their way to the device.
    memory = f"{math.ceil(serving.pair.of(half).bytes * 1.25 / GIB) + 8}Gi"
    return {
        "requests": {"cpu": "4", "memory": memory, "nvidia.com/gpu": "1"},
        "limits": {"memory": memory, "nvidia.com/gpu": "1"},
    }


def engine_container(
    deployment: Deployment, half: Half, *, name: str, port: int, root: str = CHECKPOINTS, mounts: list[Manifest]
) -> Manifest:
    """A container of a pod that serves one half."""
    command = engine_command(deployment, half, root=root, port=port)
    health = {"httpGet": {"path": "/health", "port": port}}
    return {
        "name": name,
        "image": deployment.image,
        "command": command[:3],
        "args": command[3:],
        "env": engine_environment(deployment),
        "ports": [
            {"name": "http", "containerPort": port, "protocol": "TCP"},
            {"name": "side-channel", "containerPort": SIDE_PORT, "protocol": "TCP"},
        ],
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": START_MINUTES * 6},
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 20, "timeoutSeconds": 10, "failureThreshold": 6},
        "resources": engine_resources(deployment, half),
        "securityContext": UNPRIVILEGED,
        "volumeMounts": [{"name": "shared-memory", "mountPath": "/dev/shm"}, *mounts],
    }


CHECKPOINTS_MOUNT: Manifest = {"name": "checkpoints", "mountPath": CHECKPOINTS, "readOnly": True}
SHARED_MEMORY: Manifest = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}}


def fetch_containers(deployment: Deployment, half: Half) -> list[Manifest]:
    """The init container that copies a half's checkpoint out of a bucket; none where a volume has it."""
    if not deployment.store.bucket:
        return []
    folder = deployment.folders[half]
    return [
        {
            "name": "checkpoint",
            "image": FETCH_IMAGE,
            "args": fetch_arguments(deployment, folder),
            "env": [
                {"name": name, "value": value}
                for name, value in {
                    "HOME": "/tmp",
                    **store_variables(deployment, deployment.store.endpoint_url),
                }.items()
            ],
            "envFrom": [{"secretRef": {"name": STORE_SECRET, "optional": True}}],
            "resources": {"requests": {"cpu": "1", "memory": "512Mi"}, "limits": {"memory": "1Gi"}},
            "securityContext": {**UNPRIVILEGED, "runAsUser": USER},
            "volumeMounts": [{"name": "checkpoints", "mountPath": CHECKPOINTS}],
        }
    ]


def fetch_arguments(deployment: Deployment, folder: str) -> list[str]:
    """What the AWS command copies: one checkpoint."""
    return ["s3", "cp", "--recursive", "--no-progress", f"{deployment.store.uri}/{folder}", f"{CHECKPOINTS}/{folder}"]


def store_variables(deployment: Deployment, endpoint_url: str | None) -> dict[str, str]:
    """Where the bucket is, for the AWS command."""
    named = {"AWS_ENDPOINT_URL": endpoint_url, "AWS_REGION": deployment.store.region}
    return {name: value for name, value in named.items() if value is not None}


def checkpoints_volume(deployment: Deployment, half: Half) -> Manifest:
    """Where a pod has its checkpoint."""
    if deployment.store.bucket:
        room = math.ceil(deployment.serving.pair.of(half).bytes * 1.1 / GIB) + 1
        return {"name": "checkpoints", "emptyDir": {"sizeLimit": f"{room}Gi"}}
    return {"name": "checkpoints", "persistentVolumeClaim": {"claimName": deployment.claim, "readOnly": True}}


def filling(deployment: Deployment) -> list[str]:
    """Lines that say how the checkpoints get to where the pods look for them."""
    if deployment.store.bucket:
        return [
            f"Checkpoints: {deployment.store.uri}",
            f"Where pods have no identity that may read it, a Secret {STORE_SECRET} has AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY.",
        ]
    return [
        f"Checkpoints: {deployment.store.uri}, which a cluster cannot reach.",
        f"Fill a PersistentVolumeClaim {deployment.claim} with them: pdtrim download {deployment.job} --to VOLUME",
    ]
