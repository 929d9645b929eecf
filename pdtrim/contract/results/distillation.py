"""What distillation finds: whether training the checkpoints helped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.results.base import Result

Kept = Literal["distilled", "undistilled"]


class FittedMerge(Result):
    """A merge of the plan, and the held-out loss before and after its fit."""

    into: int = Field(description="The kept block that stands for both.")
    before: float
    after: float
    kept: Kept


class Healing(Result):
    """A half's held-out loss before and after training, and which weights are kept by it."""

    before: float
    after: float
    steps: int
    kept: Kept


class DistillationResult(Result):
    """What the distillation stage found."""

    enabled: bool
    merged: dict[int, FittedMerge] = Field(
        default_factory=dict, description="The plan's merges by removed block, of versions that fitted them."
    )
    prefill: Healing | None = Field(default=None, description="Null where there was nothing to train.")
    decode: Healing | None = None

    @property
    def healed(self) -> bool:
        """Whether anything was trained."""
        return self.prefill is not None or self.decode is not None
