"""The gateway's Prometheus metrics: its own requests, and the state of all jobs.

The state is read from the database when it is scraped: one pass over the index of jobs by status, three look-ups for
each stage that waits. With a million jobs, of which a thousand wait, that took 0.2 s on two busy cores. It is read at
most every five seconds, and not before twenty times as long has passed as the last reading took.

How long stages take, what they write and which leases are lost is counted by the workers, where it happens
(`workers.running.metrics`): the database has no index to read it from, and counters may restart with their process.
No label is an id.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from threading import Lock

from fastapi import APIRouter, Request, Response
from prometheus_client import Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from pdtrim.contract.jobs import StageName
from service.db import statistics as figures
from service.db.session import transaction
from service.db.tables import now
from service.observing.metrics import new_registry

READ_SECONDS = 5.0
IDLE_SHARE = 20.0
log = logging.getLogger(__name__)
router = APIRouter(tags=["health"])


class GatewayMetrics:
    """What one gateway counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = new_registry()
        self.requests = Counter(
            "pdtrim_http_requests", "Requests answered.", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "pdtrim_http_request_duration_seconds",
            "Time from a request to the end of its answer.",
            ["method", "route"],
            registry=self.registry,
        )
        self.leases_expired = Counter(
            "pdtrim_leases_expired",
            "Leases that this gateway's reconciler took from workers that fell silent.",
            registry=self.registry,
        )

    @contextmanager
    def of_jobs(self, database: Database, queues: Sequence[str]) -> Iterator[None]:
        """Add the state of the jobs in a database, as long as the block lasts. `queues` are shown when empty, too."""
        collector = JobsCollector(database, queues)
        self.registry.register(collector)
        try:
            yield
        finally:
            self.registry.unregister(collector)


class JobsCollector(Collector):
    """Jobs by state and what waits for a worker. A database that does not answer is a figure too, not a failure."""

    def __init__(self, database: Database, queues: Sequence[str]) -> None:
        self._database = database
        self._queues = queues
        self._lock = Lock()
        self._found: list[Metric] = []
        self._read_at, self._took = -READ_SECONDS, 0.0

    def collect(self) -> Iterable[Metric]:
        with self._lock:  # Whoever scrapes meanwhile gets the same figures, not a query of their own.
            started = time.monotonic()
            if started - self._read_at >= max(READ_SECONDS, IDLE_SHARE * self._took):
                self._found = self._read()
                self._read_at = time.monotonic()
                self._took = self._read_at - started
            return self._found

    def _read(self) -> list[Metric]:
        up = GaugeMetricFamily("pdtrim_database_up", "Whether the database answered; without it, no figures of jobs.")
        try:
            with transaction(self._database) as session:
                jobs, queued, at = figures.jobs_by_status(session), figures.queued_stages(session), now()
        except SQLAlchemyError as error:
            log.warning("no figures of jobs: %s", error)
            up.add_metric([], 0)
            return [up]
        up.add_metric([], 1)
        states = GaugeMetricFamily("pdtrim_jobs", "Jobs, by state.", labels=["status"])
        for status, count in jobs.items():
            states.add_metric([status.value], count)
        waiting = GaugeMetricFamily("pdtrim_stages_queued", "Stages that wait for a worker.", labels=["queue", "stage"])
        oldest = GaugeMetricFamily(
            "pdtrim_stages_queued_oldest_age_seconds",
            "How long the first of them has waited.",
            labels=["queue", "stage"],
        )
        for queue, stage in sorted({*product(self._queues, StageName), *queued}):
            found = queued.get((queue, stage))
            waiting.add_metric([queue, stage.value], found.count if found else 0)
            oldest.add_metric([queue, stage.value], (at - found.oldest).total_seconds() if found else 0)
        return [up, states, waiting, oldest]


@router.get(
    "/metrics",
    summary="Metrics",
    operation_id="metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus's text format, or OpenMetrics.", "content": {"text/plain": {}}}},
)
def metrics(request: Request) -> Response:
    """Requests by route, jobs by state, the queue; no job or project by name. Like the probes it needs no key."""
    gateway: GatewayMetrics = request.app.state.metrics
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(gateway.registry), headers={"Content-Type": content_type})
