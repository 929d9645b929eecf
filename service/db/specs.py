"""The specifications that rows hold. A job of an earlier version may have asked for what is offered no longer."""

from __future__ import annotations

from pdtrim.contract.spec import JobSpec
from service.db.tables import JobRow

REPLACED_ALGORITHMS = {"lazy_greedy": "greedy"}
"""A search algorithm of earlier versions → the one that took its place, whose sets cost no more."""
SERVED_THEN = {"first_token": "prefill"}
"""How earlier versions, whose jobs say nothing of serving, searched, healed and measured every pair."""
CALIBRATED_THEN = {"copying": 0.0}
"""Earlier versions compared removals on running text alone."""


def spec_of(job: JobRow) -> JobSpec:
    """The specification of a job, without what is offered no longer, or with what took its place.

    What could not be asked for yet is as it was then.
    """
    search, distillation = (dict(job.spec.get(part, {})) for part in ("search", "distillation"))
    search.pop("parallelism", None)  # Workers that helped the search; its plan was the same without them.
    distillation.pop("merge_tokens", None)  # Merges that were fitted before the search, which then weighed them.
    if (algorithm := search.get("algorithm")) in REPLACED_ALGORITHMS:
        search["algorithm"] = REPLACED_ALGORITHMS[algorithm]
    asked = {
        "search": search,
        "distillation": distillation,
        "serving": job.spec.get("serving", SERVED_THEN),
        "calibration": CALIBRATED_THEN | job.spec.get("calibration", {}),
    }
    return JobSpec.model_validate(job.spec | asked)
