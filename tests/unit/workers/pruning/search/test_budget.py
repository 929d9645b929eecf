from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from workers.pruning.model.costs import Costs
from workers.pruning.model.units import NOTHING, Kind, Unit, Units
from workers.pruning.search.budget import BudgetResult, within_budget
from workers.pruning.search.memo import MeasuredSet, Memo

SAVES: Mapping[Kind, int] = {"block": 10, "mlp": 6, "attention": 4}
COSTS = Costs("weight_bytes", 4, 40, {Unit(block, kind): saved for block in range(4) for kind, saved in SAVES.items()})
EVERYTHING = sorted(COSTS.saves)


def memo_of(worth: Mapping[Unit, float], together: Mapping[Units, float] | None = None) -> Memo:
    """Losses that are what the units are worth, one by one; of some sets, another."""

    def losses(candidates: Sequence[Units], windows: range) -> dict[Units, list[float]]:
        given = together or {}
        return {units: [given.get(units, sum(worth.get(unit, 9.0) for unit in units))] for units in candidates}

    return Memo(losses, 1)


def found(memo: Memo, share: float, base: Units = NOTHING, offered: Sequence[Unit] = EVERYTHING) -> BudgetResult:
    return within_budget(memo, COSTS, base=base, offered=offered, share=share, on_step=lambda share, best: None)


def test_what_costs_least_for_what_it_saves_goes_until_the_budget_is_kept() -> None:
    worth = {Unit(0, "mlp"): 0.6, Unit(1): 0.9, Unit(2, "attention"): 0.5}
    result = found(memo_of(worth), share=0.65)
    # The block costs least for what it saves; then the attention saves enough, and costs less than the MLP.
    assert [step.units for _, step in result.walks[0].steps] == [
        NOTHING,
        frozenset({Unit(1)}),
        frozenset({Unit(1), Unit(2, "attention")}),
    ]
    assert [share for share, _ in result.walks[0].steps] == pytest.approx([1.0, 0.75, 0.65])
    assert result.walks[0].met


def test_what_is_saved_beyond_the_budget_does_not_count() -> None:
    worth = {Unit(0): 0.9, Unit(1, "attention"): 0.5}
    # A tenth is missing: both keep the budget, and the attention costs less.
    result = found(memo_of(worth), share=0.9)
    assert result.chosen == MeasuredSet(frozenset({Unit(1, "attention")}), 0.5)


def test_a_part_gives_way_to_the_block_where_that_saves_more_for_less() -> None:
    worth = {Unit(0, "mlp"): 0.1, Unit(0): 0.15}
    result = found(memo_of(worth), share=0.75)
    assert result.chosen.units == frozenset({Unit(0)})


def test_a_mixture_is_never_worse_than_a_kind_alone() -> None:
    worth = {Unit(block, kind): {"block": 3.0, "mlp": 0.6, "attention": 0.41}[kind] for block, kind in _pairs()}
    # Greedy begins with an MLP, and all that holds one is bad; three attentions would have been better.
    bad = {frozenset({Unit(a, "mlp"), Unit(b, "attention")}): 5.0 for a in range(4) for b in range(4) if a != b}
    bad |= {frozenset({Unit(a, "mlp"), Unit(b, "mlp")}): 5.0 for a in range(4) for b in range(a)}
    result = found(memo_of(worth, bad), share=0.7)
    assert result.chosen.units == frozenset(Unit(block, "attention") for block in range(3))
    assert result.chosen.loss == pytest.approx(3 * 0.41)


def _pairs() -> list[tuple[int, Kind]]:
    return [(unit.block, unit.kind) for unit in EVERYTHING]


def test_where_no_set_keeps_the_budget_the_one_that_costs_least_is_taken_and_that_is_said() -> None:
    result = found(memo_of({}), share=0.05)
    assert result.share == pytest.approx(0.1)
    assert not any(walk.met for walk in result.walks)


def test_the_base_stays_and_units_that_save_nothing_are_left_out() -> None:
    base = frozenset({Unit(3)})
    offered = [*EVERYTHING[:9], Unit(0, "kv_only")]
    result = found(memo_of({Unit(3): 0.0, Unit(0): 0.1, Unit(0, "kv_only"): 0.0}), 0.5, base, offered)
    assert result.chosen.units == base | {Unit(0)}
