"""The frontier of a job: the best set of blocks for every count, and what another export can be cut from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from pdtrim.contract.base import SpecModel
from pdtrim.contract.errors import NoSuchPoint, SetsNotNested
from pdtrim.contract.jobs import AnswerModel
from pdtrim.contract.results import Bound, FrontierSet, HalfPlan, Plan
from pdtrim.contract.spec import MAX_BLOCKS, JobName, JobSpec, Labels


class FrontierPoint(FrontierSet):
    """The best set found that gives up so many blocks, and what it does to perplexity."""

    perplexity_increase: float | None = Field(
        default=None,
        description="Calibration perplexity over the dense model's, less one; where the job set a bound on it.",
    )


class Chosen(AnswerModel):
    """What the job itself gave up in each half."""

    prefill: FrontierPoint
    decode: FrontierPoint


class Frontier(AnswerModel):
    """The best loss found for every number of removed blocks.

    All losses are of continuations. Those of `decode` are of the pair whose prefill half gives up what the first point
    of `decode` does; the others of a pair whose halves both give up the set.
    """

    object: Literal["frontier"] = "frontier"
    job_id: str
    objective: str = Field(examples=["kl"])
    chosen: Chosen
    unified: list[FrontierPoint] = Field(
        min_length=1,
        description="One checkpoint for both halves. Whole windows are scored as one model, so these are the points of "
        "`prefill`.",
    )
    prefill: list[FrontierPoint] = Field(min_length=1, description="What prefill gives up, by count.")
    decode: list[FrontierPoint] = Field(
        min_length=1, description="What decode gives up given what prefill does, by count."
    )

    @classmethod
    def from_plan(cls, job_id: str, plan: Plan) -> Self:
        """The frontier that a plan holds."""
        prefill = _points(plan.frontier.prefill, plan.bounds.prefill)
        decode = _points(plan.frontier.decode, plan.bounds.decode)
        chosen = Chosen(
            prefill=_chosen(plan.prefill, plan.losses.prefill, prefill),
            decode=_chosen(plan.decode, plan.losses.decode, decode),
        )
        objective = plan.losses.objective
        return cls(job_id=job_id, objective=objective, chosen=chosen, unified=prefill, prefill=prefill, decode=decode)

    def cut(self, *, prefill: int, decode: int) -> Cut:
        """The sets that give up so many blocks, decode's with all of prefill's.

        Equal counts are one checkpoint, of the unified points. Raises: NoSuchPoint, SetsNotNested.
        """
        # Under a bound on perplexity, the choice need not be the set of least loss, and decode was searched beside it.
        searched = self.decode[0]
        of_prefill = self._point("prefill", [self.chosen.prefill, searched, *self.prefill], prefill)
        if prefill == decode:
            return Cut(of_prefill, of_prefill, of_prefill.loss)
        of_decode = self._point("decode", [self.chosen.decode, *self.decode], decode)
        if missing := set(of_prefill.removed) - set(of_decode.removed):
            raise SetsNotNested(
                f"The best set of {decode} blocks for decode keeps block {min(missing)}, which the best set of "
                f"{prefill} for prefill gives up: decode would miss its KV cache. Decode was searched beside a prefill "
                f"that gives up {searched.remove_blocks}; take that, equal counts, or a new job.",
                param="decode.remove_blocks",
            )
        beside_searched = set(of_prefill.removed) == set(searched.removed)
        return Cut(of_prefill, of_decode, of_decode.loss if beside_searched else None)

    def _point(self, half: str, points: Sequence[FrontierPoint], count: int) -> FrontierPoint:
        found = next((point for point in points if point.remove_blocks == count), None)
        if found is None:
            listed = ", ".join(map(str, sorted({point.remove_blocks for point in points})))
            raise NoSuchPoint(
                f"The frontier of job {self.job_id} has no set of {count} blocks for {half}; it has {listed}. Submit a "
                "job that removes as many, or take one of these.",
                param=f"{half}.remove_blocks",
            )
        return found


@dataclass(frozen=True)
class Cut:
    """What each half of an export gives up."""

    prefill: FrontierPoint
    decode: FrontierPoint
    loss: float | None
    """Of the pair, or of the one checkpoint for both; None where the search measured this decode half beside another
    prefill half alone."""


def _points(found: Sequence[FrontierSet], bound: Bound | None) -> list[FrontierPoint]:
    increases = {} if bound is None else {at.remove_blocks: at.perplexity_increase for at in bound.frontier}
    return [FrontierPoint(**dict(one), perplexity_increase=increases.get(one.remove_blocks)) for one in found]


def _chosen(half: HalfPlan, loss: float, points: Sequence[FrontierPoint]) -> FrontierPoint:
    same = next((point for point in points if point.removed == half.removed), None)
    return FrontierPoint(
        remove_blocks=len(half.removed),
        removed=half.removed,
        distilled=half.distilled,
        loss=loss,
        perplexity_increase=None if same is None else same.perplexity_increase,
    )


class ExportHalf(SpecModel):
    """How many blocks a half of the export gives up."""

    remove_blocks: int = Field(ge=0, le=MAX_BLOCKS, description="A count on the frontier.", examples=[1])


class ExportSpec(SpecModel):
    """Another export, cut from the frontier of a job. All else is as in that job, but for `push_to_hub`: pushed to the
    same repository, it would take the place of that job's.
    """

    prefill: ExportHalf
    decode: ExportHalf
    name: JobName | None = Field(default=None, description="Name of the new job; by default that of the job.")
    metadata: Labels | None = Field(default=None, description="Labels of the new job; by default those of the job.")

    @model_validator(mode="after")
    def _decode_removes_what_prefill_removes(self) -> Self:
        prefill, decode = self.prefill.remove_blocks, self.decode.remove_blocks
        if prefill > decode:
            raise PydanticCustomError(
                "prefill_exceeds_decode",
                "prefill.remove_blocks ({prefill}) may not exceed decode.remove_blocks ({decode}): every block that "
                "decode keeps needs the KV cache that prefill computed",
                {"prefill": prefill, "decode": decode, "param": "prefill.remove_blocks"},
            )
        return self

    def job(self, parent: JobSpec) -> JobSpec:
        """The specification of the job that makes this export from one of `parent`."""
        changes: dict[str, Any] = {"push_to_hub": None} | {
            half: given.model_copy(update={"remove_blocks": count, "max_perplexity_increase": None})
            for half, count, given in (
                ("prefill", self.prefill.remove_blocks, parent.prefill),
                ("decode", self.decode.remove_blocks, parent.decode),
            )
        }
        changes |= {key: given for key in ("name", "metadata") if (given := getattr(self, key)) is not None}
        return parent.model_copy(update=changes)
