"""What every part of a job specification is made of."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

NO_NUL: dict[str, Any] = {"pattern": r"^[^\x00]*$"}
"""What JSON Schema can say of `storable`."""


def storable(value: str) -> str:
    """The text itself, if it can be stored. Raises: ValueError."""
    if "\x00" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("text may contain neither NUL nor lone surrogates, which PostgreSQL and UTF-8 cannot store")
    return value


def named_freely(schema: dict[str, Any]) -> None:
    """Say of an object all of whose names have a pattern what pydantic says by `patternProperties`.

    Generators of clients know no patterns of names: where nothing else may be in the object, they would send it empty.
    """
    ((pattern, value),) = schema.pop("patternProperties").items()
    schema |= {"propertyNames": {"pattern": pattern}, "additionalProperties": value}


class WrittenAsItIs:
    """Annotates a type whose valid values are written without a look at what they might be otherwise.

    Members of a union are tried one after the other, each failure an exception that is made and thrown away; of ten
    thousand questions that is a good part of the time in which a process does nothing else.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return {**handler(source), "serialization": core_schema.simple_ser_schema("any")}


class SpecModel(BaseModel):
    """Base of everything a user writes: unknown fields are errors and values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True)
