"""What a job would make and take, as far as that can be told without its weights."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pdtrim.contract.devices import Device
from pdtrim.contract.jobs import AnswerModel, StageName


class CheckpointEstimate(AnswerModel):
    """A checkpoint. Where blocks differ in size, each that goes counts as one of the mean.

    Where the job has a bound on perplexity, it is the smallest that may come out.
    """

    role: Literal["dense", "unified", "prefill", "decode"]
    blocks: int
    parameters: int | None = Field(description="Null where the configuration does not say what they are made of.")
    bytes: int | None
    kv_bytes_per_token: int | None = Field(
        description="What the KV cache keeps of a token, in the checkpoint's type, until a window lets go of it."
    )


class SetRange(AnswerModel):
    """How many sets a search compares; `least` and `most` are the same where that follows from the job alone."""

    least: int
    most: int


class SearchEstimate(AnswerModel):
    """Sets of blocks to compare, at most: greedy's, and annealing's or those of exhaustive search.

    Greedy's races compare most of its sets on some of the windows alone.
    """

    prefill: int
    decode: int
    parts: int = Field(default=0, description="For parts of kept blocks, both halves together.")
    ranges: dict[str, SetRange] = Field(
        default_factory=dict,
        description="Of each search by its name. Annealing compares fewer than `most` where it has asked for every "
        "swap around its best set before its budget is spent.",
    )


class MemoryEstimate(AnswerModel):
    """Bytes on the device at the peak of the search and of distillation, as in `stages`. Null where unknown."""

    search: int | None
    distillation: int | None = Field(description="Null, too, where the job trains nothing.")


class StageEstimate(AnswerModel):
    """What a stage takes, and how it will run."""

    stage: StageName
    way: str = Field(
        description="How it fits the device: `resident`, `sharded over 8 devices`, `block by block`, or healing's way.",
        examples=["bfloat16, moments of 8 bits, blocks computed again"],
    )
    memory_bytes: int = Field(description="Of the device, or the fullest of several, at the peak; on a CPU resident.")
    host_bytes: int = Field(description="Of the machine's memory, at the peak.")
    fits: bool = Field(description="Whether a worker of the job's queue has as much.")
    flops: float = Field(description="Operations, two for a multiplication and addition.")
    seconds: float | None = Field(
        description="By the speed that the worker measured when it started, or by the earlier job, times how much more "
        "this one computes. Null where neither is known."
    )


class EarlierJob(AnswerModel):
    """The project's newest job that succeeded on the same model."""

    job_id: str
    seconds: dict[StageName, float] = Field(
        description="What each stage would take by it: its seconds, times the operations that this job has more. "
        "Without distillation, where that job healed nothing and this one will."
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
    stages: list[StageEstimate] = Field(default_factory=list, description="Empty where the model's shape is unknown.")
    device: Device | None = Field(
        default=None,
        description="Of the worker that `stages` is said of; null where none has started, and one GPU of 80 GB is "
        "assumed.",
    )
    disk_bytes: int | None = Field(default=None, description="On the worker's scratch disk, at most at one time.")
    store_bytes: int | None = Field(default=None, description="In the artifact store, once the job has succeeded.")
    store_peak_bytes: int | None = Field(default=None, description="The same while healing saves its state.")
    queue: str | None = Field(default=None, description="Where the job goes: to workers that have room for it.")
    earlier: EarlierJob | None = Field(description="What is known of times.")
    warnings: list[EstimateWarning]
