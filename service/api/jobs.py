"""Jobs: create, list, look at, cancel, pause, resume, delete."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema

from service import preflight, queue
from service.api import examples, views
from service.api.auth import declared
from service.api.deps import AfterJob, ApiKeyPrefix, EngineDep, JobId, Limit, Project, SettingsDep, json_only
from service.api.idempotency import REPLAYED, REPLAYED_HEADER, IdempotencyKey, reserved
from service.api.problems import BodyTooLarge, MalformedBody, UnsupportedMediaType, documented
from service.contract.errors import (
    ArtifactQuotaExceeded,
    CursorNotFound,
    DependencyUnavailable,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    InvalidRequest,
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    MissingScope,
    ModelTooLarge,
    ModelUnsupported,
    NoSuchQueue,
    PushNotAllowed,
    QueueQuotaExceeded,
    RequestInFlight,
    SourceNotAllowed,
    SourceUnreadable,
    TooManyBlocks,
    Unauthorized,
)
from service.contract.jobs import Job, JobStatus, Page, StageName
from service.contract.spec import JobSpec, MetadataKey, MetadataValue
from service.db import deletion, idempotency, jobs
from service.db.idempotency import Answered
from service.db.session import transaction
from service.publishing.targets import targets

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[declared])

FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
Labels = TypeAdapter(Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)])


async def metadata_filter(request: Request) -> dict[str, str]:
    """The `metadata[key]=value` pairs of the query."""
    pairs = [
        (match[1], value) for name, value in request.query_params.multi_items() if (match := FILTER.fullmatch(name))
    ]
    try:
        return Labels.validate_python(dict(pairs))
    except ValidationError as error:
        found = [{**one, "loc": ("query", "metadata", *one["loc"])} for one in error.errors()]
        raise RequestValidationError(found) from error


@router.post(
    "",
    status_code=201,
    summary="Create a job",
    operation_id="create_job",
    response_model=Job,
    dependencies=[Depends(json_only)],
    responses={
        201: {
            **examples.response(examples.JOB, "The job, queued."),
            "headers": {
                "Location": {"description": "Path of the job.", "schema": {"type": "string"}},
                **REPLAYED_HEADER,
            },
        },
        **documented(
            MalformedBody,
            InvalidIdempotencyKey,
            Unauthorized,
            MissingScope,
            RequestInFlight,
            IdempotencyKeyReused,
            BodyTooLarge,
            UnsupportedMediaType,
            InvalidRequest,
            SourceNotAllowed,
            SourceUnreadable,
            ModelTooLarge,
            ModelUnsupported,
            TooManyBlocks,
            NoSuchQueue,
            PushNotAllowed,
            QueueQuotaExceeded,
            ArtifactQuotaExceeded,
            DependencyUnavailable,
        ),
    },
)
def create_job(
    spec: Annotated[JobSpec, Body(openapi_examples=examples.REQUESTS)],
    response: Response,
    settings: SettingsDep,
    engine: EngineDep,
    project: Project,
    api_key: ApiKeyPrefix,
    idempotency_key: IdempotencyKey,
) -> Job:
    """Check what can be checked without weights, then queue a job that scores, removes, distils, exports, evaluates."""
    with reserved(engine, project, idempotency_key, spec) as held:
        if isinstance(held, Answered):
            response.headers.update({"Location": f"/v1/jobs/{held.job_id}", REPLAYED: "true"})
            return Job.model_validate(held.response)
        revision = preflight.check(spec, settings)
        with transaction(engine) as session:
            row, stages, sent = jobs.insert_new(
                session,
                spec,
                project=project,
                api_key=api_key,
                limits=settings.quotas,
                model_revision=revision,
                default_queue=settings.queues[0],
                targets=targets(spec, settings),
            )
            shown = views.job(row, stages)
            if held is not None:
                idempotency.settle(session, held, row.id, shown.model_dump(mode="json"))
    if sent:
        queue.try_to_send(settings, row.id, StageName.SCORING, row.route)
    response.headers["Location"] = f"/v1/jobs/{row.id}"
    return shown


@router.get(
    "",
    summary="List jobs",
    operation_id="list_jobs",
    response_model=Page[Job],
    responses={
        200: examples.response(examples.JOBS, "A page of jobs, newest first."),
        **documented(Unauthorized, MissingScope, InvalidRequest, CursorNotFound, DependencyUnavailable),
    },
    openapi_extra={
        "parameters": [
            {
                "name": "metadata",
                "in": "query",
                "description": "Only jobs that carry these labels: `metadata[team]=serving`.",
                "style": "deepObject",
                "explode": True,
                "schema": {**Labels.json_schema(), "additionalProperties": False},
            }
        ]
    },
)
def list_jobs(
    engine: EngineDep,
    project: Project,
    metadata: Annotated[dict[str, str], Depends(metadata_filter)],
    after: AfterJob,
    limit: Limit = 20,
    status: Annotated[JobStatus | SkipJsonSchema[None], Query(description="Only jobs in this state.")] = None,
) -> Page[Job]:
    """Newest first. Read on with `after` set to the page's `last_id` while `has_more` is true."""
    with transaction(engine) as session:
        rows, has_more = jobs.page(session, project, limit=limit, after=after, status=status, metadata=metadata)
        return views.jobs(rows, jobs.stages(session, [row.id for row in rows]), has_more)


