from __future__ import annotations

from typing import Any

import pytest

from pdtrim.contract.kv_cache import kv_numbers

PLAIN = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8}
GLOBAL = {"layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]}


@pytest.mark.parametrize(
    ("change", "numbers"),
    [
        ({}, (128,) * 4),
        ({"num_key_value_heads": 2}, (32,) * 4),
        ({"num_key_value_heads": 2, "head_dim": 32}, (128,) * 4),
        ({"model_type": "falcon", "multi_query": True, "num_kv_heads": 8}, (16,) * 4),
        ({"model_type": "falcon", "new_decoder_architecture": True, "num_kv_heads": 2}, (32,) * 4),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, (576,) * 4),
        (
            {"model_type": "deepseek_v32", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128},
            (704,) * 4,
        ),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2}, (0, 128, 0, 128)),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-*M"}, (0, 0, 128, 0)),
        ({"model_type": "gemma4_text", "num_key_value_heads": 2, "head_dim": 8, **GLOBAL}, (32, 32, 32, 2048)),
        (
            {"model_type": "gemma4_text", "head_dim": 8, "per_layer_config": {"3": {"head_dim": 16}}, **GLOBAL},
            (128, 128, 128, 256),
        ),
        ({"model_type": "mimo_v2_flash", "num_key_value_heads": 2, "v_head_dim": 4, **GLOBAL}, (48, 48, 48, 24)),
        ({"n_layer": 4, "num_hidden_layers": None, "n_embd": 64, "hidden_size": None}, (128,) * 4),
    ],
)
def test_each_layer_keeps_what_its_configuration_says(change: dict[str, Any], numbers: tuple[int, ...]) -> None:
    assert kv_numbers(PLAIN | change) == numbers


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen3_next"},  # Which of its layers have attention is in its class alone.
        {"num_attention_heads": None},
        {"num_key_value_heads": "2"},
        {"kv_lora_rank": 512},
        {"kv_lora_rank": True, "qk_rope_head_dim": 64},
        {"num_hidden_layers": "4"},
    ],
)
def test_what_a_configuration_does_not_tell_is_not_guessed(change: dict[str, Any]) -> None:
    assert kv_numbers(PLAIN | change) is None
