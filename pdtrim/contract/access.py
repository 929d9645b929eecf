"""Who may do what, and how much of it: API keys, their scopes, projects, rates and quotas."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from pdtrim.contract.jobs import AnswerModel

DEFAULT_PROJECT = "default"
PROJECT_PATTERN = "^[a-z0-9][a-z0-9._-]{0,63}$"
ProjectName = Annotated[str, StringConstraints(pattern=PROJECT_PATTERN)]
UNLIMITED = "none"
RATE_PATTERN = f"^({UNLIMITED}|[1-9][0-9]{{0,8}}/(second|minute|hour|day))$"
Rate = Annotated[str, StringConstraints(pattern=RATE_PATTERN)]
"""So many requests in any such time, `600/minute`; or `none`, for as many as one likes."""


class Scope(StrEnum):
    """What a key allows in its project: look, change, or everything."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


class Quotas(AnswerModel):
    """How much there may be at once; None is any amount."""

    max_running_jobs: int | None = Field(default=None, ge=1)
    max_queued_jobs: int | None = Field(default=None, ge=1)
    max_artifact_bytes: int | None = Field(default=None, ge=1)


class KeyInfo(Quotas):
    """An API key without its secret. `prefix` is its part that is no secret.

    Its quotas count the jobs that were made with it. Without a rate of its own it has the service's.
    """

    prefix: str
    name: str
    project: ProjectName
    scopes: list[Scope] = Field(min_length=1)
    rate_limit: Rate | None = None
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewKey(KeyInfo):
    """A key just made, with what is never shown again."""

    key: str
