"""Architectures that pruned configurations cannot describe, or whose pruned models are not the truth, are refused."""

from __future__ import annotations

import json

import pytest
from torch import nn
from transformers import PreTrainedModel

from benchmarks.tiny_architectures import tiny_config, tiny_model
from workers.pruning.model.blocks import UnsupportedArchitecture, block_stack
from workers.pruning.model.proof import Built, attention_blocks, one_of_each_kind, prove_configurations, prove_pruned


def given(model: PreTrainedModel) -> dict[str, object]:
    """The configuration as a checkpoint has it."""
    content: dict[str, object] = json.loads(model.config.to_json_string())
    return content


def stored(model: PreTrainedModel) -> list[str]:
    """What a checkpoint of the model holds."""
    return list(model.state_dict())


@pytest.mark.training
@pytest.mark.parametrize("model_type", ["llama", "llama4_text", "deepseek_v3", "smollm3", "lfm2_moe", "nemotron_h"])
def test_what_can_be_described_proves_itself(model_type: str) -> None:
    model = tiny_model(tiny_config(model_type))
    prove_configurations(given(model), stored=stored(model))
    prove_pruned(block_stack(model), given(model), stored=stored(model))


def test_a_constant_that_follows_from_a_blocks_number_is_named() -> None:
    model = tiny_model(tiny_config("diffllama"))
    reason = r"'diffllama' is not supported: without block 0 .* block 1 otherwise: self_attn.lambda_init .* becomes 0.2"
    with pytest.raises(UnsupportedArchitecture, match=reason):
        prove_configurations(given(model), stored=stored(model))


def test_a_class_that_overrules_its_configuration_is_refused_with_what_to_protect() -> None:
    model = tiny_model(tiny_config("gemma4_text"))
    reason = r"'gemma4_text' is not supported: without block 7 .* search\.protect: \[7\]"
    with pytest.raises(UnsupportedArchitecture, match=reason):
        prove_configurations(given(model), stored=stored(model))
    prove_configurations(given(model), stored=stored(model), protected=frozenset({7}))


def test_values_that_follow_from_a_blocks_number_are_refused_where_the_checkpoint_lacks_them() -> None:
    model = tiny_model(tiny_config("minimax"))
    prove_configurations(given(model), stored=stored(model))
    parameters = [name for name, _ in model.named_parameters()]
    with pytest.raises(UnsupportedArchitecture, match=r"the values of self_attn\.\w+ change"):
        prove_configurations(given(model), stored=parameters)


def test_only_the_blocks_of_hybrids_are_told_by_their_attention() -> None:
    assert attention_blocks(tiny_model(tiny_config("llama"))) is None
    assert attention_blocks(tiny_model(tiny_config("qwen3_next"))) == [3, 7]


def test_a_pruned_model_that_computes_something_else_is_refused() -> None:
    model = tiny_model(tiny_config("llama"))
    # As a model would that scales by what it finds in its configuration.
    model.model.norm.register_forward_hook(lambda norm, args, h: h * model.config.num_hidden_layers)
    blocks = model.model.layers
    for block in blocks:
        block.self_attn.register_forward_hook(
            lambda part, args, out: (out[0] * part.config.num_hidden_layers, *out[1:])
        )
    with pytest.raises(UnsupportedArchitecture, match=r"without block 0, .* its logits differ by"):
        prove_pruned(block_stack(model), given(model), stored=stored(model))


def test_one_block_of_each_kind_is_tried_and_the_last() -> None:
    assert one_of_each_kind(block_stack(tiny_model(tiny_config("llama")))) == [0, 7]
    assert one_of_each_kind(block_stack(tiny_model(tiny_config("deepseek_v3")))) == [0, 2, 7]


def test_a_layers_own_number_makes_no_difference_and_other_attributes_do() -> None:
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    one.layer_idx, two.layer_idx = 3, 1  # type: ignore[assignment]
    assert Built.of(one, 3).difference(Built.of(two, 1)) is None
    two.scale = 0.5  # type: ignore[assignment]
    assert Built.of(one, 3).difference(Built.of(two, 1)) == "scale None becomes 0.5"


def test_the_dense_model_stays_as_it_is() -> None:
    model = tiny_model(tiny_config("llama"))
    before = model.config.to_dict()
    prove_pruned(block_stack(model), given(model), stored=stored(model))
    assert model.config.to_dict() == before
