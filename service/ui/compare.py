"""Two jobs side by side."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy import Engine as Database

from pdtrim.contract.errors import JobNotFound, PDTrimError
from pdtrim.contract.jobs import Job
from service.api import jobs as api
from service.api.deps import DatabaseDep, Project, own_job
from service.ui import views
from service.ui.pages import render
from service.ui.visits import entered

router = APIRouter(prefix="/ui/jobs", include_in_schema=False, dependencies=[Depends(entered)])

OFFERED = 50
"""Jobs to choose from, the newest."""
Chosen = Annotated[list[Annotated[str, Query(max_length=64)]], Query(max_length=OFFERED)]


@router.get("/compare")
def compare(request: Request, database: DatabaseDep, project: Project, job: Chosen = []) -> Response:  # noqa: B006
    """The figures of two jobs, or two lists to choose them from."""
    offered = api.list_jobs(database, project, {}, None, OFFERED, None).data
    chosen, refusal = _chosen(database, project, job)
    page = views.comparison_page(*chosen) if len(chosen) == 2 else None
    return render(
        request,
        "compare.html",
        status=200 if refusal is None else refusal.status,
        page=page,
        chosen=[*chosen, None, None][:2],
        offered=offered + [one for one in chosen if one.id not in {other.id for other in offered}],
        refusal=refusal,
        too_many=len(dict.fromkeys(job)) > 2,
    )


def _chosen(database: Database, project: str, ids: list[str]) -> tuple[list[Job], PDTrimError | None]:
    """The first two of the project's jobs that were asked for, and why one is missing."""
    distinct = list(dict.fromkeys(filter(None, ids)))[:2]
    try:
        return [api.get_job(own_job(job_id, database, project), database) for job_id in distinct], None
    except JobNotFound as missing:
        return [], missing
