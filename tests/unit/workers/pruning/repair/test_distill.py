from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tests.unit.workers.pruning.models import (
    EXPERTS,
    OTHERS,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import block_stack, capture_calls, drop_blocks
from workers.pruning.model.measure import perplexity
from workers.pruning.repair.distill import (
    HEALING,
    continuation_loss,
    heal,
    kv_tensor_names,
    load_tensors,
    merge,
    train_on,
    trainable,
)
from workers.pruning.repair.training import Journal, TrainingSettings

FAST = TrainingSettings(steps=6, batch_windows=4, learning_rate=5e-4, seed=0)


def test_merging_lowers_the_error_of_the_pair_and_leaves_the_model_alone() -> None:
    model = reference_model()
    before = copy.deepcopy(model.state_dict())
    windows, held_out = reference_windows("train", 16, 64), reference_windows("calibration", 4, 64)
    tensors, losses = merge(
        model, {5: 4, 9: 10}, frozen=set(), windows=windows, held_out=held_out, settings=FAST, journal=Journal()
    )
    assert {name.split(".")[2] for name in tensors} == {"4", "10"}
    assert all(after < before for before, after in losses.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_reported_merge_error_is_that_of_the_merged_block_in_place() -> None:
    model, ids = tiny_model("qwen3"), random_ids(4, 16)
    tensors, losses = merge(model, {2: 1}, frozen=set(), windows=ids, held_out=ids, settings=FAST, journal=Journal())
    dense = model(input_ids=ids, output_hidden_states=True).hidden_states
    load_tensors(model, tensors)
    stack = block_stack(model)
    merged = capture_calls(stack, ids).run(stack, 1, dense[1])
    error = F.mse_loss(merged, dense[3]) / (dense[3] - dense[1]).pow(2).mean()
    assert losses[2][1] == pytest.approx(float(error), rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "qwen3", *OTHERS, *EXPERTS])
def test_a_block_merged_for_decode_alone_makes_the_same_keys_and_values(family: str) -> None:
    model, ids = tiny_model(family), random_ids(4, 16)
    frozen = kv_tensor_names(block_stack(model), 1)
    tensors, _ = merge(model, {2: 1}, frozen=frozen, windows=ids, held_out=ids, settings=FAST, journal=Journal())
    assert not frozen & tensors.keys()
    dense_cache = model(input_ids=ids, use_cache=True).past_key_values
    load_tensors(model, tensors)
    merged_cache = model(input_ids=ids, use_cache=True).past_key_values
    assert torch.equal(merged_cache.layers[1].keys, dense_cache.layers[1].keys)
    assert torch.equal(merged_cache.layers[1].values, dense_cache.layers[1].values)
    assert not torch.equal(merged_cache.layers[2].keys, dense_cache.layers[2].keys)


@pytest.mark.training
@pytest.mark.parametrize("removed", [{2, 5}, {2, 5, 7}, {2, 4, 5, 9}])
def test_healing_lowers_perplexity_on_text_it_never_saw(removed: set[int]) -> None:
    teacher, weights = reference_model(), reference_model()
    student = drop_blocks(weights, removed)
    kept = [block for block in range(12) if block not in removed]
    validation = reference_windows("validation", 8, 128)
    before = perplexity(student, validation, batch=8)
    result = heal(
        student,
        teacher,
        kept,
        trainable(weights, kept, frozen=set()),
        windows=reference_windows("train", 64, 128),
        held_out=reference_windows("calibration", 4, 128),
        settings=TrainingSettings(steps=8, batch_windows=8, learning_rate=2e-4, seed=0),
        journal=Journal(),
    )
    after = perplexity(student, validation, batch=8)
    assert result.after < result.before
    assert after.value < before.value


def test_healing_decode_trains_decode_alone_and_keeps_what_is_frozen() -> None:
    teacher, prefill_weights, weights = (tiny_model("llama") for _ in range(3))
    prefill, student = drop_blocks(prefill_weights, {1}), drop_blocks(weights, {1, 3})
    prefill_before = copy.deepcopy(prefill.state_dict())
    frozen = kv_tensor_names(block_stack(weights), 2)
    start = {
        name: dict(weights.named_parameters())[name].clone()
        for name in frozen & dict(weights.named_parameters()).keys()
    }
    ids = random_ids(8, 16)
    result = train_on(
        continuation_loss(prefill, student, [0, 1, 3], teacher, [0, 2, 4], HEALING, prompt_tokens=8),
        trainable(weights, [0, 2, 4], frozen=frozen),
        windows=ids,
        held_out=ids,
        settings=TrainingSettings(steps=10, batch_windows=4, learning_rate=5e-3, seed=0),
        journal=Journal(),
    )
    assert result.after < result.before
    assert all(torch.equal(tensor, prefill_before[name]) for name, tensor in prefill.state_dict().items())
    assert all(torch.equal(dict(weights.named_parameters())[name], tensor) for name, tensor in start.items())


def test_only_the_chosen_blocks_parameters_are_trainable() -> None:
    model = tiny_model("qwen2-mixed")
    chosen = trainable(model, [1], frozen={"model.layers.1.self_attn.k_proj.bias"})
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == chosen.keys()
    assert all(name.startswith("model.layers.1.") for name in chosen)
    assert "model.layers.1.self_attn.k_proj.bias" not in chosen


def test_a_tensor_of_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match=r"model\.layers\.9"):
        load_tensors(tiny_model("llama"), {"model.layers.9.weight": torch.zeros(1)})
