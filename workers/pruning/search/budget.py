"""Search of the units to give up until what is left costs no more than a budget, whatever their kind.

Greedy by loss for what is saved: of all sets with one unit more, the one that loses least for each part of the cost it
takes off, what would be saved beyond the budget not counted. It goes once with units of every kind, once with each kind
alone, and the best set of all within the budget is taken: a mixture is never worse than one of its kinds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from workers.pruning.model.costs import Costs
from workers.pruning.model.units import Kind, Unit, Units, without_cache
from workers.pruning.search.memo import MeasuredSet, Memo

OnStep = Callable[[float, MeasuredSet], None]
"""Told after every step: the share of the dense model's cost that is left, and the set."""


@dataclass(frozen=True)
class Walk:
    """The sets of one walk, from the base on, each beside the share of the dense model's cost that it leaves."""

    kinds: tuple[Kind, ...]
    steps: Sequence[tuple[float, MeasuredSet]]
    met: bool
    """Whether the last is within the budget; if not, there was nothing left to give up."""


@dataclass(frozen=True)
class BudgetResult:
    """The walk with units of every kind, then those with one kind, and the best set within the budget.

    Where there is none within it, the one that costs least.
    """

    walks: Sequence[Walk]
    chosen: MeasuredSet
    share: float


def within_budget(
    memo: Memo, costs: Costs, *, base: Units, offered: Sequence[Unit], share: float, on_step: OnStep
) -> BudgetResult:
    """The best set found that contains `base` and leaves at most `share` of the dense model's cost.

    `offered` are the units that may go besides, each of a block of which the base gives up nothing; those that save
    nothing are left out. `on_step` may raise to stop.
    """
    useful = [unit for unit in offered if costs.saves.get(unit, 0) > 0]
    kinds: list[Kind] = sorted({unit.kind for unit in useful})
    walks = [_walk(memo, costs, base, useful, share, tuple(kinds), on_step)]
    if len(kinds) > 1:
        for kind in kinds:
            alone = [unit for unit in useful if unit.kind == kind]
            walks.append(_walk(memo, costs, base, alone, share, (kind,), on_step))
    found = [MeasuredSet(units, loss) for units, loss in memo.visited.items()]
    inside = [one for one in found if costs.share(one.units) <= share]
    if inside:
        chosen = min(inside, key=lambda one: (one.loss, sorted(one.units)))
    else:
        chosen = min(found, key=lambda one: (costs.share(one.units), one.loss, sorted(one.units)))
    return BudgetResult(walks, chosen, costs.share(chosen.units))


def _walk(
    memo: Memo,
    costs: Costs,
    base: Units,
    offered: Sequence[Unit],
    share: float,
    kinds: tuple[Kind, ...],
    on_step: OnStep,
) -> Walk:
    current = MeasuredSet(base, memo([base])[base])
    steps = [(costs.share(base), current)]
    while steps[-1][0] > share and (nexts := _nexts(current.units, base, offered, costs)):
        memo.anchor(current.units)
        losses = memo(nexts)
        left = steps[-1][0]
        price = {
            units: (loss - current.loss) / (left - max(costs.share(units), share)) for units, loss in losses.items()
        }
        best = min(price, key=lambda units: (price[units], sorted(units)))
        current = MeasuredSet(best, losses[best])
        steps.append((costs.share(best), current))
        on_step(*steps[-1])
    return Walk(kinds, steps, steps[-1][0] <= share)


def _nexts(units: Units, base: Units, offered: Sequence[Unit], costs: Costs) -> list[Units]:
    """The sets that give up one unit more, or in place of one of the same block another that saves more."""
    of_block = {unit.block: unit for unit in units}
    found = []
    for unit in offered:
        before = of_block.get(unit.block)
        if before is None:
            found.append(units | {unit})
        elif before not in base and costs.saves[unit] > costs.saves[before]:
            found.append(units - {before} | {unit})
    # Some block has to stay, and with it something for decode to read.
    return [more for more in found if len(without_cache(more)) < costs.blocks]
