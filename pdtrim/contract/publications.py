"""What a finished job is handed on to, as the HTTP interface shows it."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

from pydantic import Field

from pdtrim.contract.jobs import AnswerModel


class PublicationTarget(StrEnum):
    """Where a job's results go."""

    MLFLOW = "mlflow"
    HUB = "hub"


class PublicationStatus(StrEnum):
    """Life of a publication: `pending` until the job has succeeded and the target has taken it."""

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


class Publication(AnswerModel):
    """A job's results on their way to a target. Whatever becomes of it, the job has succeeded."""

    object: Literal["publication"] = "publication"
    target: PublicationTarget
    status: PublicationStatus
    attempt: int = Field(description="How often it was tried.")
    error: str = Field(default="", description="Why the last attempt failed.")
    urls: list[str] = Field(default=[], description="Where it can be seen.")
    next_attempt_at: datetime | None = Field(default=None, description="When it is tried next, if it is.")
    updated_at: datetime