@router.get(
    "/{job_id}",
    summary="Look at a job",
    operation_id="get_job",
    response_model=Job,
    responses={
        200: examples.response(examples.JOB, "The job with its stages."),
        **documented(Unauthorized, MissingScope, JobNotFound, DependencyUnavailable),
    },
)
def get_job(job_id: JobId, engine: EngineDep) -> Job:
    """The job: status, stages with progress and metrics, error, specification, library versions."""
    with transaction(engine) as session:
        return views.job(jobs.get(session, job_id), jobs.stages(session, [job_id])[job_id])


@router.post(
    "/{job_id}/cancel",
    summary="Cancel a job",
    operation_id="cancel_job",
    response_model=Job,
    responses={
        200: examples.response(
            {**examples.JOB, "status": "cancelling", "estimated_finish": None},
            "The job, `cancelled`, or `cancelling` until the worker has stopped the running stage.",
        ),
        **documented(Unauthorized, MissingScope, JobNotFound, JobNotCancellable, DependencyUnavailable),
    },
)
def cancel_job(job_id: JobId, engine: EngineDep) -> Job:
    """Stop a job. What finished stages left stays. Cancelling twice is no error; cancelling a finished job is.

    A job whose last stage ends while it is cancelling has succeeded. A resume takes a cancelled job up again.
    """
    with transaction(engine) as session:
        row = jobs.request_cancel(session, job_id)
        return views.job(row, jobs.stages(session, [job_id])[job_id])


@router.post(
    "/{job_id}/pause",
    summary="Pause a job",
    operation_id="pause_job",
    response_model=Job,
    responses={
        200: examples.response(
            {**examples.JOB, "status": "pausing", "estimated_finish": None},
            "The job, `paused`, or `pausing` until the worker has stopped the running stage.",
        ),
        **documented(Unauthorized, MissingScope, JobNotFound, JobNotPausable, DependencyUnavailable),
    },
)
def pause_job(job_id: JobId, engine: EngineDep) -> Job:
    """Stop a job for a while and free its worker. Pausing twice is no error; pausing a finished job is."""
    with transaction(engine) as session:
        row = jobs.request_pause(session, job_id)
        return views.job(row, jobs.stages(session, [job_id])[job_id])


@router.post(
    "/{job_id}/resume",
    summary="Resume a paused, failed or cancelled job",
    operation_id="resume_job",
    response_model=Job,
    responses={
        200: examples.response(
            {**examples.JOB, "status": "queued", "estimated_finish": None}, "The job, queued for a worker."
        ),
        **documented(
            Unauthorized,
            MissingScope,
            JobNotFound,
            JobNotResumable,
            QueueQuotaExceeded,
            ArtifactQuotaExceeded,
            DependencyUnavailable,
        ),
    },
)
def resume_job(job_id: JobId, settings: SettingsDep, engine: EngineDep) -> Job:
    """Go on where the job stopped: finished stages are not repeated, the one after them starts from its saved state.

    What counted against the stage's attempts is forgiven.
    """
    with transaction(engine) as session:
        row, stage = jobs.resume(session, job_id, limits=settings.quotas)
        stages = jobs.stages(session, [job_id])[job_id]
        shown = views.job(row, stages)
    if jobs.is_sent(stages):
        queue.try_to_send(settings, job_id, stage, row.route)
    return shown


@router.delete(
    "/{job_id}",
    status_code=204,
    summary="Delete a job",
    operation_id="delete_job",
    response_class=Response,
    responses={
        204: {"description": "The job is gone; its files leave the artifact store within a minute."},
        **documented(Unauthorized, MissingScope, JobNotFound, JobNotDeletable, DependencyUnavailable),
    },
)
def delete_job(job_id: JobId, engine: EngineDep) -> None:
    """Delete a finished or paused job with its stages, events and artifacts, for good."""
    with transaction(engine) as session:
        deletion.mark(session, job_id)
