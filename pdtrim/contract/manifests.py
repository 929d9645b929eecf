"""What a job's manifests can be asked for."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Runtime(StrEnum):
    """What serves a pair: vLLM in every case, put up by one of these."""

    COMPOSE = "compose"
    VLLM = "vllm"
    LLM_D = "llm-d"
    DYNAMO = "dynamo"
    KSERVE = "kserve"


class ManifestOptions(BaseModel):
    """What manifests are for. Sizes that are left out follow from the model."""

    model_config = ConfigDict(extra="forbid")

    runtime: Runtime = Field(description="`vllm` is plain Kubernetes.")
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="What the serving engines compute on.")
    sequences: int = Field(default=8, ge=1, le=4096, description="Sequences that an engine serves at once.")
    tokens: int | None = Field(
        default=None, ge=16, le=1 << 24, description="Longest sequence; by default what the model can do, up to 8,192."
    )
    image: str | None = Field(
        default=None,
        min_length=1,
        max_length=512,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]*$",
        description="Image with vLLM and pdtrim-vllm; by default the one that `docker/vllm.Dockerfile` makes.",
    )
