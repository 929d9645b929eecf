"""What a job's stages recorded, as its report and its model cards read it. Nothing here is measured again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pdtrim.contract.results import BlockScores, EvaluationResult, Half, ModelFigures, Plan, SearchRecord
from pdtrim.contract.spec import JobSpec
from pdtrim.display.tables import Table, evaluation_tables

HALVES: tuple[Half, ...] = ("prefill", "decode")
ROLES = (*HALVES, "unified")


@dataclass(frozen=True)
class Findings:
    """A job, and the content of the JSON artifacts that scoring, removal and evaluation wrote."""

    job_id: str
    spec: JobSpec
    model_revision: str | None
    scores: BlockScores
    plan: Plan
    search: SearchRecord
    evaluation: EvaluationResult
    versions: Mapping[str, str]
    notes: Sequence[str] = ()
    """What is to be known before the checkpoints are served."""

    @property
    def num_blocks(self) -> int:
        return self.plan.prefill.num_blocks

    @property
    def roles(self) -> list[str]:
        """The checkpoints: `unified`, or `prefill` and `decode`."""
        return [role for role in ROLES if role in self.evaluation.models]

    @property
    def models(self) -> dict[str, ModelFigures]:
        """What was measured of the dense model and of every checkpoint, in the order in which readers want them."""
        return {name: self.evaluation.models[name] for name in ("dense", *self.roles)}

    def evaluation_tables(self) -> list[Table]:
        """What was measured, as tables."""
        return evaluation_tables(self.evaluation.model_copy(update={"models": self.models}))

    def removed(self, half: Half) -> list[int]:
        """The blocks that a half gives up, deleted or distilled."""
        return self.plan.of(half).removed
