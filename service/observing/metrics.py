"""Where a process's Prometheus metrics are kept. Gateways and workers count each their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics


def new_registry() -> CollectorRegistry:
    """A registry with the figures of this process: CPU time, memory, open files."""
    # A second series beside each, of which Prometheus makes nothing.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry
