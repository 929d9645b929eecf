"""Sets that distil pairs, among sets that delete: their losses, and a search of both."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.unit.workers.pruning.models import TOLERANCE, random_ids, tiny_model
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.pair import pd_loss
from workers.pruning.model.plan import kv_layer_map
from workers.pruning.model.units import NOTHING, Unit, Units, blocks_of, by_absorber, plan_of
from workers.pruning.repair.distill import fitted_block, kv_tensor_names
from workers.pruning.search.engine import Engine, PairEngine
from workers.pruning.search.memo import Memo
from workers.pruning.search.search import Algorithm, SearchResult, search

BLOCKS = 5
INTO_NEXT, INTO_LAST = Unit(1, 2), Unit(3, 4)


def changed(model: PreTrainedModel, absorber: int, *, same_cache: bool = False) -> dict[str, Tensor]:
    """Other weights for a block, by their dense names; with `same_cache` ones that make the same keys and values."""
    stack = block_stack(model)
    fixed = kv_tensor_names(stack, absorber) if same_cache else set()
    named = {f"{stack.prefix}{absorber}.{name}": t for name, t in stack.blocks[absorber].named_parameters()}
    return {name: 0.5 * tensor.detach() for name, tensor in named.items() if name not in fixed}


def without(model: PreTrainedModel, chosen: Units, modules: dict[Unit, nn.Module]) -> PreTrainedModel:
    """The model that a set comes to."""
    changed_model = copy.deepcopy(model)
    blocks = block_stack(changed_model).blocks
    for absorber, unit in by_absorber(chosen).items():
        blocks[absorber].load_state_dict(modules[unit].state_dict())
    return drop_blocks(changed_model, blocks_of(chosen))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_a_set_that_distils_has_the_loss_of_the_model_with_the_fitted_block_in_place(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 18)
    stack = block_stack(model)
    modules = {
        unit: fitted_block(stack, absorber, changed(model, absorber))
        for unit, absorber in ((INTO_NEXT, 2), (INTO_LAST, 4))
    }
    sets = [frozenset(s) for s in ({Unit(1)}, {INTO_NEXT}, {INTO_LAST}, {INTO_NEXT, INTO_LAST}, {Unit(0), INTO_NEXT})]
    engine = Engine(stack, ids, "cross_entropy", chunk_windows=2, anchor_bytes=2**20, modules=modules)
    engine.anchor(frozenset({INTO_NEXT}))
    for _ in range(2):  # the second time from what the anchor holds
        found = engine.losses(sets)
        for chosen in sets:
            logits = without(model, chosen, modules)(input_ids=ids[:, :-1]).logits
            expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            assert found[chosen] == pytest.approx(float(expected), abs=TOLERANCE)


def test_decode_reads_the_keys_and_values_that_prefill_s_fitted_blocks_made() -> None:
    model, ids = tiny_model("llama"), random_ids(3, 20)
    stack = block_stack(model)
    modules = {
        INTO_NEXT: fitted_block(stack, 2, changed(model, 2)),
        INTO_LAST: fitted_block(stack, 4, changed(model, 4, same_cache=True)),
    }
    prefill = frozenset({INTO_NEXT})
    engine = PairEngine(stack, ids, "cross_entropy", prefill=prefill, prompt_tokens=9, chunk_windows=2, modules=modules)
    sets = [prefill, prefill | {INTO_LAST}, prefill | {Unit(2)}, prefill | {Unit(0)}]
    found = engine.losses(sets)
    for chosen in sets:
        expected = pd_loss(
            without(model, prefill, modules),
            without(model, chosen, modules),
            kv_layer_map(plan_of(prefill, BLOCKS), plan_of(chosen, BLOCKS)),
            ids,
            prompt_tokens=9,
            batch=3,
        )
        assert found[chosen] == pytest.approx(expected, abs=TOLERANCE)


MERGES = [Unit(0, 1), Unit(1, 0), Unit(1, 2), Unit(2, 3), Unit(3, 2), Unit(3, 4)]


def worth(sets: Sequence[Units], windows: range) -> dict[Units, list[float]]:
    """A block costs its number and 1; distilled into the next one a tenth, into the one before twice as much."""
    factor = {None: 1.0, 1: 0.1, -1: 2.0}

    def cost(chosen: Units) -> float:
        distilled = {block: absorber - block for block, absorber in plan_of(chosen, BLOCKS).distilled.items()}
        return sum((1 + block) * factor[distilled.get(block)] for block in blocks_of(chosen))

    return {chosen: [cost(chosen)] for chosen in sets}


def found(algorithm: Algorithm, merges: Sequence[Unit], base: Units = NOTHING) -> SearchResult:
    return search(
        Memo(worth, 1),
        algorithm=algorithm,
        num_blocks=BLOCKS,
        remove=3,
        base=base,
        merges=merges,
        scores=[0.0] * BLOCKS,
        evaluations=200,
        seed=0,
        on_progress=lambda done, best: None,
    )


@pytest.mark.parametrize("algorithm", ["annealing", "greedy", "exhaustive"])
def test_a_search_distils_where_that_costs_less_than_deleting(algorithm: Algorithm) -> None:
    result = found(algorithm, MERGES)
    assert result.frontier[1].units == {Unit(0, 1)}
    assert result.frontier[1].loss == pytest.approx(0.1)
    for count, best in result.frontier.items():
        assert len(plan_of(best.units, BLOCKS).removed) == count
        assert best.loss <= found(algorithm, ()).frontier[count].loss


def test_annealing_ends_on_the_best_of_all_deletions_and_distillations() -> None:
    # 0 into 1 and 2 into 3 leave 4 or 1; deleting 1 as well costs the first pair.
    assert found("annealing", MERGES).frontier[2].loss == pytest.approx(0.1 + 0.3)


def test_every_set_that_is_tried_makes_a_plan_and_contains_the_base() -> None:
    base = frozenset({INTO_NEXT})
    for algorithm in ("annealing", "greedy", "exhaustive"):
        result = found(algorithm, MERGES, base)
        for tried in result.trajectory:
            assert base <= tried.units
            assert len(plan_of(tried.units, BLOCKS).removed) == len(tried.units)
        assert any(2 in tried.blocks for tried in result.trajectory)


def test_without_pairs_a_search_is_what_it_was() -> None:
    told = found("annealing", ()).frontier_json()
    assert [sorted(entry) for entry in told] == [["loss", "remove_blocks", "removed"]] * 4
    assert "distilled" in found("annealing", MERGES).frontier_json()[1]


def test_a_fitted_block_is_the_absorber_with_other_weights_and_leaves_it_alone() -> None:
    model = tiny_model("llama")
    stack, tensors = block_stack(model), changed(model, 2)
    before = {name: tensor.clone() for name, tensor in stack.blocks[2].state_dict().items()}
    block = fitted_block(stack, 2, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.blocks[2].state_dict().items())
    assert all(torch.equal(p, tensors[f"{stack.prefix}2.{name}"]) for name, p in block.named_parameters())
