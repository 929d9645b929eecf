"""A job's specification as it came with a request, read where that holds up nobody.

FastAPI reads bodies between two looks at all other requests; the YAML of a long specification takes a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, core_schema

from pdtrim.contract.spec import JobSpec


@dataclass(frozen=True)
class SentSpec:
    """What JSON said; documented as what it is to be, a JobSpec."""

    content: Any

    def read(self) -> JobSpec:
        """The specification. Raises: RequestValidationError."""
        try:
            return JobSpec.model_validate(self.content)
        except ValidationError as error:
            found = error.errors(include_url=False)
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in found]) from error

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_wrap_validator_function(
            lambda content, read_now: cls(content), handler.generate_schema(JobSpec)
        )
