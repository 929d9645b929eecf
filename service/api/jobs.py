"""Jobs: create, list, look at, cancel, pause, resume, delete."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import Engine as Database
from starlette.convertors import StringConvertor, register_url_convertor

from pdtrim.contract.errors import (
    ArtifactQuotaExceeded,
    CursorNotFound,
    DependencyUnavailable,
    InvalidRequest,
    JobNotCancellable,
    JobNotDeletable,
    JobNotFound,
    JobNotPausable,
    JobNotResumable,
    MissingScope,
    QueueQuotaExceeded,
    Unauthorized,
)
from pdtrim.contract.estimate import Estimate
from pdtrim.contract.jobs import Job, JobStatus, Page
from pdtrim.contract.spec import JobSpec, Labels
from service import queue
from service.api import examples
from service.api.auth import declared
from service.api.deps import AfterJob, DatabaseDep, JobId, Limit, Project, QuestionsDep, SettingsDep, json_only
from service.api.problems import documented
from service.api.specs import SentSpec
from service.api.submission import (
    BODY_REFUSALS,
    HEADERS,
    PREFLIGHT_REFUSALS,
    SUBMISSION_REFUSALS,
    NewJob,
    Submission,
    Submit,
)
from service.api.suggestions import only_known_parameters
from service.checking.estimate import estimate
from service.checking.placement import Placement, check_room, placed
from service.checking.questions import Questions
from service.db import deletion, devices, jobs, views
from service.db.session import transaction
from service.settings import Settings
from service.sources import ModelDescription


class _JobConvertor(StringConvertor):
    """What may stand for a job in a path: not `estimate`, which is a route of its own and takes POST alone."""

    regex = "(?!estimate$)[^/]+"


register_url_convertor("job", _JobConvertor())
router = APIRouter(prefix="/v1/jobs", tags=["jobs"], dependencies=[declared, only_known_parameters])

FILTER = re.compile(r"metadata\[(.*)\]", re.DOTALL)
LABELS: TypeAdapter[dict[str, str]] = TypeAdapter(Labels)


async def metadata_filter(request: Request) -> dict[str, str]:
    """The `metadata[key]=value` pairs of the query."""
    pairs = [
        (match[1], value) for name, value in request.query_params.multi_items() if (match := FILTER.fullmatch(name))
    ]
    try:
        return LABELS.validate_python(dict(pairs))
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
        201: {**examples.response(examples.JOB, "The job, queued."), "headers": HEADERS},
        **documented(*SUBMISSION_REFUSALS),
    },
)
async def create_job(
    sent: Annotated[SentSpec, Body(openapi_examples=examples.REQUESTS)],
    settings: SettingsDep,
    questions: QuestionsDep,
    submit: Submit,
) -> Job:
    """Check what can be checked without weights, then queue a job that scores, removes, distils, exports, evaluates."""
    return await create(await questions.here.ask(sent.read), settings, questions, submit)


async def create(spec: JobSpec, settings: Settings, questions: Questions, submit: Submission) -> Job:
    """The job, queued. Raises: what checks and `submit` raise."""

    async def prepare() -> NewJob:
        model = await questions.check(spec, settings)
        placement = await run_in_threadpool(_placed, spec, model, settings, submit.database)
        check_room(placement)
        return NewJob(spec, model.revision, queue=placement.queue)

    return await submit(spec, prepare)


@router.post(
    "/estimate",
    summary="Estimate a job",
    operation_id="estimate_job",
    response_model=Estimate,
    dependencies=[Depends(json_only)],
    responses={
        200: examples.response(examples.ESTIMATE, "What the job would make and take. Nothing is queued."),
        **documented(*BODY_REFUSALS, *PREFLIGHT_REFUSALS),
    },
)
async def estimate_job(
    sent: Annotated[SentSpec, Body(openapi_examples=examples.REQUESTS)],
    settings: SettingsDep,
    questions: QuestionsDep,
    database: DatabaseDep,
    project: Project,
) -> Estimate:
    """Check a job as `POST /v1/jobs` does, and say what would come of it: sizes, memory, sets to evaluate, warnings.

    Times go by the project's newest finished job on the same model, scaled by what this one computes, or else by the
    speed that a worker of the job's queue measured when it started.
    """
    return await foresee(await questions.here.ask(sent.read), settings, questions, database, project)


async def foresee(
    spec: JobSpec, settings: Settings, questions: Questions, database: Database, project: str
) -> Estimate:
    """The job's estimate. Raises: what its checks raise."""
    model = await questions.check(spec, settings)

    def compute() -> Estimate:
        placement = _placed(spec, model, settings, database)
        with transaction(database) as session:
            earlier = jobs.newest_like(session, project, spec.model.source)
        return estimate(spec, model, placement, earlier)

    return await run_in_threadpool(compute)


