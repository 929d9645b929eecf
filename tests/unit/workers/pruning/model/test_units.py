from __future__ import annotations

import pytest

from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.units import SKIPPED, Units

UNITS = Units(5)
TWO_INTO_THREE = UNITS.pair(2, 3)
TWO_INTO_ONE = UNITS.pair(2, 1)
THREE_INTO_FOUR = UNITS.pair(3, 4)


def test_every_pair_has_a_number_of_its_own_from_which_its_blocks_follow() -> None:
    pairs = [(block, block + side) for block in range(5) for side in (-1, 1) if 0 <= block + side < 5]
    units = [UNITS.pair(removed, absorber) for removed, absorber in pairs]
    assert len({*range(5), *units}) == 5 + len(pairs)
    assert [(UNITS.block(unit), UNITS.absorber(unit)) for unit in units] == pairs
    assert [(UNITS.block(unit), UNITS.absorber(unit)) for unit in range(5)] == [(block, None) for block in range(5)]


def test_a_way_skips_what_goes_and_runs_the_fitted_block_in_the_absorber_s_place() -> None:
    assert UNITS.way(frozenset({0, TWO_INTO_THREE})) == (SKIPPED, 1, SKIPPED, TWO_INTO_THREE, 4)
    assert UNITS.way(frozenset({TWO_INTO_ONE})) == (0, TWO_INTO_ONE, SKIPPED, 3, 4)


@pytest.mark.parametrize(
    ("chosen", "unit"),
    [
        ({2}, TWO_INTO_ONE),  # gone already
        ({TWO_INTO_ONE}, 2),
        ({3}, TWO_INTO_THREE),  # the absorber is gone
        ({UNITS.pair(4, 3)}, TWO_INTO_THREE),  # it absorbs another
    ],
)
def test_units_that_exclude_each_other_are_not_added(chosen: set[int], unit: int) -> None:
    assert UNITS.add(frozenset(chosen), unit) is None


@pytest.mark.parametrize("unit", [3, THREE_INTO_FOUR])
def test_a_pair_that_loses_its_absorber_becomes_a_deletion(unit: int) -> None:
    chosen = UNITS.add(frozenset({TWO_INTO_THREE}), unit)
    assert chosen == frozenset({2, unit})
    # What a search starts from stays in every set, under its name.
    kept = UNITS.add(frozenset({TWO_INTO_THREE}), unit, base=frozenset({TWO_INTO_THREE}))
    assert kept == frozenset({TWO_INTO_THREE, unit})
    assert UNITS.plan(kept) == UNITS.plan(chosen)
    assert UNITS.way(kept) == UNITS.way(chosen)


def test_a_set_comes_to_a_plan_and_names_blocks_alone_when_told() -> None:
    chosen = frozenset({0, TWO_INTO_THREE})
    assert UNITS.plan(chosen) == BlockPlan(5, frozenset({0}), {2: 3})
    assert isinstance(UNITS.plan(chosen).removed, frozenset)
    assert UNITS.to_json(chosen) == {"removed": [0, 2], "distilled": {"2": 3}}
    assert UNITS.to_json(frozenset({0, 2})) == {"removed": [0, 2]}
