"""Jobs, stages, events and artifacts as the HTTP interface shows them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from pdtrim.contract.queues import DEFAULT_QUEUE
from pdtrim.contract.results import (
    DistillationResult,
    EvaluationResult,
    ExportResult,
    RemovalResult,
    Result,
    ScoringResult,
)
from pdtrim.contract.spec import JobSpec

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Result)


class Action(StrEnum):
    """What can be asked of a job that exists."""

    PAUSE = "pause"
    RESUME = "resume"
    CANCEL = "cancel"
    DELETE = "delete"


class JobStatus(StrEnum):
    """Life of a job. `succeeded`, `failed` and `cancelled` are final, but for a resume of the last two."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"
    SUCCEEDED = "succeeded"

    @property
    def final(self) -> bool:
        return self in (JobStatus.CANCELLED, JobStatus.FAILED, JobStatus.SUCCEEDED)

    @property
    def possible(self) -> tuple[Action, ...]:
        """What changes a job in this state; all else is refused, or already done."""
        return _POSSIBLE[self]


_POSSIBLE: Mapping[JobStatus, tuple[Action, ...]] = {
    JobStatus.QUEUED: (Action.PAUSE, Action.CANCEL),
    JobStatus.RUNNING: (Action.PAUSE, Action.CANCEL),
    JobStatus.PAUSING: (Action.CANCEL,),
    JobStatus.PAUSED: (Action.RESUME, Action.CANCEL, Action.DELETE),
    JobStatus.CANCELLING: (),
    JobStatus.CANCELLED: (Action.RESUME, Action.DELETE),
    JobStatus.FAILED: (Action.RESUME, Action.DELETE),
    JobStatus.SUCCEEDED: (Action.DELETE,),
}


class StageName(StrEnum):
    """The stages of a job, in their order."""

    SCORING = "scoring"
    REMOVAL = "removal"
    DISTILLATION = "distillation"
    EXPORT = "export"
    EVALUATION = "evaluation"


class StageStatus(StrEnum):
    """Life of a stage: `pending` waits for the stage before it, `queued` for a worker, `paused` for a resume."""

    PENDING = "pending"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AnswerModel(BaseModel):
    """Base of what the interface shows; filled from database rows."""

    model_config = ConfigDict(from_attributes=True)


class ErrorInfo(AnswerModel):
    """Why a job or stage failed."""

    code: str = Field(examples=["model_unsupported"])
    message: str
    param: str | None = Field(default=None, description="The field of the specification at fault, if one is.")


class Stage(AnswerModel):
    """One stage of a job, with what it found. Each stage has a class of its own, which says what that is."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)

    name: StageName
    status: StageStatus
    progress: float = Field(ge=0.0, le=1.0)
    message: str = Field(default="", description="What the stage is doing now.")
    attempt: int = Field(description="How often a worker has claimed it; also the fencing number of its lease.")
    worker: str | None = Field(default=None, description="The worker that runs it, or ran it last.")
    metrics: Result | None = Field(default=None, description="What it found; null until it has succeeded.")
    error: ErrorInfo | None = None
    started_at: datetime | None = Field(
        default=None, description="When it began. A resume moves it on by as long as the stage lay still."
    )
    finished_at: datetime | None = None

    @field_validator("metrics", mode="wrap")
    @classmethod
    def _read(cls, recorded: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """What was recorded, also by an earlier version, in whose rows an unfinished stage has `{}`.

        A job stays readable without a result that is not.
        """
        if recorded is None or recorded == {}:
            return None
        try:
            return read(recorded)
        except ValidationError as error:
            log.warning("what the stage %s found cannot be read, and is left out: %s", info.data.get("name"), error)
            return None


class ScoringStage(Stage):
    """How redundant each block is."""

    name: Literal[StageName.SCORING]
    metrics: ScoringResult | None = None


class RemovalStage(Stage):
    """What each half gives up."""

    name: Literal[StageName.REMOVAL]
    metrics: RemovalResult | None = None


class DistillationStage(Stage):
    """Whether training the checkpoints helped."""

    name: Literal[StageName.DISTILLATION]
    metrics: DistillationResult | None = None


class ExportStage(Stage):
    """The checkpoints that were written and proved."""

    name: Literal[StageName.EXPORT]
    metrics: ExportResult | None = None


class EvaluationStage(Stage):
    """What the checkpoints are worth and what they cost."""

    name: Literal[StageName.EVALUATION]
    metrics: EvaluationResult | None = None


AnyStage = Annotated[
    ScoringStage | RemovalStage | DistillationStage | ExportStage | EvaluationStage, Field(discriminator="name")
]

RESULTS: Mapping[StageName, type[Result]] = {
    StageName.SCORING: ScoringResult,
    StageName.REMOVAL: RemovalResult,
    StageName.DISTILLATION: DistillationResult,
    StageName.EXPORT: ExportResult,
    StageName.EVALUATION: EvaluationResult,
}
"""What each stage finds."""


class Job(AnswerModel):
    """A job with its stages."""

    object: Literal["job"] = "job"
    id: str = Field(examples=["job_0198a3f25e0e7c52b3a0d1f3b6a4c7de"])
    status: JobStatus
    spec: JobSpec
    queue: str = Field(default=DEFAULT_QUEUE, description="Where it waits for workers.")
    metadata: dict[str, str]
    cut_from: str | None = Field(default=None, description="Job from whose frontier it was cut.")
    stages: list[AnyStage]
    error: ErrorInfo | None = None
    model_revision: str | None = Field(default=None, description="Commit that a hub revision resolved to.")
    versions: dict[str, str] = Field(default_factory=dict, description="Library versions the workers computed with.")
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    estimated_finish: datetime | None = Field(
        default=None, description="Extrapolated from the running stage's progress; null until there is any."
    )

    @property
    def title(self) -> str:
        """Its name, or else its model."""
        return self.spec.name or self.spec.model.source

    def result(self, kind: type[R]) -> R | None:
        """What the stage found whose result is of this kind, such as `EvaluationResult`; None until it has."""
        return next((stage.metrics for stage in self.stages if isinstance(stage.metrics, kind)), None)


class Event(AnswerModel):
    """Something that happened in a job. `number` counts from 1 within the job without gaps."""

    object: Literal["event"] = "event"
    number: int = Field(ge=1)
    type: str = Field(examples=["stage.progress"])
    stage: StageName | None = None
    message: str
    data: dict[str, JsonValue] = Field(default_factory=dict)
    created_at: datetime

    @property
    def progress(self) -> float | None:
        """How much of its stage was done then, from 0 to 1, where the event says so."""
        done = self.data.get("progress")
        return float(done) if isinstance(done, int | float) else None


class Artifact(AnswerModel):
    """A file that a stage left in the artifact store."""

    object: Literal["artifact"] = "artifact"
    id: str = Field(examples=["art_0198a3f2a3b07d61"])
    stage: StageName
    name: str = Field(description="Path within the stage.", examples=["decode/model.safetensors"])
    uri: str
    size: int = Field(ge=0, description="Bytes.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created_at: datetime


Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """One page of a list, in the order of OpenAI's list objects."""

    object: Literal["list"] = "list"
    data: list[Item]
    has_more: bool
    first_id: str | None = None
    last_id: str | None = Field(default=None, description="Pass as `after` to read on.")
