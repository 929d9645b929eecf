"""Cutting another export from a job's frontier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from sqlalchemy import Engine as Database
from uuid_utils import uuid7

from pdtrim.contract.errors import InvalidRequest, PDTrimError
from pdtrim.contract.frontier import ExportSpec
from pdtrim.contract.spec import MAX_BLOCKS
from service.api import exports as api
from service.api import jobs
from service.api.deps import ApiKeyPrefix, DatabaseDep, JobId, Project, QuestionsDep, SettingsDep, StoreDep
from service.api.problems import field_and_reason
from service.api.submission import Submission
from service.storage import ArtifactStore
from service.ui import views
from service.ui.pages import go, render
from service.ui.submit import key_of
from service.ui.visits import Posted, entered

router = APIRouter(prefix="/ui/jobs/{job_id}/exports", include_in_schema=False, dependencies=[Depends(entered)])

Count = Annotated[int | None, Query(ge=0, le=MAX_BLOCKS)]


@router.get("/new")
def show(
    request: Request, job_id: JobId, database: DatabaseDep, store: StoreDep, prefill: Count = None, decode: Count = None
) -> Response:
    """The frontier with a point of it, and what the export there would give up."""
    return _show(request, job_id, database, store, prefill, decode)


@router.post("")
async def cut(
    request: Request,
    job_id: JobId,
    settings: SettingsDep,
    questions: QuestionsDep,
    database: DatabaseDep,
    store: StoreDep,
    project: Project,
    api_key: ApiKeyPrefix,
    form: Posted,
) -> Response:
    """Create the job that makes the export."""
    given = {half: {"remove_blocks": form.get(half, "")} for half in ("prefill", "decode")}
    named = {"name": name} if (name := form.get("name", "").strip()) else {}
    submission = Submission(Response(), settings, database, project, api_key, key_of(form))
    try:
        job = await api.create_export(
            job_id, _wanted({**given, **named}), settings, questions, database, store, submission
        )
    except PDTrimError as refusal:
        counts = [int(text) if (text := at["remove_blocks"]).isdecimal() else None for at in given.values()]
        return await run_in_threadpool(_show, request, job_id, database, store, counts[0], counts[1], refusal=refusal)
    return go(f"/ui/jobs/{job.id}")


def _wanted(given: Mapping[str, object]) -> ExportSpec:
    try:
        return ExportSpec.model_validate(given)
    except ValidationError as error:
        field, reason = field_and_reason({**error.errors()[0], "loc": ("body", *error.errors()[0]["loc"])})
        raise InvalidRequest(reason, param=field) from error


def _show(
    request: Request,
    job_id: str,
    database: Database,
    store: ArtifactStore,
    prefill: int | None,
    decode: int | None,
    *,
    refusal: PDTrimError | None = None,
) -> Response:
    job, frontier = jobs.get_job(job_id, database), api.get_frontier(job_id, database, store)
    prefill = frontier.chosen.prefill.remove_blocks if prefill is None else prefill
    decode = max(prefill, frontier.chosen.decode.remove_blocks) if decode is None else decode
    cut = None
    try:
        cut = frontier.cut(prefill=prefill, decode=decode)
    except PDTrimError as impossible:
        refusal = refusal or impossible
    page = views.export_page(job, frontier, prefill, decode, cut)
    status = 200 if refusal is None else refusal.status
    return render(request, "export.html", status=status, job=job, page=page, refusal=refusal, once=uuid7().hex)
