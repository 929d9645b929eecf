from __future__ import annotations

import math

import pytest

from workers.pruning.model.units import blocks_of, deleting
from workers.pruning.search.memo import MeasuredSet, Memo
from workers.pruning.search.perplexity_bound import PerplexityBound

PERPLEXITY = {(): 10.0, (1,): 10.4, (2,): 10.2, (1, 2): 10.5, (1, 3): 10.49, (1, 2, 3): 11.0}
LOSS = {(): 0.0, (1,): 0.1, (2,): 0.3, (1, 2): 0.4, (1, 3): 0.5, (1, 2, 3): 0.7}


def losses_of(values: dict[tuple[int, ...], float]) -> Memo:
    return Memo(lambda candidates, windows: {c: [values[tuple(sorted(blocks_of(c)))]] for c in candidates}, windows=1)


def bound(max_increase: float) -> tuple[PerplexityBound, Memo]:
    cross_entropy = losses_of({removed: math.log(value) for removed, value in PERPLEXITY.items()})
    found = losses_of(LOSS)
    for removed in LOSS:
        found([deleting(removed)])
        cross_entropy([deleting(removed)])
    return PerplexityBound(cross_entropy, math.log(10.0), max_increase, [0]), found


@pytest.mark.parametrize(
    ("max_increase", "removed"),
    [(0.2, {1, 2, 3}), (0.0501, {1, 2}), (0.0495, {1, 3}), (0.041, {1}), (0.03, {2}), (0.0, set())],
)
def test_the_largest_set_within_the_bound_is_chosen_and_of_those_the_one_of_least_loss(
    max_increase: float, removed: set[int]
) -> None:
    limit, memo = bound(max_increase)
    chosen = limit.largest(memo, smallest=MeasuredSet(deleting({9}), 1.0))
    assert chosen.blocks == removed
    assert limit.to_json(chosen, [chosen])["met"] is True


def test_the_smallest_set_is_chosen_when_none_is_within_the_bound_and_that_is_said() -> None:
    everything = deleting({0, 1})
    memo = Memo(lambda candidates, windows: {c: [2.0] for c in candidates}, windows=1)
    memo([everything])
    limit = PerplexityBound(
        Memo(lambda candidates, windows: {c: [800.0] for c in candidates}, windows=1), 1.0, 0.5, [0]
    )
    smallest = memo.best(2)
    assert not limit.holds(smallest)
    assert limit.largest(memo, smallest) == smallest
    described = limit.to_json(smallest, [smallest])
    assert described["met"] is False
    assert math.isfinite(described["perplexity_increase"])
    assert described["frontier"] == [{"remove_blocks": 2, "perplexity_increase": described["perplexity_increase"]}]
