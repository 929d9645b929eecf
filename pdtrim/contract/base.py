"""What every part of a job specification is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

NO_NUL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}
"""What JSON Schema can say of `storable`."""


def storable(value: str) -> str:
    """The text itself, if it can be stored. Raises: ValueError."""
    if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("text may contain neither NUL nor lone surrogates, which PostgreSQL and UTF-8 cannot store")
    return value


class SpecModel(BaseModel):
    """Base of everything a user writes: unknown fields are errors and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
