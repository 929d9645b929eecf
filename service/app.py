"""The gateway: routers, middleware, and what lives as long as the process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import version

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.telemetry import TelemetryConfig
from fastapi_offline import FastAPIOffline
from starlette.responses import RedirectResponse

from service import ui
from service.api import (
    artifacts,
    events,
    exports,
    health,
    jobs,
    manifests,
    methods,
    metrics,
    problems,
    publications,
    wakeups,
    webhooks,
)
from service.api.access_log import AccessLog
from service.api.auth import Gate, GateMiddleware, warn_if_open
from service.api.body_limit import BodyLimit
from service.api.metrics import GatewayMetrics
from service.api.request_ids import RequestIds
from service.api.sessions import Sessions
from service.checking.questions import Questions
from service.db.session import connect, migrate
from service.settings import Settings
from service.storage import open_store
from service.upkeep.reconciler import Reconciler

TAGS = [
    {"name": "jobs", "description": "Prune a model: one job, five stages."},
    {"name": "events", "description": "What happened in a job, as pages or as a stream."},
    {"name": "artifacts", "description": "What a job left: checkpoints, plans, reports."},
    {"name": "exports", "description": "Loss by removed blocks, and checkpoints of other points of it."},
    {"name": "publications", "description": "Whom a finished job is handed on to: MLflow, the Hugging Face hub."},
    {"name": "webhooks", "description": "Have events sent to you."},
    {"name": "methods", "description": "The pruning methods and their parameters."},
    {"name": "health", "description": "Liveness, readiness and metrics."},
]
PROBES = ("/healthz", "/readyz", "/metrics")
# FastAPI makes a span of each request, once there is a tracer provider (`service.observing.tracing`).
TELEMETRY: TelemetryConfig = {
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
    "exclude": lambda scope: scope.get("path") in PROBES,
}


def create_app(settings: Settings | None = None) -> FastAPI:
    """The ASGI application; by default configured by the environment."""
    settings = settings or Settings()
    # Its pages /docs and /redoc bring their scripts along: a cluster without the internet shows them too.
    app = FastAPIOffline(
        title="PDTrim Service",
        summary="Prunes language models for prefill/decode serving.",
        version=version("pdtrim"),
        lifespan=_lifespan,
        openapi_tags=TAGS,
        redirect_slashes=False,
        telemetry=TELEMETRY,
    )
    app.state.settings = settings
    app.state.metrics = GatewayMetrics()
    app.state.gate, app.state.sessions = Gate(settings), Sessions(settings.session_secret)
    nouns = (jobs, events, artifacts, exports, manifests, publications, webhooks, methods, health, metrics)
    for router in (noun.router for noun in nouns):
        app.include_router(router)
    problems.install(app)
    problems.document(app)
    ui.install(app)
    app.get("/", include_in_schema=False)(_to_the_dashboard)
    # The last one added is the first to see a request.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(GateMiddleware, gate=app.state.gate, sessions=app.state.sessions)
    app.add_middleware(RequestIds)
    app.add_middleware(AccessLog, metrics=app.state.metrics)
    return app


async def _to_the_dashboard() -> RedirectResponse:
    return RedirectResponse("/ui")


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    counted: GatewayMetrics = app.state.metrics
    database = connect(settings.database_url)
    await run_in_threadpool(migrate, database)
    await run_in_threadpool(warn_if_open, database, settings)
    app.state.database, app.state.questions = database, Questions()
    app.state.store = open_store(
        settings.artifacts_url,
        endpoint_url=settings.s3_endpoint_url,
        public_endpoint_url=settings.s3_public_endpoint_url,
        region=settings.s3_region,
    )
    reconciling = Reconciler(database, settings, app.state.store, counted.leases_expired)
    try:
        async with wakeups.running(database) as app.state.feeds:
            figures = counted.of_jobs(database, settings.queues)
            with figures, reconciling if settings.reconcile_in_gateway else nullcontext():
                yield
    finally:
        database.dispose()
