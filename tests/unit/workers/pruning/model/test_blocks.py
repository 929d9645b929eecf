from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GPT2Config,
    PretrainedConfig,
    StableLmConfig,
    Starcoder2Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pdtrim.contract.architectures import ARCHITECTURES, ENCODERS, KNOWN, LAST_STAYS, STATEFUL, UNPRUNABLE
from tests.unit.workers.pruning.models import EXPERTS, FAMILIES, OTHERS, TOLERANCE, continued, random_ids, tiny_model
from workers.pruning.model.blocks import (
    UnsupportedArchitecture,
    block_stack,
    capture_calls,
    drop_blocks,
    prove,
)


@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_walking_the_blocks_gives_the_models_own_logits(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    stack = block_stack(model)
    calls = capture_calls(stack, ids)
    h = stack.embed(ids)
    for block in range(len(stack.blocks)):
        h = calls.run(stack, block, h)
    assert torch.equal(stack.head(stack.norm(h)), model(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES + OTHERS + EXPERTS)
def test_a_model_without_blocks_generates_alike_with_and_without_cache(family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 12)
    pruned = drop_blocks(model, {1, 2})
    assert torch.equal(continued(pruned, ids, 10, use_cache=True), continued(pruned, ids, 10, use_cache=False))
    assert pruned.config.num_hidden_layers == len(block_stack(pruned).blocks) == 3


def test_dropping_blocks_shares_weights_and_leaves_the_model_as_it_was() -> None:
    model, ids = tiny_model("qwen2-mixed"), random_ids(1, 8)
    before = model(input_ids=ids).logits
    pruned = drop_blocks(model, {0, 3})
    assert torch.equal(model(input_ids=ids).logits, before)
    assert model.config.num_hidden_layers == 5
    assert len(model.config.layer_types) == 5
    assert pruned.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert pruned.model.layers[0].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3, 4]
    assert [layer.self_attn.layer_idx for layer in pruned.model.layers] == [0, 1, 2]


def test_dropping_nothing_changes_nothing() -> None:
    model, ids = tiny_model("llama"), random_ids(1, 8)
    difference = drop_blocks(model, ())(input_ids=ids).logits - model(input_ids=ids).logits
    assert difference.abs().max() <= TOLERANCE


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("config", [Starcoder2Config(**SMALL), StableLmConfig(**SMALL)])
def test_an_architecture_of_the_usual_structure_proves_itself(config: PretrainedConfig) -> None:
    prove(block_stack(AutoModelForCausalLM.from_config(config).eval()))


def test_an_architecture_whose_logits_the_walk_does_not_give_is_refused_with_the_difference() -> None:
    stack = block_stack(AutoModelForCausalLM.from_config(StableLmConfig(**SMALL)).eval())
    stack.model.register_forward_hook(lambda model, args, output: CausalLMOutputWithPast(logits=output.logits / 2))
    with pytest.raises(UnsupportedArchitecture, match=r"'stablelm' .* differ by 1.0e"):
        prove(stack)


def test_scaled_logits_are_the_models_own() -> None:
    prove(block_stack(AutoModelForCausalLM.from_config(CohereConfig(**SMALL, logit_scale=0.5)).eval()))


def test_blocks_that_differ_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[1] = nn.Identity()
    with pytest.raises(UnsupportedArchitecture, match="one list of 5 equal blocks, and has none"):
        block_stack(model)


def test_attention_that_depends_on_the_blocks_number_is_refused() -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(UnsupportedArchitecture, match="a block depends on its number"):
        block_stack(AutoModelForCausalLM.from_config(config))


def test_an_encoder_decoder_is_refused() -> None:
    config = T5Config(vocab_size=97, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    with pytest.raises(UnsupportedArchitecture, match="'t5' is not supported: it has an encoder"):
        block_stack(T5ForConditionalGeneration(config))


def test_every_architecture_of_the_table_is_tested() -> None:
    tested = {tiny_model(family).config.model_type for family in FAMILIES + OTHERS + EXPERTS}
    assert tested == set(ARCHITECTURES)


def test_the_types_that_the_gateway_knows_are_those_of_transformers() -> None:
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == KNOWN
    assert ENCODERS | STATEFUL | LAST_STAYS | UNPRUNABLE.keys() <= KNOWN
