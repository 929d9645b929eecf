"""Manifests that serve a job's checkpoints."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from pdtrim.contract.errors import (
    ArtifactNotFound,
    DependencyUnavailable,
    InvalidRequest,
    JobNotFound,
    MissingScope,
    NoCheckpoints,
    Unauthorized,
)
from pdtrim.contract.manifests import ManifestOptions
from pdtrim.serving.manifests import manifests
from service.api.auth import declared
from service.api.deps import DatabaseDep, JobId, SettingsDep, StoreDep
from service.api.problems import documented
from service.api.suggestions import only_known_parameters
from service.checking.serving import read_deployment

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["exports"], dependencies=[declared, only_known_parameters])


class YamlResponse(Response):
    """YAML, as RFC 9512 calls it."""

    media_type = "application/yaml"


@router.get(
    "/manifests",
    summary="Get manifests that serve a job's checkpoints",
    operation_id="get_manifests",
    response_class=YamlResponse,
    responses={
        200: {
            "description": "A compose file, Kubernetes objects or a chart's values, with how to apply them above.",
            "content": {"application/yaml": {"schema": {"type": "string"}}},
        },
        **documented(
            Unauthorized,
            MissingScope,
            JobNotFound,
            ArtifactNotFound,
            NoCheckpoints,
            InvalidRequest,
            DependencyUnavailable,
        ),
    },
)
def get_manifests(
    job_id: JobId,
    options: Annotated[ManifestOptions, Query()],
    database: DatabaseDep,
    store: StoreDep,
    settings: SettingsDep,
) -> Response:
    """Prefill, decode and what routes between them, with the job's own checkpoints, sizes and KV transfer."""
    return YamlResponse(manifests(options.runtime, read_deployment(database, store, settings, job_id, options)))
