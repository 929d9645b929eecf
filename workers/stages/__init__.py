"""The stages of a job: each reads artifacts, writes artifacts and returns what it found."""

from __future__ import annotations

from collections.abc import Callable

from pdtrim.contract.jobs import StageName
from pdtrim.contract.results import Result
from workers.stages import cutting, distillation, evaluation, export, removal, scoring
from workers.stages.context import StageContext

STAGES: dict[StageName, Callable[[StageContext], Result]] = {
    StageName.SCORING: scoring.run,
    StageName.REMOVAL: removal.run,
    StageName.DISTILLATION: distillation.run,
    StageName.EXPORT: export.run,
    StageName.EVALUATION: evaluation.run,
}

TAKEN_OVER: dict[StageName, Callable[[StageContext], Result]] = {
    StageName.SCORING: cutting.take_scores,
    StageName.REMOVAL: cutting.cut,
}
"""What runs in place of stages where a job was cut from another, which ran them."""
