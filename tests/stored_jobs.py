"""Jobs put into a database without a gateway."""

from __future__ import annotations

from sqlmodel import Session

from pdtrim.contract.access import DEFAULT_PROJECT, Quotas
from pdtrim.contract.queues import DEFAULT_QUEUE
from pdtrim.contract.spec import JobSpec
from service.db import jobs, quotas
from service.db.tables import JobRow


def store_job(
    session: Session,
    spec: JobSpec,
    *,
    project: str = DEFAULT_PROJECT,
    api_key: str | None = None,
    limits: Quotas = quotas.NONE,
    model_revision: str | None = None,
    cut_from: str | None = None,
) -> JobRow:
    """Insert a job as a submission does, and return its row. Raises: as `jobs.insert_new`."""
    job, _, _ = jobs.insert_new(
        session,
        spec,
        project=project,
        api_key=api_key,
        limits=limits,
        model_revision=model_revision,
        cut_from=cut_from,
        default_queue=DEFAULT_QUEUE,
    )
    return session.get_one(JobRow, job.id)
