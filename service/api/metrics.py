"""The gateway's metrics, for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client.exposition import choose_encoder

from service.metrics import GatewayMetrics

router = APIRouter(tags=["health"])


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
