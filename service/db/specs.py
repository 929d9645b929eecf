"""The specifications that rows hold. A job of an earlier version may have asked for what is offered no longer."""

from __future__ import annotations

from pdtrim.contract.spec import JobSpec
from service.db.tables import JobRow

REPLACED_ALGORITHMS = {"lazy_greedy": "greedy"}
"""A search algorithm of earlier versions → the one that took its place, whose sets cost no more."""


MERGE_TOKENS = "merge_tokens"
"""What `distillation` gave to merges that were fitted before the search, which is no longer done."""


def spec_of(job: JobRow) -> JobSpec:
    """The specification of a job, without what is offered no longer, or with what took its place."""
    content = dict(job.spec)
    if search := content.get("search"):
        algorithm = search["algorithm"]
        content["search"] = search | {"algorithm": REPLACED_ALGORITHMS.get(algorithm, algorithm)}
    if distillation := content.get("distillation"):
        kept = {name: value for name, value in distillation.items() if name != MERGE_TOKENS}
        content["distillation"] = kept
    return JobSpec.model_validate(content)
