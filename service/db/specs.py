"""The specifications that rows hold. A job of an earlier version may have asked for what is offered no longer."""

from __future__ import annotations

from pdtrim.contract.spec import JobSpec
from service.db.tables import JobRow

REPLACED_ALGORITHMS = {"lazy_greedy": "greedy"}
"""A search algorithm of earlier versions → the one that took its place, whose sets cost no more."""


def spec_of(job: JobRow) -> JobSpec:
    """The specification of a job, with what took the place of what is offered no longer."""
    search = job.spec.get("search", {})
    algorithm = search.get("algorithm")
    if algorithm not in REPLACED_ALGORITHMS:
        return JobSpec.model_validate(job.spec)
    return JobSpec.model_validate(job.spec | {"search": search | {"algorithm": REPLACED_ALGORITHMS[algorithm]}})
