from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import random_ids, reference_model, reference_windows, tiny_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.pair import FirstToken, pd_loss
from workers.pruning.model.parts import pruned
from workers.pruning.model.plan import BlockPlan, kv_layer_map
from workers.pruning.model.units import Units, blocks_of, deleting
from workers.pruning.repair.distill import load_tensors
from workers.pruning.repair.fold import Moments, by_size, fold, ridge_change, wanted_states
from workers.pruning.repair.folded_sets import FoldedSets
from workers.pruning.search.engine import PairEngine, WholeEngine
from workers.pruning.search.memo import Memo

SETS = [deleting(s) for s in ((), (0,), (2,), (1, 3), (2, 3), (0, 1, 2), (4,), (1, 4), (3, 4))]
PLENTY = 2**30
FITTED = random_ids(8, 16, seed=7)


def barely_held(ones: Moments, others: Moments) -> Tensor:
    """With next to no ridge, so that random models have folds too."""
    return ridge_change(ones + others, 1e-3)


def plan_of(units: Units) -> BlockPlan:
    return BlockPlan(5, blocks_of(units))


def folded(model: PreTrainedModel, units: Units, windows: Tensor) -> PreTrainedModel:
    """The pruned model with the folds in its weights, as a job makes it."""
    stack, plan = block_stack(model), BlockPlan(len(block_stack(model).blocks), blocks_of(units))
    wanted = wanted_states(stack, plan, windows, chunk_windows=3)
    weights = copy.deepcopy(model)
    load_tensors(weights, fold(stack, plan, wanted, change_of=barely_held, weighing=by_size).tensors)
    return pruned(weights, plan)


def cross_entropy(model: PreTrainedModel, ids: Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def engine(model: PreTrainedModel, ids: Tensor, held_bytes: int = PLENTY) -> WholeEngine:
    stack = block_stack(model)
    sets = FoldedSets(stack, FITTED, held_bytes=held_bytes, change_of=barely_held)
    return WholeEngine(stack, ids, "cross_entropy", chunk_windows=2, repaired=sets)


# gemma2 has a norm behind its MLP and mixtral many last projections: nothing takes their folds.
@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "gpt2", "granite", "phi3", "gemma2", "mixtral"])
def test_losses_of_sets_are_those_of_models_with_the_folds_in_their_weights(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 18)
    expected = {s: cross_entropy(folded(model, s, FITTED), ids) for s in SETS}
    found = engine(model, ids).losses(SETS)
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_fold_changes_what_a_set_costs() -> None:
    model, ids = tiny_model("llama"), random_ids(3, 18)
    plain = WholeEngine(block_stack(model), ids, "cross_entropy", chunk_windows=2).losses(SETS)
    found = engine(model, ids).losses(SETS)
    same = {s for s in SETS if abs(found[s] - plain[s]) < 1e-6}
    # Nothing stands before block 0, and the dense model has no gap.
    assert same == {deleting(()), deleting((0,)), deleting((0, 1, 2))}


@pytest.mark.parametrize("first_token", ["decode", "prefill"])
def test_losses_of_pairs_are_those_of_two_folded_models(first_token: FirstToken) -> None:
    model, ids = tiny_model("llama"), random_ids(3, 20)
    stack, prefill = block_stack(model), deleting({1})
    pair = PairEngine(
        stack,
        ids,
        "cross_entropy",
        prefill=prefill,
        prompt_tokens=9,
        first_token=first_token,
        chunk_windows=2,
        repaired=FoldedSets(stack, FITTED, held_bytes=PLENTY, change_of=barely_held),
    )
    sets = [prefill, prefill | deleting({2}), prefill | deleting({0, 4})]
    expected = {
        s: pd_loss(
            folded(model, prefill, FITTED),
            folded(model, s, FITTED),
            kv_layer_map(plan_of(prefill), plan_of(s)),
            ids,
            prompt_tokens=9,
            first_token=first_token,
            batch=3,
        )
        for s in sets
    }
    assert pair.losses(sets) == pytest.approx(expected, abs=1e-4)


def test_maps_that_are_fitted_again_or_for_one_set_at_a_time_are_the_same() -> None:
    model, ids = tiny_model("llama"), random_ids(3, 18)
    together, one_by_one = engine(model, ids), engine(model, ids, held_bytes=1)
    expected = together.losses(SETS)
    assert one_by_one.losses(SETS) == pytest.approx(expected, abs=1e-6)
    together.anchor(SETS[1])
    assert together.losses(SETS) == expected


def test_of_the_reference_model_a_race_finds_a_set_that_its_fold_makes_better() -> None:
    model, ids = reference_model(), reference_windows("calibration", 8, 128)
    stack = block_stack(model)
    sets = [deleting({block}) for block in range(12)]
    found = {}
    for name, repaired in {
        "as they are": None,
        "folded": FoldedSets(stack, reference_windows("train", 8, 128), held_bytes=PLENTY),
    }.items():
        losses = WholeEngine(stack, ids, "kl", chunk_windows=4, repaired=repaired)
        memo = Memo(losses.window_losses, losses.windows, racing=True, anchor=losses.anchor)
        memo.anchor(deleting(()))
        winner = memo.race(sets).winner
        found[name] = memo([winner])[winner]
    assert found["folded"] < found["as they are"]
