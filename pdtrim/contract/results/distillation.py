"""What distillation finds: whether training the checkpoints helped."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.results.base import Half, Result, Way

Kept = Literal["distilled", "undistilled"]


class FittedMerge(Result):
    """A merge of the plan, and the held-out loss before and after its fit."""

    into: int = Field(description="The kept block that stands for both.")
    before: float
    after: float
    kept: Kept


class HowHealed(Result):
    """How healing fitted the worker's memory."""

    devices: int = Field(default=1, description="Over which models, gradients and moments were sharded.")
    precision: Literal["float32", "bfloat16"] = Field(description="Of the weights in training.")
    moments: Literal["float32", "8-bit"] = Field(description="AdamW's two, of each trained number.")
    gradient_checkpointing: bool = Field(description="Whether blocks were computed again, asked for or not.")
    gradient_accumulation: int = Field(description="Parts that a batch was computed in, as asked or more.")
    needed_bytes: int = Field(description="Memory that this takes, of each device, by the worker's arithmetic.")
    targets: Literal["computed", "kept"] = Field(
        default="computed",
        description="Whether the dense model was at hand in training, or what it says of the windows was computed "
        "ahead and kept on disk.",
    )
    target_bytes: int = Field(default=0, description="Of these on disk.")
    way: Way = Field(
        default="resident",
        description="Whether the models were `resident`, in the device's memory, or `streamed`, their blocks read from "
        "disk for every step.",
    )


class Healing(Result):
    """A half's held-out loss before and after training, and which weights are kept by it."""

    before: float
    after: float
    steps: int
    kept: Kept
    how: HowHealed | None = Field(default=None, description="Null for jobs of versions that healed in one way.")


class FoldedGap(Result):
    """A run of blocks that a half is without, and what the fold before it makes up for.

    Errors are the squared distance of the hidden states behind it from the dense model's, as a share of these.
    """

    first: int
    last: int
    error_before: float
    error_after: float


class UnfoldedGap(Result):
    """A run of blocks that a half is without, and why no fold makes up for it."""

    first: int
    last: int
    reason: str


class Folding(Result):
    """What a half's gaps came to without training: linear maps, folded into the MLPs before them."""

    kept: Literal["folded", "unfolded"] = Field(description="By the held-out loss, where there was anything to fold.")
    before: float | None = Field(
        default=None,
        description="Healing's held-out loss without, which here counts some prompts that are said again, too; null "
        "where nothing was folded.",
    )
    after: float | None = Field(default=None, description="The same with all folds; healing goes on from the lower.")
    tokens: int = Field(default=0, description="That the maps were fitted on.")
    gaps: list[FoldedGap] = Field(default_factory=list)
    left_out: list[UnfoldedGap] = Field(default_factory=list)


class OwnAnswers(Result):
    """What healing trained on where that is what the dense model says itself."""

    prompts: int
    answers: int = Field(description="More than there are prompts where some were answered again, and otherwise.")
    tokens: int = Field(description="Of the answers alone.")


class DistillationResult(Result):
    """What the distillation stage found."""

    enabled: bool
    merged: dict[int, FittedMerge] = Field(
        default_factory=dict, description="The plan's merges by removed block, of versions that fitted them."
    )
    prefill: Healing | None = Field(default=None, description="Null where there was nothing to train.")
    decode: Healing | None = None
    folds: dict[Half, Folding] = Field(default_factory=dict, description="Of each half that has gaps, if asked for.")
    answers: OwnAnswers | None = Field(default=None, description="Null where healing trained on the data as given.")

    @property
    def healed(self) -> bool:
        """Whether anything was trained."""
        return self.prefill is not None or self.decode is not None
