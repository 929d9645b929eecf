"""The form that submits a job, and the estimate beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from uuid_utils import uuid7

from pdtrim.contract.errors import PDTrimError
from pdtrim.contract.estimate import Estimate
from pdtrim.contract.jobs import Job
from service.api import jobs as api
from service.api.deps import ApiKeyPrefix, DatabaseDep, Project, QuestionsDep, SettingsDep, own_job
from service.api.submission import Submission
from service.settings import Settings
from service.ui import forms, views
from service.ui.pages import go, render
from service.ui.presets import PRESETS
from service.ui.visits import Posted, entered

router = APIRouter(prefix="/ui/jobs", include_in_schema=False, dependencies=[Depends(entered)])

ONCE = "once"
"""The field that tells a form sent twice from two forms."""


@router.get("/new")
def show_form(
    request: Request,
    settings: SettingsDep,
    database: DatabaseDep,
    project: Project,
    of: Annotated[str, Query(max_length=64)] = "",
) -> Response:
    """The form with its defaults, or as a copy of a job, with what was wrong with that at its field."""
    if not of:
        return _show(request, forms.blank(settings.queues))
    job = api.get_job(own_job(of, database, project), database)
    errors = {} if job.error is None else {forms.place(job.error.param): [job.error.message]}
    typed = forms.begun_from(job.spec) | {"queue": job.queue}
    return _show(request, forms.filled(typed, settings.queues, errors), copied=job)


@router.post("/preset")
def use_preset(request: Request, settings: SettingsDep, form: Posted) -> Response:
    """The form as it is, with the settings of a preset."""
    typed = forms.with_settings_of(form, form.get("preset", ""))
    return _show(request, forms.filled(typed, settings.queues), typed)


@router.post("")
async def submit(
    request: Request,
    settings: SettingsDep,
    questions: QuestionsDep,
    database: DatabaseDep,
    project: Project,
    api_key: ApiKeyPrefix,
    form: Posted,
) -> Response:
    """Create the job that the form describes, or show the form with what is wrong at its fields."""
    submission = Submission(Response(), settings, database, project, api_key, key_of(form))
    try:
        spec = await questions.here.ask(partial(forms.to_spec, form))
        job = await api.create(spec, settings, questions, submission)
    except forms.Unreadable as unreadable:
        return _show(request, forms.filled(form, settings.queues, unreadable.errors), form, status=422)
    except PDTrimError as refusal:
        return _show(request, _refused(form, settings, refusal), form, status=refusal.status)
    return go(f"/ui/jobs/{job.id}")


@router.post("/estimate")
async def estimate(
    request: Request,
    settings: SettingsDep,
    questions: QuestionsDep,
    database: DatabaseDep,
    project: Project,
    form: Posted,
) -> Response:
    """The form with the estimate beside it; to a script, the estimate alone."""
    found: Estimate | None = None
    try:
        spec = await questions.here.ask(partial(forms.to_spec, form))
        found = await api.foresee(spec, settings, questions, database, project)
        shown = forms.filled(form, settings.queues)
    except forms.Unreadable as unreadable:
        shown = forms.filled(form, settings.queues, unreadable.errors)
    except PDTrimError as refusal:
        shown = _refused(form, settings, refusal)
    if request.headers.get("Accept") == views.FRAGMENT:
        return render(request, "estimate.html", form=shown, estimate=views.estimate(found), copied=None)
    return _show(request, shown, form, estimate=found)


def key_of(form: Mapping[str, str]) -> str | None:
    """An idempotency key: the same for the same form sent again, another once something in it is changed."""
    once = form.get(ONCE)
    if not once:
        return None
    said = "\n".join(f"{name}={value}" for name, value in sorted(form.items()))
    return f"ui-{hashlib.sha256(said.encode('utf-8', 'replace')).hexdigest()}"


def _refused(form: Mapping[str, str], settings: Settings, refusal: PDTrimError) -> forms.Form:
    errors: dict[str, list[str]] = {}
    for one in (refusal, *refusal.others):
        errors.setdefault(forms.place(one.param), []).append(one.message)
    return forms.filled(form, settings.queues, errors)


def _show(
    request: Request,
    form: forms.Form,
    typed: Mapping[str, str] | None = None,
    *,
    status: int = 200,
    estimate: Estimate | None = None,
    copied: Job | None = None,
) -> Response:
    return render(
        request,
        "submit.html",
        status=status,
        form=form,
        presets=PRESETS,
        once=(typed or {}).get(ONCE) or uuid7().hex,
        estimate=views.estimate(estimate),
        copied=copied,
    )
