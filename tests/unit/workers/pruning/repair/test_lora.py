from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.unit.workers.pruning.models import (
    FAMILIES,
    TOLERANCE,
    random_ids,
    reference_model,
    reference_windows,
    tiny_model,
)
from workers.pruning.model.blocks import block_stack, drop_blocks
from workers.pruning.model.checkpoint import SourceTensors, write_checkpoint
from workers.pruning.model.measure import perplexity
from workers.pruning.repair.distill import HEALING, continuation_loss, heal, kv_tensor_names, train_on
from workers.pruning.repair.lora import linear_weights, lora_adapters
from workers.pruning.repair.training import Journal, TrainingSettings

IDS = random_ids(4, 16)
FAST = TrainingSettings(steps=8, batch_windows=4, learning_rate=1e-2, seed=0)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_checkpoint_computes_what_the_model_with_adapters_computes(family: str, tmp_path: Path) -> None:
    weights = tiny_model(family)
    weights.save_pretrained(tmp_path / "source")
    teacher, student = tiny_model(family), drop_blocks(weights, {1, 3})
    healed = linear_weights(weights, [0, 2, 4], frozen=set())
    with lora_adapters(student, healed, rank=4, alpha=8.0, seed=0) as adapters:
        result = heal(
            student, teacher, [0, 2, 4], adapters, windows=IDS, held_out=IDS, settings=FAST, journal=Journal()
        )
        trained = logits(student)
    assert result.after < result.before

    save_file({name: weight.detach().clone() for name, weight in healed.items()}, tmp_path / "trained.safetensors")
    write_checkpoint(
        tmp_path / "source",
        tmp_path / "target",
        kept=[0, 2, 4],
        overrides=SourceTensors.in_file(tmp_path / "trained.safetensors"),
        pdtrim={},
        model_card="card",
    )
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "target", dtype=torch.float32).eval()
    assert float((logits(exported) - trained).abs().max()) <= TOLERANCE
    assert float((logits(drop_blocks(teacher, {1, 3})) - trained).abs().max()) > 0.01
    assert not any("lora" in name for name in student.state_dict())
    assert not any(parameter.requires_grad for parameter in (*student.parameters(), *weights.parameters()))


@pytest.mark.training
def test_adapters_lower_perplexity_on_text_they_never_saw() -> None:
    teacher, weights = reference_model(), reference_model()
    student = drop_blocks(weights, {2, 5})
    validation = reference_windows("validation", 8, 128)
    before = perplexity(student, validation, batch=8)
    kept = [block for block in range(12) if block not in {2, 5}]
    with lora_adapters(student, linear_weights(weights, kept, frozen=set()), rank=8, alpha=16.0, seed=0) as adapters:
        result = heal(
            student,
            teacher,
            kept,
            adapters,
            windows=reference_windows("train", 64, 128),
            held_out=reference_windows("calibration", 4, 128),
            settings=TrainingSettings(steps=8, batch_windows=8, learning_rate=2e-3, seed=0),
            journal=Journal(),
        )
    assert result.after < result.before
    assert perplexity(student, validation, batch=8).value < before.value


@pytest.mark.parametrize("family", ["llama", "qwen2-mixed", "qwen3"])
def test_a_block_distilled_for_decode_alone_has_no_adapter_where_it_makes_keys_and_values(family: str) -> None:
    teacher, prefill, weights = (tiny_model(family) for _ in range(3))
    student, before = drop_blocks(weights, {1, 3}), copy.deepcopy(weights.state_dict())
    frozen = kv_tensor_names(block_stack(weights), 2)
    healed = linear_weights(weights, [0, 2, 4], frozen=frozen)
    assert {name for name in healed if name.startswith("model.layers.2.")} == {
        f"model.layers.2.{name}.weight"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    }
    sent = prefill(input_ids=IDS, use_cache=True).past_key_values.layers[2]
    with lora_adapters(student, healed, rank=4, alpha=8.0, seed=0) as adapters:
        result = train_on(
            continuation_loss(
                prefill, student, [0, 2, 4], teacher, [0, 2, 4], HEALING, prompt_tokens=8, first_token="decode"
            ),
            adapters,
            windows=IDS,
            held_out=IDS,
            settings=FAST,
            journal=Journal(),
        )
    assert result.after < result.before
    changed = {name for name, tensor in weights.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == healed.keys()
    # Given what entered the dense block, the healed one makes the very keys and values that prefill sends.
    dense = drop_blocks(weights, {3, 4})
    for name, tensor in before.items():
        if not name.startswith("model.layers.2."):
            dict(weights.named_parameters(remove_duplicate=False))[name].copy_(tensor)
    made = dense(input_ids=IDS, use_cache=True).past_key_values.layers[2]
    assert torch.equal(made.keys, sent.keys)
    assert torch.equal(made.values, sent.values)


def test_adapters_start_as_nothing_and_from_the_seed_alone() -> None:
    starts = []
    for draws in (0, 3):
        torch.rand(draws)
        weights = tiny_model("llama")
        before = logits(weights)
        student = drop_blocks(weights, {1})
        with lora_adapters(student, linear_weights(weights, [0, 2], frozen=set()), rank=2, alpha=4.0, seed=7) as found:
            starts.append({name: parameter.detach().clone() for name, parameter in found.items()})
        assert torch.equal(logits(weights), before)
    assert starts[0].keys() == starts[1].keys()
    assert len(starts[0]) == 2 * 2 * 7  # A and B of seven linear layers in two blocks
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_an_interrupted_run_leaves_no_adapter_and_no_change() -> None:
    weights = tiny_model("llama")
    student, before = drop_blocks(weights, {1}), copy.deepcopy(weights.state_dict())

    def train_and_stop() -> None:
        with lora_adapters(student, linear_weights(weights, [0], frozen=set()), rank=2, alpha=4.0, seed=0) as adapters:
            for parameter in adapters.values():
                nn.init.ones_(parameter)
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_and_stop()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.state_dict().items())
    assert not any("lora" in name for name in student.state_dict())
