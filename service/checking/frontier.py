"""A job's frontier, read from where its removal stage left it."""

from __future__ import annotations

from sqlalchemy import Engine as Database

from pdtrim.contract.errors import NoFrontier
from pdtrim.contract.frontier import Frontier
from pdtrim.contract.jobs import StageName, StageStatus
from pdtrim.contract.results import PLAN, Plan
from service.db import artifacts, jobs
from service.db.session import transaction
from service.storage import ArtifactStore


def read_frontier(database: Database, store: ArtifactStore, job_id: str) -> Frontier:
    """The job's frontier. Raises: JobNotFound, NoFrontier, ObjectNotFound, StoreUnavailable."""
    with transaction(database) as session:
        jobs.get(session, job_id)
        plan = artifacts.named(session, job_id, StageName.REMOVAL, PLAN)
        removal = next(row for row in jobs.stages(session, [job_id])[job_id] if row.name == StageName.REMOVAL)
    if plan is None:
        status = StageStatus(removal.status)
        raise NoFrontier(
            f"Job {job_id} has no frontier yet: its stage removal, which searches it, is {status}. "
            "GET /v1/jobs/{id}/events says how far it is."
        )
    return Frontier.from_plan(job_id, Plan.model_validate_json(store.get_bytes(plan.key)))
