from __future__ import annotations

import json

import pytest

from workers.pruning.model.plan import BlockPlan
from workers.pruning.model.units import (
    NOTHING,
    Unit,
    Units,
    check_nested,
    deleting,
    plan_of,
    removed_json,
    units_from_json,
    units_json,
    way_through,
    with_unit,
)

TWO, TWO_INTO_ONE, TWO_INTO_THREE = Unit(2), Unit(2, 1), Unit(2, 3)


def test_units_sort_by_block_and_deletions_come_first() -> None:
    assert sorted([TWO_INTO_THREE, Unit(3), TWO_INTO_ONE, TWO, Unit(0, 1)]) == [
        Unit(0, 1),
        TWO,
        TWO_INTO_ONE,
        TWO_INTO_THREE,
        Unit(3),
    ]


def test_a_way_skips_what_goes_and_runs_the_fitted_block_in_the_absorber_s_place() -> None:
    assert way_through(frozenset({Unit(0), TWO_INTO_THREE}), 5) == ("skip", "run", "skip", TWO_INTO_THREE, "run")
    assert way_through(frozenset({TWO_INTO_ONE}), 5) == ("run", TWO_INTO_ONE, "skip", "run", "run")


@pytest.mark.parametrize(
    ("units", "unit"),
    [
        ({TWO}, TWO_INTO_ONE),  # gone already
        ({TWO_INTO_ONE}, TWO),
        ({Unit(3)}, TWO_INTO_THREE),  # the absorber is gone
        ({Unit(4, 3)}, TWO_INTO_THREE),  # it absorbs another
    ],
)
def test_units_that_exclude_each_other_are_not_put_together(units: set[Unit], unit: Unit) -> None:
    assert with_unit(frozenset(units), unit) is None


@pytest.mark.parametrize("unit", [Unit(3), Unit(3, 4)])
def test_a_unit_that_loses_its_absorber_becomes_a_deletion(unit: Unit) -> None:
    merged = frozenset({TWO_INTO_THREE})
    units = with_unit(merged, unit)
    assert units == frozenset({TWO, unit})
    # What a search starts from stays in every set, as it is.
    kept = with_unit(merged, unit, base=merged)
    assert kept == frozenset({TWO_INTO_THREE, unit})
    assert plan_of(kept, 5) == plan_of(units, 5)
    assert way_through(kept, 5) == way_through(units, 5)


def test_a_set_comes_to_a_plan_and_names_blocks_alone_when_told() -> None:
    units = frozenset({Unit(0), TWO_INTO_THREE})
    assert plan_of(units, 5) == BlockPlan(5, frozenset({0}), {2: 3})
    assert removed_json(units) == {"removed": [0, 2], "distilled": {"2": 3}}
    assert removed_json(deleting({0, 2})) == {"removed": [0, 2]}


@pytest.mark.parametrize("units", [NOTHING, deleting({4, 0}), frozenset({Unit(0), TWO_INTO_ONE, Unit(4, 3)})])
def test_a_set_survives_json(units: Units) -> None:
    assert units_from_json(json.loads(json.dumps(units_json(units)))) == units


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        (deleting({3}), deleting({2, 4}), "decode keeps block 3, whose KV cache prefill no longer computes"),
        (frozenset({TWO_INTO_ONE}), NOTHING, "decode keeps block 2,"),
        (frozenset({TWO_INTO_ONE}), deleting({2}), "block 2 otherwise than prefill, which merges it into block 1"),
        (deleting({2}), frozenset({TWO_INTO_THREE}), "block 2 otherwise than prefill, which deletes it"),
    ],
)
def test_decode_gives_up_what_prefill_does_as_prefill_does(prefill: Units, decode: Units, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_nested(prefill, decode)
    check_nested(prefill, prefill | deleting({0}))
