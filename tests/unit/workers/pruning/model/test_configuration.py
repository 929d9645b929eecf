"""What becomes of a configuration whose blocks follow from their numbers."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from transformers import AutoConfig, PretrainedConfig

from workers.pruning.model.configuration import config_of, pruned_json, pruned_values

KEPT = [0, 2, 3, 5]
SIX = {"num_hidden_layers": 6}


def without_1_and_4(model_type: str, **given: Any) -> PretrainedConfig:
    """The pruned configuration, as its class reads it."""
    return config_of(json.loads(json.dumps(pruned_json({"model_type": model_type, **SIX, **given}, KEPT))))


def test_every_list_with_an_entry_a_layer_is_cut_and_no_other() -> None:
    kinds = ["full_attention", "sliding_attention"] * 3
    found = without_1_and_4("qwen3", layer_types=kinds, eos_token_id=[1, 2, 3, 4, 5, 6])
    assert found.num_hidden_layers == 4
    assert found.layer_types == ["full_attention", "full_attention", "sliding_attention", "sliding_attention"]
    assert found.eos_token_id == [1, 2, 3, 4, 5, 6]


def test_what_a_class_derives_becomes_explicit() -> None:
    assert pruned_values(config_of({"model_type": "smollm3", **SIX}), KEPT)["no_rope_layers"] == [1, 1, 0, 1]
    assert pruned_json({"model_type": "gemma3_text", **SIX}, KEPT)["layer_types"][-1] == "full_attention"
    experts = {"decoder_sparse_step": 2, "mlp_only_layers": [1]}
    assert without_1_and_4("qwen3_moe", **experts).mlp_only_layers == [0, 1]


@pytest.mark.parametrize(("leading", "left"), [(0, 0), (1, 1), (3, 2), (6, 4)])
def test_leading_dense_blocks_are_those_that_stay(leading: int, left: int) -> None:
    assert without_1_and_4("deepseek_v3", first_k_dense_replace=leading).first_k_dense_replace == left


@pytest.mark.parametrize(("first", "last", "interval"), [(1, -1, 1), (0, 3, 1), (2, 5, 3), (4, 4, 1)])
def test_ernies_experts_stay_where_they_were(first: int, last: int, interval: int) -> None:
    def experts(config: PretrainedConfig) -> list[bool]:
        indices = range(config.num_hidden_layers)
        start, end = config.moe_layer_start_index, config.moe_layer_end_index
        return [start <= i <= end and (i + 1) % config.moe_layer_interval == 0 for i in indices]

    given = {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": interval}
    dense = experts(config_of({"model_type": "ernie4_5_moe", **SIX, **given}))
    assert experts(without_1_and_4("ernie4_5_moe", **given)) == [dense[block] for block in KEPT]


def test_lists_of_numbers_are_renumbered() -> None:
    found = without_1_and_4("llama4_text", moe_layers=[1, 3, 5], no_rope_layers=[1, 1, 0, 1, 1, 0])
    assert found.moe_layers == [2, 3]
    assert found.no_rope_layers == [1, 0, 1, 0]


def test_kinds_that_are_kept_as_runs_are_written_as_runs() -> None:
    runs = [[["global", "local"], 3]]
    assert without_1_and_4("gpt_neo", num_layers=6, attention_types=runs).attention_layers == [
        "global", "global", "local", "local",
    ]  # fmt: skip


def test_a_scale_by_depth_stays_what_it_was() -> None:
    found = without_1_and_4("minicpm3", scale_depth=1.4)
    assert found.scale_depth / math.sqrt(4) == pytest.approx(1.4 / math.sqrt(6))


def test_numbers_that_json_lacks_are_read_and_written_as_transformers_does() -> None:
    given = {"model_type": "bamba", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert config_of(given).time_step_limit[1] == math.inf
    assert pruned_json({**given, **SIX}, KEPT)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]


def test_layers_that_predict_further_tokens_are_dropped_with_code_beside_the_weights() -> None:
    given = {"model_type": "deepseek_v3", **SIX, "num_nextn_predict_layers": 1, "auto_map": {"AutoConfig": "a.B"}}
    found = pruned_json(given, KEPT)
    assert found["num_nextn_predict_layers"] == 0
    assert "auto_map" not in found


def test_a_list_under_an_alias_is_replaced_under_its_own_name() -> None:
    kinds = ["linear_attention", "full_attention"] * 3
    given = {"model_type": "granitemoehybrid", **SIX, "layers_block_type": kinds}
    found = AutoConfig.for_model(**pruned_json(given, KEPT))
    assert found.layers_block_type == [kinds[block] for block in KEPT]


def test_all_blocks_kept_changes_nothing() -> None:
    given = {"model_type": "deepseek_v3", **SIX, "first_k_dense_replace": 3}
    assert pruned_json(given, range(6)) == {**given, "num_nextn_predict_layers": 0}
