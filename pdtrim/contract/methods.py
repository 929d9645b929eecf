"""The pruning methods on offer, each with its parameters as JSON Schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from pdtrim.contract.spec import JobSpec


class Method(BaseModel):
    """A pruning method."""

    object: Literal["method"] = "method"
    name: str = Field(examples=["pdtrim"])
    summary: str
    paper: str = Field(description="Where the method is published.")
    parameters: dict[str, Any] = Field(description="JSON Schema of what `POST /v1/jobs` takes for this method.")


def methods() -> list[Method]:
    """Every method, by name."""
    return [
        Method(
            name="pdtrim",
            summary="Removes transformer blocks for the prefill and the decode stage of disaggregated serving: blocks "
            "are scored by the cosine of what enters and leaves them, a search on calibration text finds the sets to "
            "remove with prefill's set inside decode's, redundant blocks are deleted, others distilled into a "
            "neighbour, and the result is healed on the dense model's predictions.",
            paper="Zhang et al., PDTrim, ACL 2026, https://arxiv.org/abs/2509.04467",
            parameters=JobSpec.model_json_schema(),
        )
    ]
