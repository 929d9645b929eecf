from __future__ import annotations

import copy

import pytest
import torch

from tests.unit.workers.pruning.models import (
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.measure import perplexity
from workers.pruning.repair.distill import (
    HEALING,
    continuation_loss,
    heal,
    kv_tensor_names,
    load_tensors,
    train_on,
    trainable,
)
from workers.pruning.repair.training import Journal, TrainingSettings

pytestmark = pytest.mark.training

FAST = TrainingSettings(steps=6, batch_windows=4, learning_rate=5e-4, seed=0)


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
        continuation_loss(
            prefill, student, [0, 1, 3], teacher, [0, 2, 4], HEALING, prompt_tokens=8, first_token="decode"
        ),
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
