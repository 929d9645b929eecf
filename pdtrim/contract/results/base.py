"""What every part of a result is made of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

Half = Literal["prefill", "decode"]
"""The two phases of serving a request. A checkpoint for both is called unified."""
Way = Literal["resident", "streamed"]
"""How a worker held the models of a stage: in its device's memory, or reading their blocks from disk one at a time."""
T = TypeVar("T")


class Result(BaseModel):
    """Base of results and their parts. A default stands for what an earlier version did not record.

    Whoever writes a result writes every field, so that the schema calls them all required.
    """

    model_config = ConfigDict(frozen=True, json_schema_serialization_defaults_required=True)


class Halves(Result, Generic[T]):
    """The same of each half."""

    prefill: T
    decode: T

    def of(self, half: Half) -> T:
        """One half's."""
        return self.prefill if half == "prefill" else self.decode

    def items(self) -> Iterator[tuple[Half, T]]:
        """Each half and its own, prefill first."""
        yield "prefill", self.prefill
        yield "decode", self.decode
