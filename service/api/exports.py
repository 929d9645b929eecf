"""The frontier of a job, and other exports cut from it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from fastapi.concurrency import run_in_threadpool

from pdtrim.contract.errors import (
    ArtifactNotFound,
    DependencyUnavailable,
    JobNotFound,
    MissingScope,
    NoFrontier,
    NoSuchPoint,
    SetsNotNested,
    Unauthorized,
)
from pdtrim.contract.frontier import ExportSpec, Frontier
from pdtrim.contract.jobs import Job
from service.api import examples
from service.api.auth import declared
from service.api.deps import DatabaseDep, JobId, QuestionsDep, SettingsDep, StoreDep, json_only
from service.api.problems import documented
from service.api.submission import HEADERS, SUBMISSION_REFUSALS, NewJob, Submit
from service.api.suggestions import only_known_parameters
from service.checking.frontier import read_frontier
from service.db import jobs
from service.db.session import transaction
from service.db.specs import spec_of
from service.db.tables import JobRow

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["exports"], dependencies=[declared, only_known_parameters])


@router.get(
    "/frontier",
    summary="Look at a job's frontier",
    operation_id="get_frontier",
    response_model=Frontier,
    responses={
        200: examples.response(examples.FRONTIER, "The best set found for every number of removed blocks."),
        **documented(Unauthorized, MissingScope, JobNotFound, ArtifactNotFound, NoFrontier, DependencyUnavailable),
    },
)
def get_frontier(job_id: JobId, database: DatabaseDep, store: StoreDep) -> Frontier:
    """What giving up ever more blocks costs, in each half and in both. There as soon as the stage `removal` ended.

    `POST /v1/jobs/{job_id}/exports` makes the checkpoints of another point of it.
    """
    return read_frontier(database, store, job_id)


@router.post(
    "/exports",
    status_code=201,
    summary="Cut another export from a job's frontier",
    operation_id="create_export",
    response_model=Job,
    dependencies=[Depends(json_only)],
    responses={
        201: {**examples.response(examples.CUT_JOB, "The job that makes the export, queued."), "headers": HEADERS},
        **documented(*SUBMISSION_REFUSALS, JobNotFound, ArtifactNotFound, NoFrontier, NoSuchPoint, SetsNotNested),
    },
)
async def create_export(
    job_id: JobId,
    wanted: Annotated[ExportSpec, Body(openapi_examples=examples.EXPORT_REQUESTS)],
    settings: SettingsDep,
    questions: QuestionsDep,
    database: DatabaseDep,
    store: StoreDep,
    submit: Submit,
) -> Job:
    """Queue a job that takes over scores and search of this one, and distils, exports and evaluates other counts.

    Equal counts give one checkpoint. Otherwise decode's set has to contain prefill's: it does wherever prefill gives up
    as many blocks as in this job.
    """

    def cut() -> JobRow:
        read_frontier(database, store, job_id).cut(
            prefill=wanted.prefill.remove_blocks, decode=wanted.decode.remove_blocks
        )
        with transaction(database) as session:
            return jobs.get(session, job_id)

    async def prepare() -> NewJob:
        parent = await run_in_threadpool(cut)
        spec = wanted.job(spec_of(parent))
        # The scores are of that commit.
        pinned = spec.model.model_copy(update={"revision": parent.model_revision})
        await questions.check(spec.model_copy(update={"model": pinned}), settings)
        return NewJob(spec, parent.model_revision, cut_from=job_id)

    return await submit(wanted, prepare, cut_from=job_id)
