from __future__ import annotations

import json

import pytest

from workers.pruning.model.units import (
    NOTHING,
    Unit,
    Units,
    check_nested,
    deleting,
    removed_json,
    units_from_json,
    units_json,
    way_through,
)


def test_a_way_skips_the_blocks_that_go() -> None:
    assert way_through(deleting({0, 2}), 4) == ("skip", "run", "skip", "run")
    assert way_through(NOTHING, 2) == ("run", "run")


@pytest.mark.parametrize("units", [NOTHING, deleting({4, 0}), deleting(range(12))])
def test_a_set_survives_json_which_does_not_depend_on_the_order_it_was_built_in(units: Units) -> None:
    content = json.dumps(units_json(units))
    assert units_from_json(json.loads(content)) == units
    assert json.dumps(units_json(frozenset(sorted(units, reverse=True)))) == content


def test_a_set_names_its_blocks_in_order() -> None:
    assert removed_json(frozenset({Unit(7), Unit(0), Unit(2)})) == {"removed": [0, 2, 7]}


def test_decode_gives_up_what_prefill_does() -> None:
    with pytest.raises(ValueError, match="decode keeps block 3, whose KV cache prefill no longer computes"):
        check_nested(deleting({3}), deleting({2, 4}))
    check_nested(deleting({3}), deleting({2, 3}))
