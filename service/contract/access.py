"""Who may do what: API keys, their scopes and their projects."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field, StringConstraints

from service.contract.jobs import Shown

DEFAULT_PROJECT = "default"
PROJECT_PATTERN = "^[a-z0-9][a-z0-9._-]{0,63}$"
ProjectName = Annotated[str, StringConstraints(pattern=PROJECT_PATTERN)]


class Scope(StrEnum):
    """What a key allows in its project: look, change, or everything."""

    READ = "read"
    SUBMIT = "submit"
    ADMIN = "admin"


class KeyInfo(Shown):
    """An API key without its secret. `prefix` is its part that is no secret."""

    prefix: str
    name: str
    project: ProjectName
    scopes: list[Scope] = Field(min_length=1)
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


class NewKey(KeyInfo):
    """A key just made, with what is never shown again."""

    key: str
