"""Artifacts of a job: the list, and their content."""

from __future__ import annotations

import mimetypes
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from pydantic.json_schema import SkipJsonSchema
from starlette.responses import RedirectResponse, StreamingResponse

from pdtrim.contract.errors import (
    ArtifactNotFound,
    CursorNotFound,
    DependencyUnavailable,
    InvalidRequest,
    JobNotFound,
    MissingScope,
    RangeNotSatisfiable,
    Unauthorized,
)
from pdtrim.contract.jobs import Artifact, Page, StageName
from service.api import examples, ranges
from service.api.auth import declared
from service.api.deps import AfterArtifact, ArtifactId, DatabaseDep, JobId, Limit, SettingsDep, StoreDep
from service.api.problems import documented, problem
from service.api.suggestions import only_known_parameters
from service.db import artifacts, jobs, views
from service.db.session import transaction
from service.db.tables import ArtifactRow
from service.storage import ArtifactStore, content_disposition

router = APIRouter(
    prefix="/v1/jobs/{job_id}/artifacts", tags=["artifacts"], dependencies=[declared, only_known_parameters]
)

HEADERS: dict[str, Any] = {
    name: {"description": description, "schema": {"type": "string"}}
    for name, description in (
        ("ETag", "The content's SHA-256."),
        ("Content-Disposition", "The file's name."),
        ("Accept-Ranges", "`bytes`"),
    )
}
CONTENT: dict[str, Any] = {"*/*": {}}
"""Its type follows from the file's name."""


@router.get(
    "",
    summary="List a job's artifacts",
    operation_id="list_artifacts",
    response_model=Page[Artifact],
    responses={
        200: examples.response(examples.ARTIFACTS, "A page of artifacts, stage by stage."),
        **documented(Unauthorized, MissingScope, JobNotFound, InvalidRequest, CursorNotFound, DependencyUnavailable),
    },
)
def list_artifacts(
    job_id: JobId,
    database: DatabaseDep,
    after: AfterArtifact,
    limit: Limit = 20,
    stage: Annotated[StageName | SkipJsonSchema[None], Query(description="Only what this stage left.")] = None,
) -> Page[Artifact]:
    """What finished stages left, with size and SHA-256. Read on with `after` set to the page's `last_id`."""
    with transaction(database) as session:
        jobs.get(session, job_id)
        rows, has_more = artifacts.page(session, job_id, stage=stage, after=after, limit=limit)
        return views.artifacts(rows, has_more)


@router.get(
    "/{artifact_id}/content",
    summary="Download an artifact",
    operation_id="get_artifact_content",
    response_class=Response,
    responses={
        200: {"description": "The file, from a local store.", "content": CONTENT, "headers": HEADERS},
        206: {
            "description": "The bytes that `Range` asked for.",
            "content": CONTENT,
            "headers": {**HEADERS, "Content-Range": {"description": "Which bytes.", "schema": {"type": "string"}}},
        },
        304: {"description": "`If-None-Match` names this content."},
        307: {
            "description": "The file is in S3, at a link that is valid for a while.",
            "headers": {"Location": {"description": "Presigned link.", "schema": {"type": "string"}}},
        },
        **documented(
            Unauthorized, MissingScope, ArtifactNotFound, JobNotFound, RangeNotSatisfiable, DependencyUnavailable
        ),
    },
)
def get_artifact_content(
    request: Request,
    job_id: JobId,
    artifact_id: ArtifactId,
    settings: SettingsDep,
    database: DatabaseDep,
    store: StoreDep,
) -> Response:
    """Redirects to the store, or streams a local file; honours `Range`, `If-Range` and `If-None-Match`."""
    with transaction(database) as session:
        row = artifacts.get(session, job_id, artifact_id)
    link = store.presigned_url(row.key, expires_s=settings.presign_seconds, filename=_file_name(row))
    if link is not None:
        return RedirectResponse(link, status_code=307, headers={"Cache-Control": "no-store"})
    if ranges.already_known(request.headers, etag=_etag(row)):
        return Response(status_code=304, headers={"ETag": _etag(row)})
    try:
        part = ranges.wanted(request.headers, size=row.size, etag=_etag(row))
    except ranges.Unsatisfiable:
        error = RangeNotSatisfiable(f"The artifact has {row.size} bytes, none of which lies in the range asked for.")
        return problem(request, error, headers={"Content-Range": f"bytes */{row.size}"})
    return _content(store, row, part)


@router.head(
    "/{artifact_id}/content",
    summary="Look at an artifact's headers",
    operation_id="head_artifact_content",
    response_class=Response,
    responses={
        200: {"description": "The headers of the whole file, wherever it is stored.", "headers": HEADERS},
        **documented(Unauthorized, MissingScope, ArtifactNotFound, JobNotFound, DependencyUnavailable),
    },
)
def head_artifact_content(job_id: JobId, artifact_id: ArtifactId, database: DatabaseDep) -> Response:
    """Size, SHA-256 and name; never a redirect, as a presigned link is good for GET alone."""
    with transaction(database) as session:
        row = artifacts.get(session, job_id, artifact_id)
    return Response(headers={**_headers(row), "Content-Length": str(row.size)})


def _content(store: ArtifactStore, row: ArtifactRow, part: ranges.ByteRange | None) -> Response:
    whole = ranges.ByteRange(0, row.size)
    sent = part or whole
    chunks = store.read_range(row.key, sent.start, sent.stop)
    headers = {**_headers(row), "Content-Length": str(len(sent))}
    if part is None:
        return StreamingResponse(chunks, headers=headers)
    headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{row.size}"
    return StreamingResponse(chunks, status_code=206, headers=headers)


def _headers(row: ArtifactRow) -> dict[str, str]:
    name = _file_name(row)
    return {
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=31536000, immutable",
        "Content-Disposition": content_disposition(name),
        "Content-Type": mimetypes.guess_type(name)[0] or "application/octet-stream",
        "ETag": _etag(row),
        "X-Content-Type-Options": "nosniff",
    }


def _file_name(row: ArtifactRow) -> str:
    return PurePosixPath(row.name).name


def _etag(row: ArtifactRow) -> str:
    return f'"{row.sha256}"'
