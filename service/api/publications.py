"""Publications of a job: what it is handed on to, and having that done again."""

from __future__ import annotations

from fastapi import APIRouter

from pdtrim.contract.errors import (
    DependencyUnavailable,
    JobNotFound,
    MissingScope,
    NothingToPublish,
    PushNotAllowed,
    Unauthorized,
)
from pdtrim.contract.jobs import Page
from pdtrim.contract.publications import Publication
from service.api import examples
from service.api.auth import declared
from service.api.deps import DatabaseDep, JobId, SettingsDep
from service.api.problems import documented
from service.api.suggestions import only_known_parameters
from service.checking.targets import check_push, targets
from service.db import jobs, publications, views
from service.db.session import transaction
from service.db.specs import spec_of

router = APIRouter(
    prefix="/v1/jobs/{job_id}/publications", tags=["publications"], dependencies=[declared, only_known_parameters]
)


@router.get(
    "",
    summary="List a job's publications",
    operation_id="list_publications",
    response_model=Page[Publication],
    responses={
        200: examples.response(examples.PUBLICATIONS, "Every target of the job, and what became of it."),
        **documented(Unauthorized, MissingScope, JobNotFound, DependencyUnavailable),
    },
)
def list_publications(job_id: JobId, database: DatabaseDep) -> Page[Publication]:
    """Where the job's results go once it has succeeded: to MLflow, to the hub. A failure here is none of the job's."""
    with transaction(database) as session:
        return views.publications(publications.of_job(session, job_id))


@router.post(
    "",
    status_code=202,
    summary="Publish a job again",
    operation_id="publish_job",
    response_model=Page[Publication],
    responses={
        202: examples.response(examples.PUBLICATIONS, "Every target of the job, tried again in seconds."),
        **documented(Unauthorized, MissingScope, JobNotFound, PushNotAllowed, NothingToPublish, DependencyUnavailable),
    },
)
def publish_job(job_id: JobId, settings: SettingsDep, database: DatabaseDep) -> Page[Publication]:
    """Hand the job on to all that the service has now, in seconds, or when it succeeds. What a target has, it keeps."""
    with transaction(database) as session:
        spec = spec_of(jobs.get(session, job_id))
        check_push(spec, settings)
        wanted = targets(spec, settings)
        if not wanted:
            raise NothingToPublish(
                "The job names no repository in push_to_hub, and the service has no PDTRIM_MLFLOW_TRACKING_URI."
            )
        publications.ask_again(session, job_id, wanted)
        return views.publications(publications.of_job(session, job_id))
