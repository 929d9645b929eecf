"""What removal finds: the units that each half gives up, what that costs, and what it is held against."""

from __future__ import annotations

from typing import Literal

from pydantic import AliasChoices, Field

from pdtrim.contract.results.base import Half, Halves, Result
from pdtrim.contract.spec import Cost, Part


class HalfPlan(Result):
    """What one half gives up. Blocks are named by their index in the dense model."""

    num_blocks: int = Field(description="Blocks of the dense model.")
    deleted: list[int] = Field(description="Blocks that go outright.")
    distilled: dict[int, int] = Field(description="Block that goes → the kept neighbour that stands for both.")
    parts: dict[int, Part] = Field(default_factory=dict, description="Block that stays → what of it is given up.")

    @property
    def removed(self) -> list[int]:
        """Every block that goes, deleted or distilled."""
        return sorted([*self.deleted, *self.distilled])


class Controls(Result):
    """Losses to hold the nested pair's against, on continuations."""

    decode_set_in_both: float = Field(description="Where prefill gives up what decode does.")
    decode_only: float = Field(description="Where prefill gives up nothing.")
    non_nested: float | None = Field(
        default=None,
        description="Where decode need not give up what prefill does. Jobs of earlier versions searched this.",
    )
    non_nested_removed: list[int] | None = Field(default=None, description="What decode gives up then.")


class Losses(Result):
    """Losses of the search's objective on the calibration windows, before distillation."""

    objective: str = Field(examples=["kl"])
    folded: bool = Field(
        default=False,
        description="Whether the searches for whole blocks compared sets with their gaps folded. The losses here and "
        "those of the frontier are without folds in any case; those of `search.json` are what was compared.",
    )
    prefill: float = Field(description="Of a pair whose halves both give up what prefill removes, on continuations.")
    decode: float = Field(description="Of the pair, on continuations.")
    decode_text: float | None = Field(
        default=None, description="The same on windows of running text alone. Null where the search had no others."
    )
    decode_copying: float | None = Field(
        default=None, description="The same on windows in which the prompt is said again alone."
    )
    controls: Controls


class BoundIncrease(Result):
    """The increase of perplexity at a count that the search came by."""

    remove_blocks: int
    perplexity_increase: float


class Bound(Result):
    """What came of a bound on perplexity. Increases are fractions of the dense model's perplexity."""

    max_perplexity_increase: float
    perplexity_increase: float
    met: bool = Field(description="Whether the chosen set keeps the bound.")
    dense_perplexity: float
    frontier: list[BoundIncrease]


class Bounds(Halves[Bound | None]):
    """The bound of each half; null where the job set none."""

    prefill: Bound | None = None
    decode: Bound | None = None


class DenseLoss(Result):
    """The dense model's losses, which those of `BlockWorth` are above."""

    both: float
    decode_only: float


class BlockWorth(Result):
    """The loss without one block alone."""

    block: int
    both: float = Field(description="Given up in both halves, on continuations.")
    decode_only: float = Field(description="Given up in decode alone, on continuations.")


class Sensitivity(Result):
    """What each block alone is worth; protected ones are left out."""

    dense: DenseLoss
    blocks: list[BlockWorth]


class Merge(Result):
    """A block fitted to stand for a removed one and for itself, and the held-out loss before and after the fit."""

    removed: int
    into: int = Field(description="The kept neighbour in whose place it runs.")
    decode_only: bool = Field(description="Whether the fit leaves alone what makes keys and values.")
    before: float
    after: float
    offered: bool = Field(description="Whether the search might choose it: the fit has to lower the loss.")


class Merging(Result):
    """Whether the search weighed merges against deletions, and the merges that it had."""

    weighed: bool
    reason: str | None = Field(default=None, description="Why it did not.")
    # Earlier versions called them pairs.
    merges: list[Merge] = Field(default_factory=list, validation_alias=AliasChoices("merges", "pairs"))


class Removed(Halves[HalfPlan]):
    """What each half gives up, and the losses that go with it."""

    losses: Losses
    bounds: Bounds = Field(default=Bounds())
    sensitivity: Sensitivity | None = Field(default=None, description="Null in jobs of versions that measured none.")
    merging: Merging | None = Field(default=None, description="Of versions that fitted merges before the search.")


class SetsEvaluated(Halves[int]):
    """How many sets the search of each half evaluated on all windows."""


class SearchPart(Result):
    """What one algorithm of a search took."""

    sets: int = Field(description="Sets of units that it compared, on some of the windows at least.")
    whole_evaluations: float = Field(description="As many evaluations on all windows take as many windows.")


class SearchEffort(Result):
    """What a search took: greedy, which goes first, and the algorithm that the job asked for."""

    greedy: SearchPart | None = None
    annealing: SearchPart | None = None
    exhaustive: SearchPart | None = None
    ended_by: Literal["budget", "neighbourhood", "time"] | None = Field(
        default=None,
        description="What ended annealing: its sets were spent, no set near the best was new, or its time was up. Null "
        "where it had nothing to do.",
    )


class SearchEfforts(Halves[SearchEffort]):
    """What each search of the stage took."""

    control: SearchEffort | None = Field(
        default=None, description="Of the control without nesting, which jobs of earlier versions searched."
    )


class PartSet(Result):
    """The best set found that gives up a part of so many blocks."""

    blocks: list[int]
    loss: float = Field(description="Of the pair, on continuations, before distillation.")


class PartSearch(Result):
    """The search of the blocks of which one half gives up a part, beside all that was decided before."""

    half: Half
    part: Part
    frontier: list[PartSet] = Field(description="The best set for every count, from none.")
    effort: SearchEffort


class BudgetStep(Result):
    """A set on the way to a budget, and what it leaves of the dense model's cost."""

    share: float
    loss: float = Field(description="Of the pair, on continuations, before distillation.")
    blocks: list[int] = Field(description="Given up whole.")
    parts: dict[int, Part] = Field(description="Block that stays → what of it is given up.")


class BudgetWalk(Result):
    """The sets that one walk went by; of one kind of unit, or of all."""

    kinds: list[Literal["block"] | Part]
    met: bool = Field(description="Whether it got within the budget. If not, there was nothing left to give up.")
    steps: list[BudgetStep]


class BudgetSearch(Result):
    """The search of what one half gives up to keep a budget, beside all that was decided before."""

    half: Half
    cost: Cost
    dense: int = Field(description="The dense model's: operations of a prompt, or bytes.")
    asked: float = Field(description="The share of it that may be left.")
    share: float = Field(description="That is left.")
    met: bool
    sets: int = Field(description="Sets of units that were compared.")
    walks: list[BudgetWalk] = Field(description="With every kind of unit, then with one kind at a time.")


class RemovalResult(Removed):
    """What the removal stage found."""

    effort: SearchEfforts | None = Field(
        default=None, description="What the search took. Null where the job was cut from another, and in older jobs."
    )
    parts: list[PartSearch] = Field(
        default_factory=list, description="Of parts of blocks that stay, in the order in which they were searched."
    )
    budgets: list[BudgetSearch] = Field(default_factory=list, description="Where a half has one; decode's first.")
    evaluated: SetsEvaluated | None = Field(default=None, description="Of versions that recorded no effort.")
    # Searches of version 0.1 could be shared by workers.
    workers: int | None = Field(default=None, description="How many workers took part; null since that is one.")
    helpers_share: float | None = Field(
        default=None, description="The share of the losses that other workers measured; null since there is none."
    )
