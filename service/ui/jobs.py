"""The list of jobs, a job's page, and what can be done to a job."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import NoFrontier, PDTrimError
from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import Action, Artifact, Event, Job, JobStatus, StageName, StageStatus
from pdtrim.contract.results import SEARCH, SearchRecord
from service.api import artifacts, events
from service.api import jobs as api
from service.api.deps import AfterJob, DatabaseDep, JobId, Project, SettingsDep, StoreDep
from service.api.exports import get_frontier
from service.db import artifacts as stored
from service.db import events as recorded
from service.db import jobs, urgency
from service.db.session import transaction
from service.settings import Settings
from service.storage import ArtifactStore, ObjectNotFound, StoreUnavailable
from service.ui import views
from service.ui.pages import go, render
from service.ui.visits import Posted, entered

log = logging.getLogger(__name__)
router = APIRouter(prefix="/ui", include_in_schema=False, dependencies=[Depends(entered)])

PAGE = 25
SHOWN_EVENTS = 40
MAX_ARTIFACTS = 500
MAX_HEALING_POINTS = 400
"""Of a long training, so many of the losses that it told are drawn."""
MAX_SEARCH_BYTES = 16 << 20
"""Longest record of a search that is drawn; a longer one can be downloaded."""


@router.get("")
@router.get("/")
def home() -> Response:
    """On to the jobs."""
    return go("/ui/jobs")


@router.get("/jobs")
def list_jobs(
    request: Request,
    database: DatabaseDep,
    project: Project,
    after: AfterJob,
    status: Annotated[JobStatus | str, Query(max_length=20)] = "",
    label: Annotated[str, Query(max_length=600)] = "",
) -> Response:
    """A page of jobs, newest first: those in a state, with a label."""
    wanted = JobStatus(status) if status in list(JobStatus) else None
    name, equals, value = (part.strip() for part in label.partition("="))
    error, page = None, None
    try:
        labels = _labels({name: value} if name else {})
        page = api.list_jobs(database, project, labels, after, PAGE, wanted)
    except RequestValidationError:
        error = "A label filter is `key=value`; a key has letters, digits and `._-`."
    if name and not equals:
        error, page = "Write the label as `key=value`, such as `team=serving`.", None
    return render(
        request,
        "jobs.html",
        status=200 if error is None else 422,
        jobs=[] if page is None else [views.row(job) for job in page.data],
        older=page.last_id if page is not None and page.has_more else None,
        live=page is not None and any(not job.status.final for job in page.data),
        statuses=list(JobStatus),
        chosen=wanted,
        label=label,
        first=after is None,
        error=error,
    )


def _labels(pairs: Mapping[str, str]) -> dict[str, str]:
    try:
        return api.LABELS.validate_python(dict(pairs))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error


@router.get("/jobs/{job_id}")
def show_job(
    request: Request, job_id: JobId, settings: SettingsDep, database: DatabaseDep, store: StoreDep
) -> Response:
    """All about a job."""
    return page_of(request, job_id, settings, database, store)


@router.get("/jobs/{job_id}/progress")
def show_progress(request: Request, job_id: JobId, settings: SettingsDep, database: DatabaseDep) -> Response:
    """The parts of a job's page that change all the time; nothing is asked of the store."""
    job = api.get_job(job_id, database)
    return render(request, "progress.html", job=job, progress=_progress(job, settings, database))


def _progress(job: Job, settings: Settings, database: Database) -> views.Progress:
    waits = any(stage.status == StageStatus.QUEUED for stage in job.stages)
    with transaction(database) as session:
        last = jobs.get(session, job.id).last_event
        told = recorded.progress_of(session, job.id, StageName.DISTILLATION, most=MAX_HEALING_POINTS)
        healing = [Event.model_validate(row) for row in told]
        place = urgency.ahead(session, job.id, job.queue, max_running_jobs=settings.max_running_jobs) if waits else None
    found = events.read(database, job.id, after=max(0, last - SHOWN_EVENTS), limit=SHOWN_EVENTS).page.data
    return views.progress(job, events=found, healing=healing, ahead=place)


def page_of(
    request: Request,
    job_id: str,
    settings: Settings,
    database: Database,
    store: ArtifactStore,
    refusal: PDTrimError | None = None,
) -> Response:
    """A job's page; `refusal` says why what was asked of it did not happen."""
    job = api.get_job(job_id, database)
    # Before what else is read: what happens meanwhile comes by the events after these.
    progress = _progress(job, settings, database)
    frontier, search, unread = None, None, False
    try:
        frontier, search = _frontier(job_id, database, store), _search(job_id, database, store)
    except (ObjectNotFound, StoreUnavailable) as error:
        log.error("artifact store: %s", error)
        unread = True
    page = views.job_page(
        job,
        artifacts=_artifacts(job_id, database),
        frontier=frontier,
        search=search,
        address=str(request.base_url).rstrip("/"),
    )
    status = 200 if refusal is None else refusal.status
    return render(
        request, "job.html", status=status, page=page, progress=progress, job=job, refusal=refusal, unread=unread
    )


def _artifacts(job_id: str, database: Database) -> list[Artifact]:
    found: list[Artifact] = []
    after, more = None, True
    while more and len(found) < MAX_ARTIFACTS:
        page = artifacts.list_artifacts(job_id, database, after, 100, None)
        found += page.data
        after, more = page.last_id, page.has_more
    return found


def _frontier(job_id: str, database: Database, store: ArtifactStore) -> Frontier | None:
    try:
        return get_frontier(job_id, database, store)
    except NoFrontier:
        return None


def _search(job_id: str, database: Database, store: ArtifactStore) -> SearchRecord | None:
    with transaction(database) as session:
        row = next((row for row in stored.of_stage(session, job_id, StageName.REMOVAL) if row.name == SEARCH), None)
    if row is None or row.size > MAX_SEARCH_BYTES:
        return None
    return SearchRecord.model_validate_json(store.get_bytes(row.key))


ACTIONS: Mapping[Action, Callable[[str, Settings, Database], Job | None]] = {
    Action.CANCEL: lambda job_id, settings, database: api.cancel_job(job_id, database),
    Action.PAUSE: lambda job_id, settings, database: api.pause_job(job_id, database),
    Action.RESUME: lambda job_id, settings, database: api.resume_job(job_id, settings, database),
    Action.DELETE: lambda job_id, settings, database: api.delete_job(job_id, database),
}


@router.post("/jobs/{job_id}/{action}")
def change_job(
    request: Request,
    job_id: JobId,
    action: Action,
    settings: SettingsDep,
    database: DatabaseDep,
    store: StoreDep,
    form: Posted,
) -> Response:
    """Cancel, pause, resume or delete a job."""
    try:
        ACTIONS[action](job_id, settings, database)
    except PDTrimError as refusal:
        return page_of(request, job_id, settings, database, store, refusal)
    return go("/ui/jobs" if action is Action.DELETE else f"/ui/jobs/{job_id}")
