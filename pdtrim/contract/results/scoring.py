"""What scoring finds: how redundant each block is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.results.base import Result

SCORES = "scores.json"
"""The artifact that holds `BlockScores`."""


class WindowCounts(Result):
    """How many token windows the text was cut into, by what they are for."""

    train: int
    calibration: int
    validation: int


class ComputePrecision(Result):
    """What search and healing compute in, and what that was decided by."""

    used: Literal["float32", "bfloat16"]
    windows: int = Field(default=0, description="Calibration windows that both were compared on; 0: no need.")
    float32_loss: float | None = Field(default=None, description="The dense model's mean loss on them, in nats.")
    bfloat16_loss: float | None = None


class ScoringResult(Result):
    """What the scoring stage found."""

    blocks: int = Field(description="Blocks of the dense model.")
    cosine: list[float] = Field(
        description="For each block the mean cosine of what enters and leaves it: the higher, the more redundant it is."
    )
    windows: WindowCounts
    opening: list[str] = Field(
        default_factory=list,
        description="Special tokens that every window begins with, as the model's tokenizer begins a text.",
    )
    warnings: list[str] = Field(
        default_factory=list, description="Where the data had less than was asked for, one sentence each."
    )
    precision: ComputePrecision | None = Field(
        default=None, description="Null for jobs of versions that computed in float32 on every CPU."
    )


class BlockScores(Result):
    """The content of `scores.json`."""

    cosine: list[float]
    merge_errors: list[tuple[int, int, float]]
    """Removed block, neighbour, and the error at which the neighbour starts to stand for both."""
    opening: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    precision: ComputePrecision | None = None
