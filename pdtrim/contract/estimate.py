"""What a job would make and take, as far as that can be told without its weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.jobs import AnswerModel, StageName


class CheckpointEstimate(AnswerModel):
    """A checkpoint. Embeddings follow from the configuration, the rest is shared out evenly among the blocks.

    Where the job has a bound on perplexity, it is the smallest that may come out.
    """

    role: Literal["dense", "unified", "prefill", "decode"]
    blocks: int
    parameters: int | None = Field(description="Null where the configuration does not say what they are made of.")
    bytes: int | None
    kv_bytes_per_token: int | None = Field(description="Of the KV cache, in the checkpoint's own type.")


class SearchEstimate(AnswerModel):
    """Sets of blocks to compare, at most: greedy's, and annealing's or those of exhaustive search.

    Greedy's races compare most of its sets on some of the windows alone.
    """

    prefill: int
    decode: int
    parts: int = Field(default=0, description="For parts of kept blocks, both halves together.")
    control: int = Field(description="For the control without nesting.")


class MemoryEstimate(AnswerModel):
    """Bytes on the accelerator, at least: weights, gradients and optimiser, without activations. Null where unknown.

    The search needs less where it reads weights from disk block by block.
    """

    search: int | None
    distillation: int | None = Field(description="Null, too, where the job trains nothing.")


class EarlierJob(AnswerModel):
    """The project's newest job that succeeded on the same model. Its specification may differ."""

    job_id: str
    seconds: dict[StageName, float] = Field(
        description="What each stage took; without distillation, where that job healed nothing and this one will."
    )


class EstimateWarning(AnswerModel):
    """Something to know before the job is submitted; nothing that keeps it from running."""

    message: str
    param: str | None = Field(default=None, description="The field of the specification that it is about.")


class Estimate(AnswerModel):
    """What a job would make and take."""

    object: Literal["estimate"] = "estimate"
    architecture: str = Field(examples=["llama"])
    model_revision: str | None = Field(description="Commit that a hub revision names now.")
    dense: CheckpointEstimate
    checkpoints: list[CheckpointEstimate]
    evaluations: SearchEstimate
    memory_bytes: MemoryEstimate
    earlier: EarlierJob | None = Field(description="What is known of times.")
    warnings: list[EstimateWarning]
