"""A pair as a compose file: three containers on one machine."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from pdtrim.contract.results import Half
from pdtrim.serving.checkpoints import HALVES
from pdtrim.serving.deployment import (
    CHECKPOINTS,
    FETCH_IMAGE,
    SIDE_PORT,
    Deployment,
    Manifest,
    engine_command,
    fetch_arguments,
    store_variables,
)
from pdtrim.serving.engines import ROUTER, engine_variables, router_options

ENGINE_PORT = 8000
ENDPOINT_PORT = 8100
# The side channel is bound to an address, and is told to the other engine: a container's own, which it learns at start.
OWN_ADDRESS = 'export VLLM_NIXL_SIDE_CHANNEL_HOST="$$(hostname -i)"; exec "$$@"'
HEALTH = "import urllib.request as r; r.urlopen('http://127.0.0.1:{port}/health', timeout=5)"


def documents(deployment: Deployment) -> list[Manifest]:
    """The compose file."""
    services: Manifest = {half: _engine(deployment, half) for half in HALVES}
    services["router"] = _router(deployment)
    file: Manifest = {"name": deployment.name, "services": services}
    if deployment.store.bucket:
        services |= {
            f"fetch-{folder}": _fetch(deployment, folder) for folder in dict.fromkeys(deployment.folders.values())
        }
        file["volumes"] = {"checkpoints": {}}
    return [file]


def notes(deployment: Deployment) -> list[str]:
    """What stands above it."""
    lines = [
        f"docker compose -f FILE up; then http://127.0.0.1:{ENDPOINT_PORT}/v1 (PDTRIM_PAIR_PORT chooses another port)"
    ]
    if deployment.store.bucket:
        lines.append("The bucket's keys are taken from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.")
    return [*lines, f"Checkpoints: {deployment.store.uri}"]


def _engine(deployment: Deployment, half: Half) -> Manifest:
    serving, folder = deployment.serving, deployment.folders[half]
    service: Manifest = {
        "image": deployment.image,
        "restart": "unless-stopped",
        "entrypoint": ["/bin/sh", "-c", OWN_ADDRESS, "--"],
        "command": engine_command(deployment, half, root=CHECKPOINTS, port=ENGINE_PORT),
        "environment": {**engine_variables(serving), "VLLM_NIXL_SIDE_CHANNEL_PORT": str(SIDE_PORT)},
        "shm_size": "2gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "healthcheck": {
            "test": ["CMD", "python3", "-c", HEALTH.format(port=ENGINE_PORT)],
            "interval": "10s",
            "timeout": "6s",
            "retries": 3,
            "start_period": "1800s",
        },
    }
    if serving.device == "cuda":
        number = "0" if half == "prefill" else "1"
        device = {"driver": "nvidia", "device_ids": [number], "capabilities": ["gpu"]}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    if deployment.store.bucket:
        service["volumes"] = [f"checkpoints:{CHECKPOINTS}:ro"]
        service["depends_on"] = {f"fetch-{folder}": {"condition": "service_completed_successfully"}}
    else:
        source = unquote(urlsplit(deployment.store.uri).path)
        service["volumes"] = [
            {
                "type": "bind",
                "source": f"{source}/{folder}",
                "target": f"{CHECKPOINTS}/{folder}",
                "read_only": True,
                "bind": {"create_host_path": False},
            }
        ]
    return service


def _router(deployment: Deployment) -> Manifest:
    urls = {half: f"http://{half}:{ENGINE_PORT}" for half in HALVES}
    return {
        "image": deployment.image,
        "restart": "unless-stopped",
        "entrypoint": [
            "python3",
            *ROUTER,
            *("--host", "0.0.0.0"),
            *("--port", str(ENGINE_PORT)),
            *router_options(deployment.serving, prefill=urls["prefill"], decode=urls["decode"]),
        ],
        "command": [],
        "ports": [f"127.0.0.1:${{PDTRIM_PAIR_PORT:-{ENDPOINT_PORT}}}:{ENGINE_PORT}"],
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "depends_on": {half: {"condition": "service_healthy"} for half in HALVES},
    }


def _fetch(deployment: Deployment, folder: str) -> Manifest:
    keys = {name: f"${{{name}:-}}" for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    store = deployment.store
    return {
        "image": FETCH_IMAGE,
        "command": fetch_arguments(deployment, folder),
        # It reaches the store as this machine does: the pair is not in the service's network, nor is a loopback address
        # of the store's the container's.
        "network_mode": "host",
        "environment": {**store_variables(deployment, store.public_endpoint_url or store.endpoint_url), **keys},
        "volumes": [f"checkpoints:{CHECKPOINTS}"],
    }
