"""Workers in this process: one that is told which stage to run, and one that Celery runs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
from celery.contrib.testing.worker import start_worker

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from service.db import stages
from service.settings import Settings
from tests.found import RESULTS
from tests.observing import logged
from workers.running.attempt import Worker, run
from workers.stages import STAGES
from workers.stages.context import StageContext


def run_stage(worker: Worker, job_id: str, stage: StageName) -> None:
    """Run a stage if it is there to be taken, whatever is more urgent."""
    claim = worker.transact(
        lambda session: stages.claim(
            session,
            job_id,
            stage,
            worker=worker.name,
            lease_seconds=worker.settings.lease_seconds,
            deadline_seconds=worker.settings.stage_deadline_seconds,
            max_running_jobs=worker.settings.max_running_jobs,
        )
    )
    if claim is not None:
        run(worker, claim)


def small(context: StageContext) -> Result:
    """A stage that does next to nothing."""
    found = RESULTS[StageName.SCORING]
    context.write_json("a.json", found)
    return found


def tasks_of(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tasks' module, read anew with this test's environment."""
    monkeypatch.delitem(sys.modules, "workers.tasks", raising=False)
    tasks = importlib.import_module("workers.tasks")
    monkeypatch.delitem(sys.modules, "workers.tasks")
    return tasks


@contextmanager
def working(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Celery worker of the queue `default` in a thread of this process, whose stages are `small`."""
    for stage in StageName:
        monkeypatch.setitem(STAGES, stage, small)
    app = tasks_of(monkeypatch).app
    with logged(settings), start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=20):
        yield
