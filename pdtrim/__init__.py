"""PDTrim from programs and the shell: `Client` and `AsyncClient`, what crosses to the service, and how it is shown.

`from pdtrim import Client, JobSpec` is all that most programs need. Nothing here needs the service or torch. What is
named below is imported when it is asked for, so that its parts can be had without the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pdtrim.client import (
        AnswerLost,
        AsyncClient,
        AsyncClientJob,
        Client,
        ClientError,
        ClientJob,
        CorruptDownload,
        JobFailed,
        NothingToDownload,
        ServiceError,
        ServiceUnreachable,
        UnexpectedAnswer,
        UnsafeName,
    )
    from pdtrim.contract.errors import PDTrimError
    from pdtrim.contract.estimate import Estimate
    from pdtrim.contract.frontier import Frontier
    from pdtrim.contract.jobs import Artifact, Event, Job, JobStatus, Stage, StageName, StageStatus
    from pdtrim.contract.results import (
        DistillationResult,
        EvaluationResult,
        ExportResult,
        RemovalResult,
        ScoringResult,
    )
    from pdtrim.contract.spec import JobSpec

_HOMES = {
    "pdtrim.client": (
        "AnswerLost",
        "AsyncClient",
        "AsyncClientJob",
        "Client",
        "ClientError",
        "ClientJob",
        "CorruptDownload",
        "JobFailed",
        "NothingToDownload",
        "ServiceError",
        "ServiceUnreachable",
        "UnexpectedAnswer",
        "UnsafeName",
    ),
    "pdtrim.contract.errors": ("PDTrimError",),
    "pdtrim.contract.estimate": ("Estimate",),
    "pdtrim.contract.frontier": ("Frontier",),
    "pdtrim.contract.jobs": ("Artifact", "Event", "Job", "JobStatus", "Stage", "StageName", "StageStatus"),
    "pdtrim.contract.results": (
        "DistillationResult",
        "EvaluationResult",
        "ExportResult",
        "RemovalResult",
        "ScoringResult",
    ),
    "pdtrim.contract.spec": ("JobSpec",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AnswerLost",
    "Artifact",
    "AsyncClient",
    "AsyncClientJob",
    "Client",
    "ClientError",
    "ClientJob",
    "CorruptDownload",
    "DistillationResult",
    "Estimate",
    "EvaluationResult",
    "Event",
    "ExportResult",
    "Frontier",
    "Job",
    "JobFailed",
    "JobSpec",
    "JobStatus",
    "NothingToDownload",
    "PDTrimError",
    "RemovalResult",
    "ScoringResult",
    "ServiceError",
    "ServiceUnreachable",
    "Stage",
    "StageName",
    "StageStatus",
    "UnexpectedAnswer",
    "UnsafeName",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pdtrim' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
