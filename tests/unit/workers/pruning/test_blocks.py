from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from tests.unit.workers.pruning.models import FAMILIES, TOLERANCE, random_ids, tiny_model
from workers.pruning.blocks import UnsupportedArchitecture, block_stack, capture_calls, drop_blocks, pruned_config


@pytest.mark.parametrize("family", FAMILIES)
def test_walking_the_blocks_gives_the_models_own_logits(family: str) -> None:
    model, ids = tiny_model(family), random_ids(3, 20)
    stack = block_stack(model)
    calls = capture_calls(stack, ids)
    h = stack.embed(ids)
    for block in range(len(stack.blocks)):
        h = calls.run(stack, block, h)
    assert torch.equal(stack.head(stack.norm(h)), model(input_ids=ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_blocks_generates_alike_with_and_without_cache(family: str) -> None:
    model, ids = tiny_model(family), random_ids(2, 12)
    pruned = drop_blocks(model, {1, 2})
    settings = {"max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(
        pruned.generate(ids, use_cache=True, **settings), pruned.generate(ids, use_cache=False, **settings)
    )
    assert pruned.config.num_hidden_layers == len(pruned.model.layers) == 3


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


def test_every_list_with_an_entry_a_layer_is_cut() -> None:
    config = {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "eos_token_id": [1, 2, 3],
        "mlp_layers": [1, 2, 3],
    }
    assert pruned_config(config, [0, 2]) == {
        "num_hidden_layers": 2,
        "layer_types": ["a", "c"],
        "eos_token_id": [1, 2, 3],
        "mlp_layers": [1, 3],
    }


def test_an_unknown_architecture_is_refused_by_name() -> None:
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(UnsupportedArchitecture, match="'gpt2' is not supported"):
        block_stack(model)
