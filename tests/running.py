"""A stage of one's choice, run in this process."""

from __future__ import annotations

from pdtrim.contract.jobs import StageName
from service.db import stages
from workers.running.attempt import Worker, run


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
