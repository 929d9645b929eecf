from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.unit.workers.pruning.models import reference_model
from workers.pruning.model.blocks import block_stack
from workers.pruning.model.costs import Cost, costs_of, counting
from workers.pruning.model.units import Unit

TOKENS = 24


def test_operations_are_those_of_the_matrices_and_of_attention() -> None:
    model = reference_model()
    costs = costs_of(block_stack(model), "flops", torch.ones((1, TOKENS), dtype=torch.long))
    layers: Any = model.base_model.layers
    block = layers[5]
    linear = {name: 2 * TOKENS * part.weight.numel() for name, part in block.named_modules() if hasattr(part, "weight")}
    projections = [f"self_attn.{name}_proj" for name in "qkvo"]
    products = 4 * TOKENS * TOKENS * block.self_attn.q_proj.out_features
    attention = sum(linear[name] for name in projections) + products
    mlp = sum(linear[f"mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert costs.saves[Unit(5, "attention")] == attention
    assert costs.saves[Unit(5, "mlp")] == mlp
    assert costs.saves[Unit(5)] == attention + mlp
    kept = linear["self_attn.k_proj"] + linear["self_attn.v_proj"]
    assert costs.saves[Unit(5, "kv_only")] == attention + mlp - kept
    assert costs.dense == len(layers) * (attention + mlp)
    assert costs.share([Unit(5), Unit(7)]) == pytest.approx(1 - 2 / len(layers))


def test_cache_bytes_are_those_that_a_cache_holds() -> None:
    model = reference_model()
    prompt = torch.ones((1, TOKENS), dtype=torch.long)
    cache = DynamicCache(config=model.config)
    model(prompt, past_key_values=cache)
    costs = costs_of(block_stack(model), "kv_bytes", prompt)
    held: list[Any] = cache.layers
    assert costs.dense == sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    assert costs.saves[Unit(3, "attention")] == costs.saves[Unit(3)]
    assert costs.saves[Unit(3, "mlp")] == 0


def test_weight_bytes_are_those_of_all_parameters() -> None:
    model = reference_model()
    costs = costs_of(block_stack(model), "weight_bytes", torch.ones((1, 4), dtype=torch.long))
    assert costs.dense == sum(parameter.nbytes for parameter in model.parameters())
    layers: Any = model.base_model.layers
    block = layers[2]
    assert costs.saves[Unit(2)] == sum(parameter.nbytes for parameter in block.parameters())
    assert costs.saves[Unit(2, "mlp")] == sum(parameter.nbytes for parameter in block.mlp.parameters())


@pytest.mark.parametrize("cost", ["flops", "kv_bytes", "weight_bytes"])
def test_a_model_without_units_costs_all_of_it(cost: Cost) -> None:
    costs = costs_of(block_stack(reference_model()), cost, torch.ones((1, 4), dtype=torch.long))
    assert costs.share([]) == 1.0


@pytest.mark.parametrize(
    "attention",
    [
        torch.ops.aten._scaled_dot_product_flash_attention,
        torch.ops.aten._scaled_dot_product_cudnn_attention,
        torch.ops.aten._scaled_dot_product_efficient_attention,
    ],
    ids=str,
)
def test_attention_of_gpus_counts_with_fewer_heads_of_keys_than_of_queries(attention: Any) -> None:
    query, key = torch.empty((1, 8, TOKENS, 16), device="meta"), torch.empty((1, 2, TOKENS, 16), device="meta")
    extra = () if attention is torch.ops.aten._scaled_dot_product_flash_attention else (None, False)
    with counting() as counter:
        attention(query, key, key, *extra)
    assert counter.get_total_flops() == 4 * 8 * TOKENS * TOKENS * 16
