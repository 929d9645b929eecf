"""A worker's Prometheus metrics: what the gateway cannot know, counted where it happens.

They belong to the process that runs the stages. A process that takes its place begins at zero, as counters may.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from enum import StrEnum

import torch
from prometheus_client import Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from pdtrim.contract.jobs import StageName
from service.observing.metrics import new_registry

BUCKETS = (1, 5, 15, 60, 300, 900, 3600, 4 * 3600, 24 * 3600)
log = logging.getLogger(__name__)


class Outcome(StrEnum):
    """How an attempt at a stage ended. `released`: by a fault that may pass; `handed_back`: by the end of the worker;
    `unrecorded`: the database was gone.
    """

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    RELEASED = "released"
    HANDED_BACK = "handed_back"
    LEASE_LOST = "lease_lost"
    UNRECORDED = "unrecorded"


class WorkerMetrics:
    """What one worker process counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.registry.register(DeviceMemory())
        self._stage_seconds = Histogram(
            "pdtrim_worker_stage_duration_seconds",
            "Time from the claim of a stage to the end of the attempt.",
            ["stage", "outcome"],
            buckets=BUCKETS,
            registry=self.registry,
        )
        self._leases_lost = Counter(
            "pdtrim_worker_leases_lost", "Attempts that ended because the lease was lost.", registry=self.registry
        )
        self.artifact_bytes = Counter(
            "pdtrim_worker_artifact_bytes", "Bytes of recorded artifacts.", ["stage"], registry=self.registry
        )

    def stage_ended(self, stage: StageName, outcome: Outcome, seconds: float) -> None:
        """Count the end of an attempt."""
        self._stage_seconds.labels(stage.value, outcome.value).observe(seconds)
        if outcome == Outcome.LEASE_LOST:
            self._leases_lost.inc()

    def serve(self, port: int) -> None:
        """Answer scrapes on every address of this machine, from a thread of its own; a port in use is only logged."""
        try:
            start_http_server(port, registry=self.registry)
        except OSError as error:
            log.error("no metrics: port %d cannot be had: %s", port, error)


class DeviceMemory(Collector):
    """Memory of the GPUs that this process has used, as PyTorch's allocator and the driver see it."""

    def collect(self) -> Iterable[Metric]:
        memory = GaugeMetricFamily(
            "pdtrim_worker_device_memory_bytes",
            "By `kind`: allocated by tensors, reserved by PyTorch, free and total on the device.",
            labels=["device", "kind"],
        )
        # Asking about a device that was never used would take memory on it.
        used = [n for n in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(n)] if _started() else []
        for device in used:
            free, total = torch.cuda.mem_get_info(device)
            figures = {
                "allocated": torch.cuda.memory_allocated(device),
                "reserved": torch.cuda.memory_reserved(device),
                "free": free,
                "total": total,
            }
            for kind, size in figures.items():
                memory.add_metric([str(device), kind], size)
        yield memory


def _started() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_initialized()
