from __future__ import annotations

import pytest

from workers.pruning.model.plan import BlockPlan, assign_actions, check_nested, kv_layer_map

SCORES = [0.1, 0.9, 0.97, 0.98, 0.9, 0.99]
ERRORS = {(block, block + step): 0.1 * block + (0.5 if step == 1 else 0.4) for block in range(6) for step in (-1, 1)}


def actions(removed: set[int], threshold: float = 0.95, fixed: BlockPlan | None = None) -> BlockPlan:
    return assign_actions(removed, num_blocks=6, scores=SCORES, threshold=threshold, merge_errors=ERRORS, fixed=fixed)


def test_kept_blocks_are_what_is_neither_deleted_nor_distilled() -> None:
    plan = BlockPlan(6, frozenset({2}), {4: 5})
    assert plan.removed == {2, 4}
    assert plan.kept == (0, 1, 3, 5)


@pytest.mark.parametrize(
    ("deleted", "distilled", "reason"),
    [
        ({6}, {}, "block 6 does not exist"),
        ({0, 1, 2, 3, 4, 5}, {}, "all 6 blocks"),
        ({2}, {2: 3}, "block 2 is both"),
        (set(), {2: 4}, "not adjacent"),
        ({3}, {2: 3}, "block 3, which is not kept"),
        (set(), {0: -1}, "block -1, which is not kept"),
        (set(), {2: 3, 4: 3}, "block 3 absorbs more than one"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(deleted: set[int], distilled: dict[int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockPlan(6, frozenset(deleted), distilled)


def test_decode_refuses_a_set_that_keeps_a_prefill_removed_block() -> None:
    with pytest.raises(ValueError, match="decode keeps block 3"):
        check_nested(frozenset({3}), frozenset({2, 4}))


def test_the_layer_map_pairs_layers_of_the_same_original_block() -> None:
    prefill, decode = BlockPlan(6, frozenset({1})), BlockPlan(6, frozenset({1, 3}))
    assert kv_layer_map(prefill, decode) == [0, 1, 3, 4]
    assert kv_layer_map(prefill, prefill) == [0, 1, 2, 3, 4]


def test_redundant_blocks_are_deleted_and_others_distilled_into_the_better_neighbour() -> None:
    plan = actions({2, 4})
    assert plan == BlockPlan(6, frozenset({2}), {4: 3})


def test_each_kept_block_absorbs_one_and_what_finds_none_is_deleted() -> None:
    plan = actions({1, 2, 3}, threshold=2.0)
    # 1 has the lowest score and chooses first; 3 takes 4; 2 has only removed neighbours.
    assert plan == BlockPlan(6, frozenset({2}), {1: 0, 3: 4})


def test_decode_keeps_what_prefill_distilled_where_the_absorber_stays() -> None:
    prefill = actions({1, 4}, threshold=0.95)
    assert prefill.distilled == {1: 0, 4: 3}
    extended = actions({1, 3, 4}, threshold=0.95, fixed=prefill)
    assert extended == BlockPlan(6, frozenset({3, 4}), {1: 0})
