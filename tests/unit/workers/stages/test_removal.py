from __future__ import annotations

from workers.pruning.model.plan import BlockPlan
from workers.stages.removal import block_plan, half_plan


def test_a_recorded_plan_is_the_same_plan_and_its_bytes_do_not_depend_on_order() -> None:
    plan = BlockPlan(9, frozenset({7, 1}), {5: 4, 2: 3})
    same = BlockPlan(9, frozenset({1, 7}), {2: 3, 5: 4})
    assert block_plan(half_plan(plan)) == plan
    assert half_plan(plan).model_dump_json() == half_plan(same).model_dump_json()