def _placed(spec: JobSpec, model: ModelDescription, settings: Settings, database: Database) -> Placement:
    """Where the job goes, by what is known of workers."""
    with transaction(database) as session:
        return placed(spec, model, devices.known(session), settings.queues)


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
                "schema": LABELS.json_schema(),
            }
        ]
    },
)
def list_jobs(
    database: DatabaseDep,
    project: Project,
    metadata: Annotated[dict[str, str], Depends(metadata_filter)],
    after: AfterJob,
    limit: Limit = 20,
    status: Annotated[JobStatus | SkipJsonSchema[None], Query(description="Only jobs in this state.")] = None,
) -> Page[Job]:
    """Newest first. Read on with `after` set to the page's `last_id` while `has_more` is true."""
    with transaction(database) as session:
        rows, has_more = jobs.page(session, project, limit=limit, after=after, status=status, metadata=metadata)
        return views.jobs(rows, jobs.stages(session, [row.id for row in rows]), has_more)


@router.get(
    "/{job_id:job}",
    summary="Look at a job",
    operation_id="get_job",
    response_model=Job,
    responses={
        200: examples.response(examples.JOB, "The job with its stages."),
        **documented(Unauthorized, MissingScope, JobNotFound, DependencyUnavailable),
    },
)
def get_job(job_id: JobId, database: DatabaseDep) -> Job:
    """The job: status, stages with progress and metrics, error, specification, library versions."""
    with transaction(database) as session:
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
def cancel_job(job_id: JobId, database: DatabaseDep) -> Job:
    """Stop a job. What finished stages left stays. Cancelling twice is no error; cancelling a finished job is.

    A job whose last stage ends while it is cancelling has succeeded. A resume takes a cancelled job up again.
    """
    with transaction(database) as session:
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
def pause_job(job_id: JobId, database: DatabaseDep) -> Job:
    """Stop a job for a while and free its worker. Pausing twice is no error; pausing a finished job is."""
    with transaction(database) as session:
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
def resume_job(job_id: JobId, settings: SettingsDep, database: DatabaseDep) -> Job:
    """Go on where the job stopped: finished stages are not repeated, the one after them starts from its saved state.

    What counted against the stage's attempts is forgiven.
    """
    with transaction(database) as session:
        row, stage = jobs.resume(session, job_id, limits=settings.quotas)
        stages = jobs.stages(session, [job_id])[job_id]
        shown = views.job(row, stages)
    if jobs.is_sent(stages):
        queue.try_to_send(settings, queue.WakeUp(job_id, stage, row.queue))
    return shown


@router.delete(
    "/{job_id:job}",
    status_code=204,
    summary="Delete a job",
    operation_id="delete_job",
    response_class=Response,
    responses={
        204: {"description": "The job is gone; its files leave the artifact store within a minute."},
        **documented(Unauthorized, MissingScope, JobNotFound, JobNotDeletable, DependencyUnavailable),
    },
)
def delete_job(job_id: JobId, database: DatabaseDep) -> None:
    """Delete a finished or paused job with its stages, events and artifacts, for good."""
    with transaction(database) as session:
        deletion.mark(session, job_id)
